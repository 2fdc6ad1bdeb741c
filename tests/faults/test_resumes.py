"""However often and wherever a run is killed or stopped, it ends with the bytes of the run that never was."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from file_faults import forked
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_dpo.errors import Interrupted, RunError
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.loop import train_loop

pytestmark = tiny_run.LIBRARIES_WARN

# ten pairs in steps of 4, 4 and 2: epochs end within the run, and rows of 60 tokens make several micro-batches a step
TABLES: dict[str, dict[str, Any]] = {
    "train": {
        "num_train_epochs": 7,
        "max_steps": 20,
        "save_steps": 1,
        "eval_steps": 100,
        "micro_batch_tokens": 60,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
    },
    "lora": {"lora_dropout": 0.1},
}


def train(folder: Path, stop_at: int | None = None, **changes: Any) -> dict[str, Tensor]:
    """Train in `folder` from its newest checkpoint or from the start; the adapter at the end."""
    AcceleratorState._reset_state(True)
    what = tiny_run.recipe(**{**TABLES, "train": {**TABLES["train"], **changes}})
    folder.mkdir(exist_ok=True)
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder, heldout=2)
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
    return tiny_run.adapter(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The adapter of the run that was never stopped."""
    return train(tmp_path_factory.mktemp("whole") / "run")


def same(found: dict[str, Tensor], whole: dict[str, Tensor]) -> bool:
    return found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step in (1, 3, 11) else pytest.mark.slow) for step in range(1, 20)]
)
def test_stopped_after_any_step_a_run_ends_with_the_same_bytes(
    step: int, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path / "run", stop_at=step, save_steps=100)
    assert same(train(tmp_path / "run", save_steps=100), whole)


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_ends_with_the_same_bytes(
    kills: int, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    draw = random.Random(0)
    done, runs, started = 0, 0, time.monotonic()
    train(tmp_path / "timed")
    seconds = time.monotonic() - started
    while done < kills:
        folder = tmp_path / f"run-{runs}"
        limit = seconds / 3
        while (code := _child(folder, draw.uniform(0.05, limit))) == -signal.SIGKILL:
            done += 1
            limit += seconds / 9  # on a busy machine a third may end before the first checkpoint, again and again
        assert code == 0
        assert same(load_file(folder / "end.safetensors"), whole), (runs, done)
        runs += 1
    print(f"{done} kills in {runs} runs, all with the same bytes")


def _child(folder: Path, seconds: float) -> int:
    """Train in a process of its own, which is killed after so many seconds if it has not ended; its exit code."""
    pid = forked()
    if not pid:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 2)
            save_file(train(folder), folder / "end.safetensors")
        except BaseException:
            os._exit(77)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
