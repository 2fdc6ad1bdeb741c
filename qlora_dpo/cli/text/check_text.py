"""The output of `qlora-dpo check RECIPE`: a table, or the same as one JSON object."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_dpo.cli.text import memory_text, time_text
from qlora_dpo.cli.text.forecast_text import figure_lines, forecast_warning_lines
from qlora_dpo.data.audit import OVERLONG, Audit
from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.evaluation.pair_forecast import PairForecast, forecast_warnings
from qlora_dpo.planning.preflight import Preflight, format_row_count
from qlora_dpo.recipe.model import QUANTIZATION_NAMES
from qlora_dpo.recipe.recipe import LoadedRecipe

FINDING_ROWS_SHOWN = 5
OK, WARNING, DOES_NOT_FIT = "ok", "warning", "no"
VERDICT_STYLES = {OK: "green", WARNING: "yellow", DOES_NOT_FIT: "red", "": ""}

CheckRow = tuple[str, str, str]
"""Part, verdict and text; part and verdict are empty in a line that continues the one above."""


def print_check(loaded: LoadedRecipe, preflight: Preflight, forecast: PairForecast | None = None) -> None:
    """Print the table, wrapped to the width of a terminal; without a terminal, one line per row."""
    rows = [(part, verdict, sanitize_text(text)) for part, verdict, text in _rows(loaded, preflight, forecast)]
    console = Console()
    if not console.is_terminal:
        sys.stdout.write("".join(f"{part:<9} {verdict:<8} {text}\n" for part, verdict, text in rows))
        return
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for part, verdict, text in rows:
        table.add_row(Text(part, "bold"), Text(verdict, VERDICT_STYLES[verdict]), Text(text))
    console.print(table)


def _rows(loaded: LoadedRecipe, preflight: Preflight, forecast: PairForecast | None) -> Iterator[CheckRow]:
    yield from _recipe_rows(loaded, preflight)
    yield from _data_rows(preflight)
    yield from _forecast_rows(forecast)
    yield from _token_rows(loaded, preflight)
    device_lines = [line.partition(" ")[2].strip() for line in preflight.device.describe()]
    if preflight.memory.padding_reason:
        device_lines.append(f"padded batches, since {preflight.memory.padding_reason}")
    yield from _group_rows("device", OK, device_lines)
    yield from _memory_rows(preflight)
    yield "time", "" if preflight.time.unknown_reason else OK, time_text.time_estimate_line(preflight.time)


def _recipe_rows(loaded: LoadedRecipe, preflight: Preflight) -> Iterator[CheckRow]:
    model, lora, train = loaded.recipe.model, loaded.recipe.lora, loaded.recipe.train
    storage = QUANTIZATION_NAMES.get(model.quantization, "not quantized")
    lines = [
        f"{loaded.path}: {loaded.recipe.objective.loss_type}, {preflight.steps:,} steps of {train.batch_size} pairs, "
        f"learning rate {train.learning_rate:g}",
        f"{model.name}: {preflight.memory.base_parameters / 1e6:,.0f} M parameters, {storage}",
        f"adapter of rank {lora.r}: {preflight.memory.trainable_parameters / 1e6:,.2f} M trainable parameters",
    ]
    yield from _group_rows("recipe", _verdict(preflight, "steps"), lines)


def _data_rows(preflight: Preflight) -> Iterator[CheckRow]:
    lines = [f"{_audit_line(preflight.train)}; {preflight.train.format}", f"held out: {_audit_line(preflight.heldout)}"]
    for finding in preflight.findings:
        numbers = ", ".join(map(str, finding.rows[:FINDING_ROWS_SHOWN])) + (
            ", ..." if len(finding.rows) > FINDING_ROWS_SHOWN else ""
        )
        rows = f"row{'s' if len(finding.rows) > 1 else ''} {numbers}"
        lines.append(f"{format_row_count(finding)}: {finding.problem} ({rows}); {finding.advice}")
    if preflight.length_bias:
        lines.append(preflight.length_bias.describe())
    lines += [warning.removeprefix("data: ") for warning in preflight.warnings if "held-out pairs:" in warning]
    yield from _group_rows("data", _verdict(preflight, "data"), lines)


def _audit_line(audit: Audit) -> str:
    dropped = sum(map(len, audit.dropped.values()))
    counted = "answers" if "answer" in audit.tokens else "pairs"
    return f"{audit.source}: {audit.rows:,} rows read, {audit.used:,} {counted} used" + (
        f", {dropped:,} rows dropped ({audit.reason_summary()})" if dropped else ""
    )


def _forecast_rows(forecast: PairForecast | None) -> Iterator[CheckRow]:
    if forecast is None:
        yield "pairs", "", "not judged; --forecast loads the model, and says whether they can teach it anything"
        return
    warnings = forecast_warnings(forecast).values()
    yield from _group_rows("pairs", WARNING if warnings else OK, [*figure_lines(forecast), *warnings])


def _token_rows(loaded: LoadedRecipe, preflight: Preflight) -> Iterator[CheckRow]:
    tokens, limit = preflight.tokens, loaded.recipe.data.max_length
    lines = [
        f"{name}: {' / '.join(f'{quantile:,}' for quantile in quantiles)} (median / 95 % / longest)"
        for name, quantiles in (
            *preflight.train.tokens.items(),
            ("longest sequence of a pair", tokens.sequence),
            ("pair, its prompt once", tokens.pair),
        )
    ]
    treatment = "left out" if loaded.recipe.data.overlong == "drop" else "cut at the front"
    lines.append(
        f"{tokens.overlong_pairs:,} pairs ({tokens.overlong_share:.1%}) longer than max_length = {limit:,}"
        + (f", {treatment}" if tokens.overlong_pairs else "")
    )
    mean = tokens.epoch_tokens / max(1, preflight.train.used)
    lines.append(f"{tokens.epoch_tokens:,} per epoch, {mean * loaded.recipe.train.batch_size:,.0f} per step")
    yield from _group_rows("tokens", _verdict(preflight, "tokens"), lines)


def _memory_rows(preflight: Preflight) -> Iterator[CheckRow]:
    verdict = _verdict(preflight, "memory") if preflight.memory.fits else DOES_NOT_FIT
    yield from _group_rows("memory", verdict, memory_text.memory_lines(preflight.memory))


def _group_rows(part: str, verdict: str, lines: Sequence[str]) -> Iterator[CheckRow]:
    """One row per line about a part; its name and verdict are in the first row only."""
    for number, line in enumerate(lines):
        yield (part, verdict, line) if number == 0 else ("", "", line)


def _verdict(preflight: Preflight, part: str) -> str:
    return WARNING if any(warning.startswith(f"{part}: ") for warning in preflight.warnings) else OK


def first_warning(warnings: Sequence[str]) -> str:
    """The first warning, and the number of further ones."""
    return warnings[0] + (f"; and {len(warnings) - 1} more" if len(warnings) > 1 else "")


def train_command_line(loaded: LoadedRecipe) -> str:
    """The command that trains the recipe, to type next."""
    options = [word for override in loaded.overrides for word in ("--set", override)]
    return f"next: {shlex.join(['qlora-dpo', 'train', str(loaded.path), *options])}"


def check_record(loaded: LoadedRecipe, preflight: Preflight, forecast: PairForecast | None = None) -> dict[str, Any]:
    """The content of the table as one JSON object."""
    memory, device, tokens = preflight.memory, preflight.device, preflight.tokens
    names = ("p50", "p95", "max")
    return {
        "recipe": {"path": str(loaded.path), "steps": preflight.steps, "loss_type": loaded.recipe.objective.loss_type},
        "model": {
            "name": loaded.recipe.model.name,
            "parameters": memory.base_parameters,
            "trained": memory.trainable_parameters,
        },
        "data": {
            "train": _audit_record(preflight.train),
            "eval": _audit_record(preflight.heldout),
            "findings": [
                {
                    "what": finding.problem,
                    "count": len(finding.rows),
                    "rows": list(finding.rows),
                    "advice": finding.advice,
                }
                for finding in preflight.findings
            ],
            "length": preflight.length_bias
            and {"chosen_longer": preflight.length_bias.chosen_longer, "effect": preflight.length_bias.effect_size},
        },
        "tokens": {
            **{part: dict(zip(names, quantiles, strict=True)) for part, quantiles in preflight.train.tokens.items()},
            "sequence": dict(zip(names, tokens.sequence, strict=True)),
            "pair": dict(zip(names, tokens.pair, strict=True)),
            "epoch": tokens.epoch_tokens,
            "overlong": tokens.overlong_pairs,
            "overlong_share": tokens.overlong_share,
        },
        "device": {
            "type": device.type,
            "name": device.name,
            "compute_dtype": device.compute_dtype,
            "dtype_reason": device.dtype_reason,
            "attention": device.attention,
            "triton": device.triton,
        },
        "memory": {
            "parts": dict(memory.bytes_by_part),
            "needed_bytes": memory.needed,
            "process_bytes": memory.process_bytes,
            "loading_bytes": memory.loading_bytes,
            "peak_bytes": memory.peak_bytes,
            "row_tokens": memory.row_tokens,
            "free_bytes": memory.free_bytes,
            "recomputed_layers": memory.recomputed_layers,
            "layers": memory.num_layers,
            "padded": memory.padding_reason,
            "fits": memory.fits,
            "ways_to_fit": [
                {"lines": list(fix.recipe_lines), "needed_bytes": fix.needed_bytes} for fix in preflight.memory_fixes
            ],
        },
        "time": time_text.time_record(preflight.time),
        "forecast": forecast and forecast.to_dict(),
        "warnings": [*preflight.warnings, *(forecast_warning_lines(forecast) if forecast else ())],
    }


def _audit_record(audit: Audit) -> dict[str, Any]:
    dropped = {reason: len(rows) for reason, rows in audit.dropped.items() if reason != OVERLONG}
    return {"source": audit.source, "shape": audit.format, "rows": audit.rows, "used": audit.used, "dropped": dropped}
