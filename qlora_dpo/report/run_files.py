"""Reads the files that a run leaves in its folder."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.recipe.recipe import read_stored_recipe
from qlora_dpo.run_folder import METRICS, Record


@dataclass(frozen=True)
class RunFiles:
    """What a finished run logged, as far as its report shows it."""

    run: Record
    """run.json."""
    results: Record
    """results.json."""
    samples: Sequence[Record]
    """samples.jsonl."""
    records: Sequence[Record]
    """metrics.jsonl."""
    recipe_text: str
    """recipe.toml as it was written; empty if there is none."""
    objective: Record
    """The recipe's table with every default."""


def read_run_files(folder: Path) -> RunFiles:
    """Read the files of a finished run; raises ValueError, KeyError or TypeError if one is damaged."""
    recipe = folder / "recipe.toml"
    resolved = tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8"))
    return RunFiles(
        run=read_json(folder / "run.json"),
        results=read_json(folder / "results.json"),
        samples=read_json_lines(folder / "samples.jsonl"),
        records=read_json_lines(folder / METRICS),
        recipe_text=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        objective=read_stored_recipe(resolved).objective.model_dump(exclude_none=True),
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file, without a last line that was cut off; empty if there is no such file."""
    if not file.is_file():
        return []
    # a line that was cut off is the last one, without its end; only "\n" ends a line, not the U+2028 of a text
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [dict(json.loads(line)) for line in lines if line.strip()]
