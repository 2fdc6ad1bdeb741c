"""In fp16 the first step finds the loss scale at which its gradient is finite, and is then what it is at that scale."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel

from qlora_dpo.errors import RunError
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training import loop
from qlora_dpo.training.checkpoint import save
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.context import TrainContext
from qlora_dpo.training.loop import train_loop
from qlora_dpo.training.train_step import StepResult

pytestmark = tiny_run.LIBRARIES_WARN

FP16 = replace(tiny_run.CPU, compute_dtype="fp16")
"""A CPU that computes in fp16, which is slow and as exact as a GPU."""
STEEP: dict[str, dict[str, Any]] = {
    "objective": {"loss_type": "sppo_hard", "beta": 0.01},
    "train": {"max_steps": 3, "micro_batch_tokens": 60, "save_steps": 1},
    "lora": {"lora_dropout": 0.3},
}
FIRST = 2.0**16


@pytest.fixture(autouse=True)
def without_traces() -> Iterator[None]:
    """What a module's fixtures train after these tests is no longer in fp16."""
    yield
    AcceleratorState._reset_state(True)


def scaling(monkeypatch: pytest.MonkeyPatch, first: float = FIRST) -> None:
    """Let gradients be scaled, from a `first` scale on."""
    monkeypatch.setattr(loop, "Accelerator", tiny_run.scaling(first))


def train(
    folder: Path, resume: bool = False, **tables: dict[str, Any]
) -> tuple[PeftModel, TrainState, list[str], TrainContext]:
    """Train the tiny model in fp16 in `folder`: the model, the final state, what was said of scales, and the job."""
    AcceleratorState._reset_state(True)
    what = tiny_run.recipe(**{**STEEP, **tables})
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)  # for dropout
    model, said = tiny_run.fresh(what, FP16), list[str]()
    job = tiny_run.job(model, what, folder, train=12, place=FP16)
    newest = save.newest_valid(folder)[0] if resume else None
    with RunLog(folder, job.data_order.total_steps) as tracker, tiny_run.logged_sentences(said):
        state = train_loop(model, job, tiny_run.start(job), tracker, newest)
    return model, state, [each for each in said if "was computed" in each], job


def logged(folder: Path) -> list[dict[str, Any]]:
    """All that was logged, without what a clock gave."""
    clock = ("seconds", "pairs_per_second", "tokens_per_second", "memory_bytes")
    return [
        {name: value for name, value in each.items() if name not in clock} for each in read_metrics(folder / METRICS)
    ]


def test_a_scale_at_which_the_first_gradient_overflows_is_halved_and_the_step_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling(monkeypatch)
    model, state, said, _ = train(tmp_path / "searched")
    found = state.scaler["scale"]
    assert found < FIRST / 2**5  # more halvings than skipped steps are let pass
    halvings = torch.tensor(FIRST / found).log2().int().item()
    assert said == [
        f"step 1 was computed {halvings + 1} times, since its gradient overflows fp16 at loss scales above {found:,.0f}"
    ]
    assert (state.step, state.skipped_steps) == (3, 0)
    scaling(monkeypatch, found)
    other, begun, unsaid, _ = train(tmp_path / "known")
    assert unsaid == []
    assert tiny_run.all_apart(tiny_run.adapter(model), tiny_run.adapter(other)) == 0
    assert logged(tmp_path / "searched") == logged(tmp_path / "known")
    assert (state.num_tokens, state.first_step_grad, state.since_eval) == (
        begun.num_tokens,
        begun.first_step_grad,
        begun.since_eval,
    )


def test_twice_that_scale_overflows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling(monkeypatch)
    found = train(tmp_path / "searched")[1].scaler["scale"]
    scaling(monkeypatch, 2 * found)
    _, state, said, _ = train(tmp_path / "twice")
    assert state.scaler["scale"] == found
    assert said == [f"step 1 was computed 2 times, since its gradient overflows fp16 at loss scales above {found:,.0f}"]


def test_a_checkpoint_keeps_the_scale_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling(monkeypatch)
    tables = {**STEEP["train"], "max_steps": 2}
    whole, state, *_ = train(tmp_path / "whole")
    train(tmp_path / "half", train=tables)
    resumed, again, said, _ = train(tmp_path / "half", resume=True)
    assert said == []
    assert again.scaler["scale"] == state.scaler["scale"]
    assert tiny_run.all_apart(tiny_run.adapter(resumed), tiny_run.adapter(whole)) == 0


def test_a_gradient_that_overflows_at_every_scale_ends_the_run_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling(monkeypatch)
    with pytest.raises(RunError) as error:
        train(tmp_path / "run", objective={"loss_type": "sppo_hard", "beta": 1e-7})
    assert str(error.value) == (
        "step 1: the gradient overflows fp16 at every loss scale down to 1, so nothing was changed; set "
        'model.dtype = "fp32", or take a card with bf16 (compute capability 8.0 or newer)'
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_first_loss_that_is_not_finite_is_refused_at_once_whatever_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling(monkeypatch)
    asked = list[int]()
    whole = loop.accumulate_gradients

    def gradient(model: PeftModel, job: TrainContext, *others: Any) -> StepResult:
        pair = job.data_order.batch_indices(1)[2]
        job.train.reference_P2[pair, 0] = float("inf")
        asked.append(job.train.pairs[pair].row)
        return whole(model, job, *others)

    monkeypatch.setattr(loop, "accumulate_gradients", gradient)
    with pytest.raises(RunError) as error:
        train(tmp_path / "run")
    (row,) = asked  # computed once
    assert str(error.value).startswith(f"step 1: the loss of row {row} is not finite, so nothing was changed; ")


def test_after_the_first_step_an_overflow_is_skipped_and_five_in_a_row_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling(monkeypatch, 1.0)
    whole = loop.accumulate_gradients

    def gradient(model: PeftModel, job: TrainContext, state: TrainState, *others: Any) -> StepResult:
        result = whole(model, job, state, *others)
        if state.step:
            next(iter(loop.trainable_parameters(model).values())).grad[0, 0] = float("inf")
        return result

    monkeypatch.setattr(loop, "accumulate_gradients", gradient)
    with pytest.raises(RunError) as error:
        train(tmp_path / "run", train={**STEEP["train"], "max_steps": 9, "num_train_epochs": 5})
    assert str(error.value).startswith("step 6: ")
    assert str(error.value).endswith("; 5 steps in a row were skipped")
