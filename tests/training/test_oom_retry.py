"""A run that runs out of memory goes on in smaller rows, to the same adapter, or ends with a checkpoint and code 4."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from fork_server import run_forked
from peft import PeftModel

from qlora_dpo.errors import EXIT_DOES_NOT_FIT, DoesNotFitError
from qlora_dpo.manifest import find_damage
from qlora_dpo.model.decoder_layers import checkpointable_layers
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training import evaluate, train_step
from qlora_dpo.training.checkpoint import save
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.loop import train_loop

pytestmark = tiny_run.LIBRARIES_WARN

ROWS = 60
"""Tokens of a row: a few of the pairs, so that a step has several."""
Score = Callable[..., Any]


def train(
    folder: Path, resume: bool = False, rows: int = ROWS, said: list[str] | None = None, **tables: dict[str, Any]
) -> tuple[PeftModel, TrainState, list[dict[str, Any]], list[str]]:
    """Train the tiny model in `folder`: the model, the final state, the metrics, and what was `said` of memory."""
    own = {"learning_rate": 1e-2, "micro_batch_tokens": rows, **tables.pop("train", {})}
    what, told = tiny_run.recipe(train=own, **tables), [] if said is None else said
    folder.mkdir(exist_ok=True)
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder)
    newest = save.newest_valid(folder)[0] if resume else None

    with RunLog(folder, job.data_order.total_steps) as tracker, tiny_run.logged_sentences() as sentences:
        try:
            state = train_loop(model, job, tiny_run.start(job), tracker, newest)
        finally:
            told.extend(sentence for sentence in sentences if "out of memory" in sentence)
    return model, state, read_metrics(folder / METRICS), told


def fails_at(monkeypatch: pytest.MonkeyPatch, module: Any, *calls: int) -> list[int]:
    """Let a forward pass of `module` run out of memory at its n-th calls, counted from 1; the tokens of all calls."""
    whole, asked = module.score_batch, list[int]()

    def score(model: Any, batch: Any, *others: Any, **keys: Any) -> Any:
        asked.append(batch.tokens)
        found = whole(model, batch, *others, **keys)
        if len(asked) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    monkeypatch.setattr(module, "score_batch", score)
    return asked


LOSSES: list[dict[str, Any]] = [
    {},
    {"loss_type": "aot"},  # asks all pairs of a step twice
    {"loss_type": "beta_dpo"},  # has a running mean
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda each: each.get("loss_type", "sigmoid"))
def test_a_step_that_did_not_fit_is_redone_with_the_same_result(
    loss: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole_state, whole, _ = train(tmp_path / "whole", objective=loss)
    model, *_ = train(tmp_path / "half", rows=ROWS // 2, objective=loss)
    fails_at(monkeypatch, train_step, 2)
    again, state, metrics, said = train(tmp_path / "again", objective=loss)
    assert said == ["step 1: out of memory with rows of 60 tokens; rows of 30 from here on"]
    # from the first step on it was in rows of half the size, so to the bit it is the run that began with those
    assert tiny_run.all_apart(tiny_run.adapter(again), tiny_run.adapter(model)) == 0
    assert state.row_tokens == ROWS // 2
    assert (state.num_tokens, state.step) == (whole_state.num_tokens, whole_state.step)
    for one, other in zip(metrics, whole, strict=True):
        assert (one["kind"], one["step"]) == (other["kind"], other["step"])
        name = {"train": "loss", "eval": "eval_loss"}.get(one["kind"], "step")
        assert one[name] == pytest.approx(other[name], rel=1e-5)
    assert state.since_eval == whole_state.since_eval


def test_dropout_is_drawn_as_if_nothing_had_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"lora_dropout": 0.3}
    model, *_ = train(tmp_path / "half", rows=ROWS // 2, lora=lora)
    fails_at(monkeypatch, train_step, 1)
    again, *_ = train(tmp_path / "again", lora=lora)
    assert tiny_run.all_apart(tiny_run.adapter(again), tiny_run.adapter(model)) == 0


def test_four_times_in_a_row_end_the_run_with_a_checkpoint_that_goes_on(tmp_path: Path) -> None:
    folder, said = tmp_path / "run", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        asked = fails_at(patch, train_step, *range(3, 500))  # the first step has two
        with pytest.raises(DoesNotFitError) as error:
            train(folder, said=said)
    saved = folder / "checkpoints" / "step-000001"
    assert str(error.value) == (
        "step 2: out of memory 4 times in a row; lower train.micro_batch_tokens or data.max_length, or set "
        "train.gradient_checkpointing = true, and close other programs that hold memory; "
        f"{saved} is saved, and --resume goes on from there"
    )
    # what is announced is tried
    assert said == [
        "step 2: out of memory with rows of 60 tokens; rows of 30 from here on",
        "step 2: out of memory with rows of 30 tokens; rows of 15 from here on",
        "step 2: out of memory with rows of 15 tokens; rows of 7 from here on, and all layers recomputed",
    ]
    assert len(asked) == 2 + 4
    assert error.value.exit_code == EXIT_DOES_NOT_FIT
    assert find_damage(saved, required="state.json") == ""
    model, state, *_ = train(folder, resume=True)
    assert (state.step, state.row_tokens) == (3, ROWS // 16)
    other, *_ = train(tmp_path / "other")
    assert tiny_run.all_apart(tiny_run.adapter(model), tiny_run.adapter(other)) < 1e-4


@pytest.mark.parametrize(("asked", "recomputes"), [("auto", True), (False, False)])
def test_the_last_try_recomputes_all_layers_unless_the_recipe_says_otherwise(
    asked: Any, recomputes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, tables = {"lora_dropout": 0.3}, {"gradient_checkpointing": asked}
    other, *_ = train(tmp_path / "small", rows=ROWS // 8, lora=lora)
    fails_at(monkeypatch, train_step, 1, 2, 3)
    model, state, _, said = train(tmp_path / "run", lora=lora, train=tables)
    assert len(said) == 3
    assert said[-1].endswith("from here on, and all layers recomputed") == recomputes
    assert [layer.gradient_checkpointing for layer in checkpointable_layers(model)] == [recomputes] * 2
    assert (state.step, state.row_tokens) == (3, ROWS // 8)
    assert tiny_run.all_apart(tiny_run.adapter(model), tiny_run.adapter(other)) == 0


def test_an_evaluation_that_did_not_fit_is_redone_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"lora_dropout": 0.3}  # which an evaluation switches off
    _, _, whole, _ = train(tmp_path / "whole", rows=ROWS // 2, lora=lora)
    fails_at(monkeypatch, evaluate, 1)
    _, _, metrics, said = train(tmp_path / "again", lora=lora)
    assert said == ["evaluation after step 0: out of memory with rows of 60 tokens; rows of 30 from here on"]
    names = ("loss", "eval_loss", "eval_kl", "eval_rewards/accuracies")
    assert [[each.get(name) for name in names] for each in metrics] == [
        [each.get(name) for name in names] for each in whole
    ]


def test_another_error_is_no_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(train_step, "score_batch", score)
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        train(tmp_path / "run")


CAPPED = """
import resource, sys
from pathlib import Path
import tiny_run, logging, torch
logging.basicConfig(level=logging.INFO)
from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.training.context import PreferenceDataset
from qlora_dpo.training.loop import train_loop
from qlora_dpo.tracking.run_log import RunLog
from dataclasses import replace
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
def ids(count):
    return tuple(torch.randint(2, 200, (count,), generator=generator).tolist())
def pair(row):
    parts = ids(8), ids(500), ids(500)
    return EncodedPair(*parts, row, digest_ids(*parts))
pairs = [pair(row) for row in range(32)]
what = tiny_run.recipe(train={"batch_size": 16, "max_steps": 2, "micro_batch_tokens": 16_384})
folder = Path(sys.argv[1])
model = tiny_run.fresh(what)
job = tiny_run.job(model, what, folder, train=32)
job = replace(job, train=PreferenceDataset(pairs, torch.zeros(32, 2)))
with RunLog(folder, 2) as tracker:
    small = replace(job, packing=replace(job.packing, token_budget=600))
    train_loop(model, small, tiny_run.start(job), tracker)  # so that the threads and buffers of a first run are there
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[2]) * 2**20, resource.RLIM_INFINITY))
    state = train_loop(model, job, tiny_run.start(job), tracker)
print(state.step, state.row_tokens)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process may map")
def test_under_a_real_limit_of_memory_the_run_goes_on_in_smaller_rows(tmp_path: Path) -> None:
    path = f"{(Path(__file__).parents[1] / 'helpers')}:{Path(__file__).parents[2]}"
    done = run_forked(["-c", CAPPED, str(tmp_path), "70"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    steps, tokens = map(int, done.stdout.split())
    assert steps == 2
    assert tokens in (8_192, 4_096)
    assert "step 1: out of memory with rows of 16,384 tokens; rows of 8,192 from here on" in done.stderr
