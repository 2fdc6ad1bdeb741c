"""A step that takes long is left between two micro-batches: the checkpoint is of the step before, the end the same."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from qlora_dpo.errors import Interrupted, RunError
from qlora_dpo.preference.pack import micro_batches
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training import train_step as steps
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.loop import train_loop

pytestmark = tiny_run.LIBRARIES_WARN

TABLES: dict[str, dict[str, Any]] = {
    "train": {"batch_size": 10, "num_train_epochs": 4, "save_steps": 100, "eval_steps": 100, "micro_batch_tokens": 60},
    "lora": {"lora_dropout": 0.1},
}


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int = 0, **tables: Any) -> dict[str, Tensor]:
    """Train in `folder` from its newest checkpoint or from the start; SIGTERM comes in forward pass `stop_at`."""
    AcceleratorState._reset_state(True)
    what = tiny_run.recipe(**TABLES, **tables)
    folder.mkdir(exist_ok=True)
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder, heldout=2)
    passes, whole = 0, steps.score_batch

    def score(*arguments: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, **named)

    try:
        newest = newest_valid(folder)[0]
    except RunError:
        newest = None
        torch.manual_seed(1)
    with RunLog(folder, job.data_order.total_steps) as tracker, monkeypatch.context() as patched:
        patched.setattr(steps, "score_batch", score)
        train_loop(model, job, tiny_run.start(job), tracker, newest)
    return tiny_run.adapter(model)


ROWS = len(micro_batches(tiny_run.pairs(10), replace(tiny_run.PACKED, token_budget=60)))


@pytest.mark.parametrize(
    ("objective", "stop_at", "saved", "left"),
    [
        ({}, 1, 0, True),
        ({}, ROWS + 2, 1, True),
        ({}, 2 * ROWS - 1, 2, False),  # one row is left, so the step is finished
        # a loss that compares pairs passes over them twice
        ({"loss_type": "beta_dpo"}, 2 * ROWS + 2, 1, True),
        ({"loss_type": "beta_dpo"}, 3 * ROWS + 1, 1, True),
    ],
)
def test_a_step_that_was_left_is_done_anew_with_the_same_bytes(
    objective: dict[str, Any], stop_at: int, saved: int, left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"objective": objective} if objective else {}
    whole = train(tmp_path / "whole", monkeypatch, **tables)
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted) as error:
        train(folder, monkeypatch, stop_at, **tables)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{saved:06d}"
    where = f"within step {saved + 1}, which begins anew" if left else f"after step {saved} as asked"
    assert str(error.value) == f"stopped {where}; {checkpoint} is saved, --resume goes on from there"
    again = train(folder, monkeypatch, **tables)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_rows_are_left_over_in_these_steps() -> None:
    assert ROWS >= 4
