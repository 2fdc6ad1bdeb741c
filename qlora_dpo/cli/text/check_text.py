"""What `qlora-dpo check RECIPE` shows: one table, or the same as one JSON object."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_dpo.cli.text import memory_text, time_text
from qlora_dpo.data.audit import OVERLONG, Audit
from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.planning.preflight import Preflight, format_row_count
from qlora_dpo.recipe.model import QUANTIZATION_NAMES
from qlora_dpo.recipe.recipe import LoadedRecipe

FINDING_ROWS_SHOWN = 5
OK, WARNING, DOES_NOT_FIT = "ok", "warning", "no"
VERDICT_STYLES = {OK: "green", WARNING: "yellow", DOES_NOT_FIT: "red", "": ""}

CheckRow = tuple[str, str, str]
"""Which part, its verdict, and what is said; a verdict is empty where a line goes on with the one before."""


def print_check(loaded: LoadedRecipe, preflight: Preflight) -> None:
    """Print the table: fitted to a terminal, and a line a row through a pipe."""
    rows = [(part, verdict, sanitize_text(told)) for part, verdict, told in _rows(loaded, preflight)]
    console = Console()
    if not console.is_terminal:
        sys.stdout.write("".join(f"{part:<9} {verdict:<8} {told}\n" for part, verdict, told in rows))
        return
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for part, verdict, told in rows:
        table.add_row(Text(part, "bold"), Text(verdict, VERDICT_STYLES[verdict]), Text(told))
    console.print(table)


def _rows(loaded: LoadedRecipe, preflight: Preflight) -> Iterator[CheckRow]:
    yield from _recipe_rows(loaded, preflight)
    yield from _data_rows(preflight)
    yield from _token_rows(loaded, preflight)
    padded = [f"padded batches, since {preflight.memory.padding_reason}"] if preflight.memory.padding_reason else []
    yield from _group_rows(
        "device", OK, [line.partition(" ")[2].strip() for line in preflight.device.describe()] + padded
    )
    yield from _memory_rows(preflight)
    yield "time", "" if preflight.time.unknown_reason else OK, time_text.time_estimate_line(preflight.time)


def _recipe_rows(loaded: LoadedRecipe, preflight: Preflight) -> Iterator[CheckRow]:
    model, lora, train = loaded.recipe.model, loaded.recipe.lora, loaded.recipe.train
    kind = QUANTIZATION_NAMES.get(model.quantization, "not quantized")
    told = [
        f"{loaded.path}: {loaded.recipe.objective.loss_type}, {preflight.steps:,} steps of {train.batch_size} pairs, "
        f"learning rate {train.learning_rate:g}",
        f"{model.name}: {preflight.memory.base_parameters / 1e6:,.0f} M parameters, {kind}",
        f"adapter of rank {lora.r}: {preflight.memory.trainable_parameters / 1e6:,.2f} M parameters are trained",
    ]
    yield from _group_rows("recipe", _verdict(preflight, "steps"), told)


def _data_rows(preflight: Preflight) -> Iterator[CheckRow]:
    told = [f"{_audit_line(preflight.train)}; {preflight.train.format}", f"held out: {_audit_line(preflight.heldout)}"]
    for each in preflight.findings:
        numbers = ", ".join(map(str, each.rows[:FINDING_ROWS_SHOWN])) + (
            ", ..." if len(each.rows) > FINDING_ROWS_SHOWN else ""
        )
        where = f"row{'s' if len(each.rows) > 1 else ''} {numbers}"
        told.append(f"{format_row_count(each)}: {each.problem} ({where}); {each.advice}")
    if preflight.length_bias:
        told.append(preflight.length_bias.describe())
    told += [each.removeprefix("data: ") for each in preflight.warnings if "held-out pairs:" in each]
    yield from _group_rows("data", _verdict(preflight, "data"), told)


def _audit_line(audit: Audit) -> str:
    dropped = sum(map(len, audit.dropped.values()))
    return f"{audit.source}: {audit.rows:,} rows read, {audit.used:,} pairs used" + (
        f", {dropped:,} rows dropped ({audit.reason_summary()})" if dropped else ""
    )


def _token_rows(loaded: LoadedRecipe, preflight: Preflight) -> Iterator[CheckRow]:
    tokens, limit = preflight.tokens, loaded.recipe.data.max_length
    told = [
        f"{name}: {' / '.join(f'{each:,}' for each in numbers)} (median / 95 % / longest)"
        for name, numbers in (
            *((part, preflight.train.tokens[part]) for part in ("prompt", "chosen", "rejected")),
            ("longest sequence of a pair", tokens.sequence),
            ("pair, its prompt once", tokens.pair),
        )
    ]
    what = "left out" if loaded.recipe.data.overlong == "drop" else "cut at the front"
    told.append(
        f"{tokens.overlong_pairs:,} pairs ({tokens.overlong_share:.1%}) longer than max_length = {limit:,}"
        + (f", {what}" if tokens.overlong_pairs else "")
    )
    mean = tokens.epoch_tokens / max(1, preflight.train.used)
    told.append(f"{tokens.epoch_tokens:,} in an epoch, {mean * loaded.recipe.train.batch_size:,.0f} in a step")
    yield from _group_rows("tokens", _verdict(preflight, "tokens"), told)


def _memory_rows(preflight: Preflight) -> Iterator[CheckRow]:
    verdict = _verdict(preflight, "memory") if preflight.memory.fits else DOES_NOT_FIT
    yield from _group_rows("memory", verdict, memory_text.memory_lines(preflight.memory))


def _group_rows(part: str, verdict: str, lines: Sequence[str]) -> Iterator[CheckRow]:
    """Several lines about one part; its name and verdict stand before the first."""
    for number, each in enumerate(lines):
        yield (part, verdict, each) if number == 0 else ("", "", each)


def _verdict(preflight: Preflight, part: str) -> str:
    return WARNING if any(each.startswith(f"{part}: ") for each in preflight.warnings) else OK


def first_warning(warnings: Sequence[str]) -> str:
    """The first warning, and how many more there are."""
    return warnings[0] + (f"; and {len(warnings) - 1} more" if len(warnings) > 1 else "")


def train_command_line(loaded: LoadedRecipe) -> str:
    """The line to type if all is well."""
    words = ["qlora-dpo", "train", str(loaded.path), *(w for each in loaded.overrides for w in ("--set", each))]
    return f"next: {shlex.join(words)}"


def check_record(loaded: LoadedRecipe, preflight: Preflight) -> dict[str, Any]:
    """All figures of the table."""
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
                {"what": each.problem, "count": len(each.rows), "rows": list(each.rows), "advice": each.advice}
                for each in preflight.findings
            ],
            "length": preflight.length_bias
            and {"chosen_longer": preflight.length_bias.chosen_longer, "effect": preflight.length_bias.effect_size},
        },
        "tokens": {
            **{part: dict(zip(names, each, strict=True)) for part, each in preflight.train.tokens.items()},
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
                {"lines": list(way.recipe_lines), "needed_bytes": way.needed_bytes} for way in preflight.memory_fixes
            ],
        },
        "time": time_text.time_record(preflight.time),
        "warnings": list(preflight.warnings),
    }


def _audit_record(audit: Audit) -> dict[str, Any]:
    dropped = {reason: len(rows) for reason, rows in audit.dropped.items() if reason != OVERLONG}
    return {"source": audit.source, "shape": audit.format, "rows": audit.rows, "used": audit.used, "dropped": dropped}
