"""Whole runs on the tiny model, from files to a saved adapter, that a second run can go on from or compare with."""

import json
from pathlib import Path
from typing import Any

import tiny_run
from accelerate.state import AcceleratorState

from qlora_dpo import adapter, run_folder
from qlora_dpo.files import write_json
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.recipe import LoadedRecipe
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training.prepare import prepare_data
from qlora_dpo.training.run import RunHooks, RunOptions, TrainingResult, train_prepared
from qlora_dpo.training.run_metadata import build_run_metadata

LN_2 = 0.6931471805599453


def recipe(home: Path, **tables: dict[str, Any]) -> Recipe:
    """A recipe for eight training and four held-out pairs of text, written into `home`; `tables` are laid over it."""
    for name, count, verb in (("train", 8, "cook"), ("eval", 4, "find")):
        rows = [
            {"prompt": f"How do I {verb} {n} birds?", "chosen": f"Ask {n} people.", "rejected": f"Wait {n} minutes."}
            for n in range(count)
        ]
        (home / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    data = {"train": str(home / "train.jsonl"), "eval": str(home / "eval.jsonl"), "max_length": 200}
    values = tiny_run.recipe(train={"learning_rate": 1e-2, "max_steps": 2}).model_dump(exclude_none=True)
    values |= {"data": data, "objective": {}}  # another loss has other keys
    for name, keys in tables.items():
        values[name] = {**values.get(name, {}), **keys}
    return Recipe.model_validate(values)


def train(folder: Path, resume_from: Path | None = None, **tables: dict[str, Any]) -> TrainingResult:
    """Train into `folder` and save the adapter there, as the command does."""
    AcceleratorState._reset_state(True)
    what = recipe(folder.parent, **tables)
    if resume_from is None:
        run_folder.init_run_folder(
            folder, LoadedRecipe(what, folder.with_suffix(".toml"), "# the recipe\n"), resume=False
        )
    prepared = prepare_data(what)
    with RunLog(folder, 2) as tracker:
        outcome = train_prepared(prepared, tiny_run.CPU, tracker, RunOptions(), RunHooks(), resume_from)
    adapter.save_adapter(folder, outcome.model, prepared.tokenizer, prepared.source)
    write_json(folder / "run.json", build_run_metadata(outcome, what, tiny_run.CPU, folder, "qlora-dpo train"))
    return outcome


def trained_lines(folder: Path) -> list[dict[str, Any]]:
    """The logged training steps of a run."""
    return [line for line in read_metrics(folder / METRICS) if line["kind"] == "train"]
