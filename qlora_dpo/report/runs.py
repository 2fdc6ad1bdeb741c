"""Lists runs with their figures, and tells two of them apart: recipes, data, results. Needs no torch."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import RunError
from qlora_dpo.recipe.former_keys import upgrade_stored_recipe
from qlora_dpo.report.objective_names import describe_objective
from qlora_dpo.wilson import wilson_interval

Record = Mapping[str, Any]

SORT_DESCENDING = {
    "finished": False,
    "name": False,
    "loss": False,
    "accuracy": True,
    "margin": True,
    "kl": False,
    "minutes": False,
}
"""What a list can be sorted by; True where the highest comes first."""
METRIC_KEYS = {
    "loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "kl": "eval_kl",
}
COLUMN_FORMATS = {
    "name": "{}",
    "objective": "{}",
    "learning_rate": "{:g}",
    "steps": "{}",
    "loss": "{:z.4f}",
    "accuracy": "{:.3f}",
    "margin": "{:+z.3f}",
    "kl": "{:.3f}",
    "minutes": "{:.1f}",
}
COLUMN_HEADINGS = {"learning_rate": "learning\nrate", "minutes": "min"}
"""Shorter than the names of the columns: every letter is one less for the name and the objective."""
EMPTY_CELL = "-"
OTHER_COLUMNS_WIDTH, MIN_NAME_WIDTH = 72, 12
"""Columns that a table of runs needs beside the name, and what the name gets in a terminal that has not so many."""


def find_runs(home: Path) -> list[Path]:
    """The folders of `home` that hold a run, by name; a run that goes on or was killed counts."""
    return sorted(each.parent for each in home.glob("*/resolved.toml"))


def summarize_run(folder: Path) -> dict[str, Any]:
    """One run in a few figures: those of the evaluation that its adapter comes from, else of the last one.

    Raises RunError if a file of it is damaged.
    """
    try:
        recipe = upgrade_stored_recipe(tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8")))
        run, results = (_read_json(folder / name) for name in ("run.json", "results.json"))
        evals = results.get("evals") or _read_evals(folder / "metrics.jsonl")
        by_step = {record["step"]: record for record in evals}
        shown = by_step.get(run.get("adapter_step"), evals[-1] if evals else {})
        share, pairs = shown.get(METRIC_KEYS["accuracy"]), shown.get("eval_pairs")
        seconds = (run.get("seconds") or {}).get("total")
        return {
            "name": folder.resolve().name,
            "folder": str(folder),
            "status": run.get("status", "finished" if results else "unfinished"),
            "finished": run.get("finished"),
            "base": recipe["model"]["name"],
            "objective": describe_objective(recipe.get("objective", {"loss_type": "sigmoid"})),
            "learning_rate": recipe["train"]["learning_rate"],
            "train_pairs": (run.get("data") or {}).get("train_pairs"),
            "eval_pairs": pairs,
            "steps": run.get("steps", shown.get("step")),
            "adapter_step": shown.get("step"),
            **{name: shown.get(key) for name, key in METRIC_KEYS.items()},
            "accuracy_interval": wilson_interval(share * pairs, pairs) if share is not None and pairs else None,
            "minutes": None if seconds is None else round(seconds / 60, 2),
            "signs": [sign["name"] for sign in results.get("signs") or []],
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{folder}: is damaged ({type(error).__name__}: {str(error)[:60]}); take it from a backup"
        ) from error


def sort_runs(runs: Sequence[Record], key: str) -> list[Record]:
    """Runs by `key`, the best first where one is better; what a run does not have puts it last."""
    having = [run for run in runs if run[key] is not None]
    return [
        *sorted(having, key=lambda run: run[key], reverse=SORT_DESCENDING[key]),
        *(r for r in runs if r[key] is None),
    ]


def runs_table(runs: Sequence[Record], width: int) -> RenderableType:
    """A row a run, and a note for each with signs of trouble or without an end, for a terminal of so many columns."""
    table = _make_table()
    table.padding = (0, 1, 0, 0)
    for column in COLUMN_FORMATS:
        table.add_column(
            COLUMN_HEADINGS.get(column, column),
            justify="left" if column in ("name", "objective") else "right",
            no_wrap=column != "objective",
            max_width=32,
            overflow="fold",
        )
    for run in runs:
        shown = {**run, "name": _wrap_name(run["name"], max(MIN_NAME_WIDTH, width - OTHER_COLUMNS_WIDTH))}
        table.add_row(*(Text(_format_cell(shown[column], form)) for column, form in COLUMN_FORMATS.items()))
    notes = [
        f"{run['name']}: {', '.join([*([run['status']] if run['status'] != 'finished' else []), *run['signs']])}"
        for run in runs
        if run["status"] != "finished" or run["signs"]
    ]
    return Group(table, *(Text(sanitize_text(note), style="yellow") for note in notes))


def diff_runs(one: Path, other: Path) -> dict[str, Any]:
    """What differs between two runs: keys of their recipes, fingerprints, and the figures of both."""
    first, second = summarize_run(one), summarize_run(other)
    recipes = [
        _flatten(
            upgrade_stored_recipe(
                tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8")), keep_changed=True
            )
        )
        for folder in (one, other)
    ]
    facts = [_run_metadata(_read_json(each / "run.json")) for each in (one, other)]
    return {
        "runs": [first["name"], second["name"]],
        "recipe": dict(_differences(*recipes)),
        "data": dict(_differences(*facts)),
        "results": {
            name: [first[name], second[name]]
            for name in (*METRIC_KEYS, "accuracy_interval", "eval_pairs", "steps", "minutes", "signs")
        },
        "same_held_out_pairs": _is_equal(facts, "data.fingerprint_eval"),
    }


def run_diff_table(diff: Record) -> RenderableType:
    """Both runs side by side, what is equal left out but for the results."""
    table = _make_table()
    for heading in ("", *diff["runs"]):
        table.add_column(Text(sanitize_text(heading)), overflow="fold")
    for title in ("recipe", "data", "results"):
        table.add_row(Text(title, style="bold"), "", "")
        if not diff[title]:
            table.add_row(Text("  the same", style="dim"), "", "")
        for name, values in diff[title].items():
            table.add_row(Text(f"  {name}"), *(Text(_format_value(value)) for value in values))
    same = diff["same_held_out_pairs"]
    words = {
        True: "both were evaluated on the same held-out pairs",
        False: "they were evaluated on different held-out pairs: their figures cannot be compared",
        None: "it is not known whether both were evaluated on the same held-out pairs",
    }[same]
    return Group(table, Text(words, style="" if same else "yellow"))


def _run_metadata(run: Record) -> dict[str, Any]:
    """What a run was made of and with, by dotted names."""
    kept = {name: run.get(name) or {} for name in ("base", "data", "tokenizer", "versions", "device")}
    return {**_flatten(kept), "git_commit": run.get("git_commit")}


def _is_equal(facts: Sequence[Record], key: str) -> bool | None:
    both = [each.get(key) for each in facts]
    return None if None in both else both[0] == both[1]


def _differences(one: Record, other: Record) -> Iterator[tuple[str, list[Any]]]:
    for key in dict.fromkeys((*one, *other)):
        if one.get(key) != other.get(key):
            yield key, [one.get(key), other.get(key)]


def _flatten(tables: Record, start: str = "") -> dict[str, Any]:
    """Nested tables by dotted names."""
    found: dict[str, Any] = {}
    for name, value in tables.items():
        found |= _flatten(value, f"{start}{name}.") if isinstance(value, dict) and value else {f"{start}{name}": value}
    return found


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _read_evals(file: Path) -> list[dict[str, Any]]:
    """The evaluations of a run that has no results yet; a last line that is cut off is left out."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [
        record for record in (json.loads(line) for line in lines if line.endswith("\n")) if record["kind"] == "eval"
    ]


def _wrap_name(name: str, max_width: int) -> str:
    """A name in lines of at most so many letters, broken after an underscore, where a sweep's point has them."""
    lines = [""]
    for part in re.findall(r"[^_]*_|[^_]+", name):
        if lines[-1] and len(lines[-1] + part) > max_width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _format_cell(value: Any, form: str) -> str:
    return EMPTY_CELL if value is None else sanitize_text(form.format(value))


def _format_value(value: Any) -> str:
    match value:
        case None:
            return "absent"
        case float():
            return f"{value:.6g}"
        case list() | tuple():
            return ", ".join(map(_format_value, value)) or "none"
        case _:
            return sanitize_text(str(value))


def _make_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, header_style="", pad_edge=False, show_edge=False)
