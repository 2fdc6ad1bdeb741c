"""A run whose reference moves, stopped at any step, ends with the bytes of the run that never was; both of them."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from two_runs import train as whole_run

from qlora_dpo.errors import Interrupted, RunError
from qlora_dpo.manifest import write_manifest
from qlora_dpo.preference.reference_adapter import ReferenceAdapter, clone_adapter
from qlora_dpo.recipe.reference import EmaReference
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training.checkpoint.save import REFERENCE_FILE, newest_valid
from qlora_dpo.training.loop import train_loop

pytestmark = tiny_run.LIBRARIES_WARN

TABLES: dict[str, dict[str, Any]] = {
    "train": {"num_train_epochs": 5, "max_steps": 12, "save_steps": 100, "eval_steps": 4, "micro_batch_tokens": 60},
    "lora": {"lora_dropout": 0.1},
}


def train(folder: Path, steps: int, stop_at: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train in `folder` from its newest checkpoint or from the start: adapter and reference at the end."""
    AcceleratorState._reset_state(True)
    table = EmaReference(kind="ema", ref_model_mixup_alpha=0.6, ref_model_sync_steps=steps)
    what = tiny_run.recipe(**TABLES, reference=table.model_dump())
    folder.mkdir(exist_ok=True)
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder, heldout=2)
    weights = clone_adapter(model)
    job = replace(job, reference_adapter=ReferenceAdapter(weights, table))
    try:
        newest = newest_valid(folder)[0]
    except RunError:
        newest = None
        torch.manual_seed(1)
    with RunLog(folder, job.data_order.total_steps) as tracker:
        said = tracker.step

        def step(number: int) -> None:
            said(number)
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        tracker.step = step  # type: ignore[method-assign]
        train_loop(model, job, tiny_run.start(job), tracker, newest)
    return tiny_run.adapter(model), weights


def same(found: dict[str, Tensor], whole: dict[str, Tensor]) -> bool:
    return found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("steps", [1, 3])
def test_stopped_after_any_step_policy_and_reference_end_with_the_same_bytes(steps: int, tmp_path: Path) -> None:
    adapter, reference = train(tmp_path / "whole", steps)
    evals = [_untimed(line) for line in read_metrics(tmp_path / "whole" / METRICS) if line["kind"] == "eval"]
    assert not same(reference, adapter)
    for stop_at in (1, 3, 7, 11):
        folder = tmp_path / f"stopped-{stop_at}"
        with pytest.raises(Interrupted):
            train(folder, steps, stop_at)
        (checkpoint,) = (folder / "checkpoints").iterdir()
        assert (checkpoint / REFERENCE_FILE).is_file()
        again = train(folder, steps)
        assert same(again[0], adapter)
        assert same(again[1], reference)
        last = [_untimed(line) for line in read_metrics(folder / METRICS) if line["kind"] == "eval"][-1]
        assert last == evals[-1]


def test_a_checkpoint_without_its_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, 1, stop_at=2)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    (checkpoint / REFERENCE_FILE).unlink()
    with pytest.raises(RunError, match=r"reference\.safetensors is missing"):
        newest_valid(tmp_path)
    write_manifest(checkpoint, [file for file in checkpoint.iterdir() if file.name != "manifest.json"])
    with pytest.raises(RunError) as error:
        train(tmp_path, 1)
    assert str(error.value) == (
        f"{checkpoint}: holds no reference of this adapter's shape; put [reference] and [lora] back"
    )


def test_a_reference_that_stays_is_in_no_checkpoint(tmp_path: Path) -> None:
    whole_run(tmp_path / "run", train={"save_steps": 1})
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert not (checkpoint / REFERENCE_FILE).exists()


def test_a_run_beside_another_adapter_than_before_is_refused(tmp_path: Path) -> None:
    whole_run(tmp_path / "sft", objective={"loss_type": "sft"})
    tables = {"reference": {"kind": "adapter", "path": str(tmp_path / "sft")}}
    whole_run(tmp_path / "dpo", **tables, train={"save_steps": 1})
    checkpoint = newest_valid(tmp_path / "dpo")[0]
    assert len(json.loads((checkpoint / "state.json").read_text())["fingerprints"]) == 7
    again = whole_run(tmp_path / "dpo", checkpoint, **tables, train={"save_steps": 1})
    assert again.state.step == 2
    whole_run(tmp_path / "other", objective={"loss_type": "sft"}, train={"seed": 7})
    for file in (tmp_path / "other").iterdir():
        if file.is_file():
            (tmp_path / "sft" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RunError) as error:
        whole_run(tmp_path / "dpo", checkpoint, **tables, train={"save_steps": 1})
    assert str(error.value) == (
        f"{checkpoint}: belongs to another run; changed since: the adapter that training starts from; the reference's "
        "weights; put it back, or go on with --allow init_from --allow reference"
    )


def test_a_run_that_goes_on_beside_a_frozen_adapter_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole_run(tmp_path / "sft", objective={"loss_type": "sft"})
    tables: dict[str, Any] = {"reference": {"kind": "adapter", "path": str(tmp_path / "sft")}}
    tables["train"] = {"save_steps": 1, "num_train_epochs": 2, "max_steps": 3}
    whole_run(tmp_path / "dpo", **tables)
    end = load_file(tmp_path / "dpo" / "adapter_model.safetensors")
    checkpoint = min((tmp_path / "dpo" / "checkpoints").iterdir())
    assert checkpoint.name == "step-000001"
    whole_run(tmp_path / "dpo", checkpoint, **tables)
    assert same(load_file(tmp_path / "dpo" / "adapter_model.safetensors"), end)


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds"}
