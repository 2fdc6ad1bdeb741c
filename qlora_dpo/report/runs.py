"""Lists runs with their figures, and compares two of them: recipes, data, results. Needs no torch."""

import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import RunError
from qlora_dpo.recipe.former_keys import upgrade_stored_recipe
from qlora_dpo.report.objective_names import describe_objective
from qlora_dpo.report.run_files import read_json, read_json_lines
from qlora_dpo.report.tables import MISSING_CELL, make_table
from qlora_dpo.run_folder import METRICS, Record
from qlora_dpo.wilson import wilson_interval

SORT_DESCENDING = {
    "finished": False,
    "name": False,
    "loss": False,
    "accuracy": True,
    "margin": True,
    "kl": False,
    "minutes": False,
}
"""Keys that runs can be sorted by; True where the highest value comes first."""
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
"""Headings shorter than the column's name: every character they save goes to the name and the objective."""
OTHER_COLUMNS_WIDTH, MIN_NAME_WIDTH = 72, 12
"""Characters that all columns but the name take, and the least that the name gets in a narrow terminal."""


def find_runs(home: Path) -> list[Path]:
    """The folders in `home` that hold a run, sorted by name, including runs in progress and killed ones."""
    return sorted(file.parent for file in home.glob("*/resolved.toml"))


def summarize_run(folder: Path) -> dict[str, Any]:
    """The main figures of a run, at the evaluation that its adapter was saved at, or at the last one.

    Raises RunError if one of its files is damaged.
    """
    try:
        recipe = upgrade_stored_recipe(tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8")))
        run, results = (read_json(folder / name) for name in ("run.json", "results.json"))
        evals = results.get("evals") or _read_evals(folder)
        by_step = {record["step"]: record for record in evals}
        shown = by_step.get(run.get("adapter_step"), evals[-1] if evals else {})
        accuracy, pairs = shown.get(METRIC_KEYS["accuracy"]), shown.get("eval_pairs")
        seconds = (run.get("seconds") or {}).get("total")
        _check_numbers(
            recipe["train"]["learning_rate"], seconds, run.get("steps"), *map(shown.get, METRIC_KEYS.values())
        )
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
            "accuracy_interval": wilson_interval(accuracy * pairs, pairs) if accuracy is not None and pairs else None,
            "minutes": None if seconds is None else round(seconds / 60, 2),
            "signs": [sign["name"] for sign in results.get("signs") or []],
        }
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror}); look at the permissions of its files") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{folder}: is damaged ({type(error).__name__}: {str(error)[:60]}); take it from a backup"
        ) from error


def _check_numbers(*values: object) -> None:
    """Raise TypeError for a figure that is neither a number nor missing."""
    for value in values:
        if value is not None and not isinstance(value, int | float):
            raise TypeError(f"{value!r} is no number")


def sort_runs(runs: Sequence[Record], key: str) -> list[Record]:
    """Runs sorted by `key`, the best first; runs without a value for it come last."""
    present = [run for run in runs if run[key] is not None]
    return [
        *sorted(present, key=lambda run: run[key], reverse=SORT_DESCENDING[key]),
        *(run for run in runs if run[key] is None),
    ]


def runs_table(runs: Sequence[Record], width: int) -> RenderableType:
    """One row per run for a terminal of `width` characters, and a note for each run with warnings or unfinished."""
    table = make_table()
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


def _stored_recipe(folder: Path) -> dict[str, Any]:
    """resolved.toml with the names of this version; removed keys that were changed stay, since they are differences."""
    values = tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8"))
    return upgrade_stored_recipe(values, keep_changed=True)


def diff_runs(one: Path, other: Path) -> dict[str, Any]:
    """Differences between two runs: keys of their recipes, fingerprints, and the figures of both."""
    first, second = summarize_run(one), summarize_run(other)
    recipes = [_flatten(_stored_recipe(folder)) for folder in (one, other)]
    metadata = [_run_metadata(read_json(folder / "run.json")) for folder in (one, other)]
    return {
        "runs": [first["name"], second["name"]],
        "recipe": dict(_differences(*recipes)),
        "data": dict(_differences(*metadata)),
        "results": {
            name: [first[name], second[name]]
            for name in (*METRIC_KEYS, "accuracy_interval", "eval_pairs", "steps", "minutes", "signs")
        },
        "same_held_out_pairs": _is_equal(metadata, "data.fingerprint_eval"),
    }


def run_diff_table(diff: Record) -> RenderableType:
    """Both runs side by side: what differs in recipe and data, and all results."""
    table = make_table()
    for heading in ("", *diff["runs"]):
        table.add_column(Text(sanitize_text(heading)), overflow="fold")
    for title in ("recipe", "data", "results"):
        table.add_row(Text(title, style="bold"), "", "")
        if not diff[title]:
            table.add_row(Text("  the same", style="dim"), "", "")
        for name, values in diff[title].items():
            table.add_row(Text(f"  {name}"), *(Text(_format_value(value)) for value in values))
    same = diff["same_held_out_pairs"]
    note = {
        True: "both were evaluated on the same held-out pairs",
        False: "they were evaluated on different held-out pairs: their figures cannot be compared",
        None: "it is not known whether both were evaluated on the same held-out pairs",
    }[same]
    return Group(table, Text(note, style="" if same else "yellow"))


def _run_metadata(run: Record) -> dict[str, Any]:
    """Base, data, tokenizer, versions, device and git commit of a run, by dotted names."""
    tables = {name: run.get(name) or {} for name in ("base", "data", "tokenizer", "versions", "device")}
    return {**_flatten(tables), "git_commit": run.get("git_commit")}


def _is_equal(metadata: Sequence[Record], key: str) -> bool | None:
    """Whether both runs have the same value; None if one of them has none."""
    values = [table.get(key) for table in metadata]
    return None if None in values else values[0] == values[1]


def _differences(one: Record, other: Record) -> Iterator[tuple[str, list[Any]]]:
    for key in dict.fromkeys((*one, *other)):
        if one.get(key) != other.get(key):
            yield key, [one.get(key), other.get(key)]


def _flatten(tables: Record, prefix: str = "") -> dict[str, Any]:
    """Values of nested tables by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        is_table = isinstance(value, dict) and value
        flat |= _flatten(value, f"{prefix}{name}.") if is_table else {f"{prefix}{name}": value}
    return flat


def _read_evals(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run that has no results yet."""
    return [record for record in read_json_lines(folder / METRICS) if record["kind"] == "eval"]


def _wrap_name(name: str, max_width: int) -> str:
    """`name` in lines of up to `max_width` characters, broken after underscores, which separate a sweep's values."""
    lines = [""]
    for part in re.findall(r"[^_]*_|[^_]+", name):
        if lines[-1] and len(lines[-1] + part) > max_width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _format_cell(value: Any, form: str) -> str:
    return MISSING_CELL if value is None else sanitize_text(form.format(value))


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
