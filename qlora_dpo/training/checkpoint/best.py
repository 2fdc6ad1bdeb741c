"""The best evaluation so far, early stopping, and the adapter of the best evaluation on disk."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_dpo.errors import RunError
from qlora_dpo.files import atomic_folder, check_disk_space, write_json
from qlora_dpo.manifest import write_manifest
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.recipe.train import LOWER_IS_BETTER, MetricName, TrainTable
from qlora_dpo.training.checkpoint.integrity import STATE_FILE, best_adapter_damage, best_adapter_dir

ADAPTER_FILE = "adapter.safetensors"


def metric_to_minimize(record: dict[str, Any], metric: MetricName) -> float:
    """The metric of one evaluation, negated if higher is better; raises RunError if the record lacks it."""
    found = record.get(f"eval_{metric}")
    if found is None:
        known = ", ".join(name.removeprefix("eval_") for name in record if name.startswith("eval_"))
        raise RunError(f'train.metric_for_best_model = "{metric}" is not measured in this run; it has {known}')
    return float(found) if metric in LOWER_IS_BETTER else -float(found)


def best_step(evals: Sequence[dict[str, Any]], metric: MetricName) -> int:
    """The step of the best evaluation, the first one of several equals."""
    step: int = min(evals, key=lambda record: metric_to_minimize(record, metric))["step"]
    return step


def out_of_patience(evals: Sequence[dict[str, Any]], table: TrainTable) -> bool:
    """True if as many evaluations in a row as `early_stopping_patience` were no better than the best one before.

    Better means by more than `early_stopping_threshold`, as transformers' EarlyStoppingCallback has it.
    """
    if table.early_stopping_patience is None:
        return False
    lowest, waited = float("inf"), 0
    for record in evals:
        now = metric_to_minimize(record, table.metric_for_best_model)
        better = lowest - now > table.early_stopping_threshold
        lowest, waited = min(lowest, now), 0 if better else waited + 1
    return waited >= table.early_stopping_patience


def save_best(run_dir: Path, step: int, model: nn.Module) -> None:
    """Save the adapter as it is after `step`. Raises SourceError if the disk has no space for it."""
    folder = best_adapter_dir(run_dir, step)
    tensors = {name: each.detach().cpu().contiguous() for name, each in trainable_parameters(model).items()}
    check_disk_space(folder, sum(tensor.nbytes for tensor in tensors.values()))
    if folder.exists():  # a resumed run comes by here again
        shutil.rmtree(folder)
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / ADAPTER_FILE)
        write_json(temporary / STATE_FILE, {"step": step})
        write_manifest(temporary, temporary.iterdir())


def load_best(run_dir: Path, step: int, model: nn.Module) -> None:
    """Load the adapter of the best evaluation into `model`; raises RunError if it is damaged."""
    folder, parameters = best_adapter_dir(run_dir, step), trainable_parameters(model)
    if damaged := best_adapter_damage(run_dir, step):
        raise RunError(f"{folder}: is damaged: {damaged}; go on from the newest checkpoint with --resume")
    with torch.no_grad():
        for name, tensor in load_file(folder / ADAPTER_FILE).items():
            parameters[name].copy_(tensor)


def prune_best(home: Path, checkpoints: Sequence[Path], current: int | None) -> None:
    """Remove the best adapters that neither a remaining checkpoint nor the run itself refers to."""
    steps = {json.loads((folder / "state.json").read_text()).get("best") for folder in checkpoints} | {current}
    needed = {f"best-{step:06d}" for step in steps if step is not None}
    for folder in {*home.glob("best-*"), *home.glob(".best-*")}:
        if folder.name not in needed:
            shutil.rmtree(folder, ignore_errors=True)
