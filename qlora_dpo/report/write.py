"""Writes what people read of a run, from the files that the run left: model card, plots and report.html."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from pydantic import ValidationError

from qlora_dpo.errors import RunError
from qlora_dpo.files import atomic_write
from qlora_dpo.recipe.recipe import read_stored_recipe
from qlora_dpo.report.card import model_card
from qlora_dpo.report.plots import draw_plots
from qlora_dpo.report.run_page import render_run_page
from qlora_dpo.report.tables import epoch_table

REQUIRED_FILES = ("run.json", "results.json", "metrics.jsonl", "resolved.toml")


def write_report(folder: Path, base: Path | None) -> list[Path]:
    """Write README.md, plots/ and report.html of a finished run; returns their paths.

    `base` is the folder of its base model, which may say under which licence it stands. Raises RunError if the run
    left less than a finished one does, or something damaged.
    """
    if missing := [name for name in REQUIRED_FILES if not (folder / name).is_file()]:
        raise RunError(f"{folder}: has no {missing[0]}, which a finished run leaves; name the folder of a finished run")
    try:
        run, results = (_read_json(folder / name) for name in ("run.json", "results.json"))
        records, samples = (_read_json_lines(folder / name) for name in ("metrics.jsonl", "samples.jsonl"))
        resolved = tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8"))
        objective = read_stored_recipe(resolved).objective.model_dump(exclude_none=True)
        recipe = folder / "recipe.toml"
        text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
        plots = draw_plots(records, results)
        card = model_card(
            run, results, samples, epoch_table(records), text, objective, base_licence(base) if base else None
        )
        page = render_run_page(run, results, samples, records, text, objective, plots)
    except (ValueError, KeyError, TypeError, StopIteration, ValidationError) as error:
        raise RunError(
            f"{folder}: its files do not fit together or are damaged ({type(error).__name__}: {str(error)[:60]}); take "
            "them from a backup"
        ) from error
    written = {folder / "README.md": card.encode(), folder / "report.html": page.encode()}
    for plot in plots:
        written |= {folder / "plots" / f"{plot.name}.svg": plot.svg, folder / "plots" / f"{plot.name}.png": plot.png}
    for path, content in written.items():
        atomic_write(path, content)
    return list(written)


def base_licence(folder: Path) -> str | None:
    """The licence that the model card in a base model's folder names, if there is one."""
    try:
        found = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except Exception:  # no card, or one whose metadata are no YAML, of which its reader has errors of its own
        return None
    return found if isinstance(found, str) else None


def _read_json(file: Path) -> Mapping[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; a last line that was cut off is left out, and no file has none."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [dict(json.loads(line)) for line in lines if line.endswith("\n") and line.strip()]
