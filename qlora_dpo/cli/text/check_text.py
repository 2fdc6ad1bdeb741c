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
from qlora_dpo.data.dialogue import printable
from qlora_dpo.planning.preflight import Preflight, counted_rows
from qlora_dpo.recipe.model import QUANTIZED
from qlora_dpo.recipe.recipe import LoadedRecipe

SHOWN_ROWS = 5
OK, WARNING, NO = "ok", "warning", "no"
COLOURS = {OK: "green", WARNING: "yellow", NO: "red", "": ""}

Row = tuple[str, str, str]
"""Which part, its verdict, and what is said; a verdict is empty where a line goes on with the one before."""


def show(loaded: LoadedRecipe, found: Preflight) -> None:
    """Print the table: fitted to a terminal, and a line a row through a pipe."""
    rows = [(part, verdict, printable(told)) for part, verdict, told in _rows(loaded, found)]
    console = Console()
    if not console.is_terminal:
        sys.stdout.write("".join(f"{part:<9} {verdict:<8} {told}\n" for part, verdict, told in rows))
        return
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for part, verdict, told in rows:
        table.add_row(Text(part, "bold"), Text(verdict, COLOURS[verdict]), Text(told))
    console.print(table)


def _rows(loaded: LoadedRecipe, found: Preflight) -> Iterator[Row]:
    yield from _recipe_rows(loaded, found)
    yield from _data_rows(found)
    yield from _token_rows(loaded, found)
    padded = [f"padded batches, since {found.memory.padded}"] if found.memory.padded else []
    yield from _grouped("device", OK, [line.partition(" ")[2].strip() for line in found.device.lines()] + padded)
    yield from _memory_rows(found)
    yield "time", "" if found.time.why_not else OK, time_text.in_a_line(found.time)


def _recipe_rows(loaded: LoadedRecipe, found: Preflight) -> Iterator[Row]:
    model, lora, train = loaded.recipe.model, loaded.recipe.lora, loaded.recipe.train
    kind = QUANTIZED.get(model.quantization, "not quantized")
    told = [
        f"{loaded.path}: {loaded.recipe.objective.loss_type}, {found.steps:,} steps of {train.batch_size} pairs, "
        f"learning rate {train.learning_rate:g}",
        f"{model.name}: {found.memory.weights / 1e6:,.0f} M parameters, {kind}",
        f"adapter of rank {lora.r}: {found.memory.trained / 1e6:,.2f} M parameters are trained",
    ]
    yield from _grouped("recipe", _verdict(found, "steps"), told)


def _data_rows(found: Preflight) -> Iterator[Row]:
    told = [f"{_account(found.train)}; {found.train.shape}", f"held out: {_account(found.heldout)}"]
    for each in found.findings:
        numbers = ", ".join(map(str, each.rows[:SHOWN_ROWS])) + (", ..." if len(each.rows) > SHOWN_ROWS else "")
        where = f"row{'s' if len(each.rows) > 1 else ''} {numbers}"
        told.append(f"{counted_rows(each)}: {each.what} ({where}); {each.advice}")
    if found.lengths:
        told.append(found.lengths.sentence())
    told += [each.removeprefix("data: ") for each in found.warnings if "held-out pairs:" in each]
    yield from _grouped("data", _verdict(found, "data"), told)


def _account(audit: Audit) -> str:
    dropped = sum(map(len, audit.dropped.values()))
    return f"{audit.source}: {audit.rows:,} rows read, {audit.used:,} pairs used" + (
        f", {dropped:,} rows dropped ({audit.reasons()})" if dropped else ""
    )


def _token_rows(loaded: LoadedRecipe, found: Preflight) -> Iterator[Row]:
    tokens, limit = found.tokens, loaded.recipe.data.max_length
    told = [
        f"{name}: {' / '.join(f'{each:,}' for each in numbers)} (median / 95 % / longest)"
        for name, numbers in (
            *((part, found.train.tokens[part]) for part in ("prompt", "chosen", "rejected")),
            ("longest sequence of a pair", tokens.sequence),
            ("pair, its prompt once", tokens.pair),
        )
    ]
    what = "left out" if loaded.recipe.data.overlong == "drop" else "cut at the front"
    told.append(
        f"{tokens.overlong:,} pairs ({tokens.overlong_share:.1%}) longer than max_length = {limit:,}"
        + (f", {what}" if tokens.overlong else "")
    )
    mean = tokens.epoch / max(1, found.train.used)
    told.append(f"{tokens.epoch:,} in an epoch, {mean * loaded.recipe.train.batch_size:,.0f} in a step")
    yield from _grouped("tokens", _verdict(found, "tokens"), told)


def _memory_rows(found: Preflight) -> Iterator[Row]:
    verdict = _verdict(found, "memory") if found.memory.fits else NO
    yield from _grouped("memory", verdict, memory_text.by_part(found.memory))


def _grouped(part: str, verdict: str, told: Sequence[str]) -> Iterator[Row]:
    """Several lines about one part; its name and verdict stand before the first."""
    for number, each in enumerate(told):
        yield (part, verdict, each) if number == 0 else ("", "", each)


def _verdict(found: Preflight, part: str) -> str:
    return WARNING if any(each.startswith(f"{part}: ") for each in found.warnings) else OK


def first(warnings: Sequence[str]) -> str:
    """The first warning, and how many more there are."""
    return warnings[0] + (f"; and {len(warnings) - 1} more" if len(warnings) > 1 else "")


def next_command(loaded: LoadedRecipe) -> str:
    """The line to type if all is well."""
    words = ["qlora-dpo", "train", str(loaded.path), *(w for each in loaded.overrides for w in ("--set", each))]
    return f"next: {shlex.join(words)}"


def as_json(loaded: LoadedRecipe, found: Preflight) -> dict[str, Any]:
    """All figures of the table."""
    memory, device, tokens = found.memory, found.device, found.tokens
    names = ("p50", "p95", "max")
    return {
        "recipe": {"path": str(loaded.path), "steps": found.steps, "loss_type": loaded.recipe.objective.loss_type},
        "model": {"name": loaded.recipe.model.name, "parameters": memory.weights, "trained": memory.trained},
        "data": {
            "train": _facts(found.train),
            "eval": _facts(found.heldout),
            "findings": [
                {"what": each.what, "count": len(each.rows), "rows": list(each.rows), "advice": each.advice}
                for each in found.findings
            ],
            "length": found.lengths and {"chosen_longer": found.lengths.chosen_longer, "effect": found.lengths.effect},
        },
        "tokens": {
            **{part: dict(zip(names, each, strict=True)) for part, each in found.train.tokens.items()},
            "sequence": dict(zip(names, tokens.sequence, strict=True)),
            "pair": dict(zip(names, tokens.pair, strict=True)),
            "epoch": tokens.epoch,
            "overlong": tokens.overlong,
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
            "parts": dict(memory.parts),
            "needed_bytes": memory.needed,
            "process_bytes": memory.own,
            "loading_bytes": memory.loading,
            "peak_bytes": memory.peak,
            "row_tokens": memory.row,
            "free_bytes": memory.free,
            "recomputed_layers": memory.recomputed,
            "layers": memory.layers,
            "padded": memory.padded,
            "fits": memory.fits,
            "ways_to_fit": [{"lines": list(way.lines), "needed_bytes": way.needed} for way in found.ways],
        },
        "time": time_text.as_json(found.time),
        "warnings": list(found.warnings),
    }


def _facts(audit: Audit) -> dict[str, Any]:
    dropped = {reason: len(rows) for reason, rows in audit.dropped.items() if reason != OVERLONG}
    return {"source": audit.source, "shape": audit.shape, "rows": audit.rows, "used": audit.used, "dropped": dropped}
