"""A run keeps the adapter of its best evaluation, and stops when it has waited long enough for a better one."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from cli_sandbox import HH, Workplace
from peft import PeftModel
from safetensors.torch import load_file

from qlora_dpo.errors import Interrupted, RunError
from qlora_dpo.recipe.train import TrainTable
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training.checkpoint.best import best_step, load_best, out_of_patience
from qlora_dpo.training.checkpoint.integrity import best_adapter_dir
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.loop import train_loop

pytestmark = tiny_run.LIBRARIES_WARN

TRAIN = {
    "num_train_epochs": 6,
    "learning_rate": 2e-2,
    "lr_scheduler_type": "constant",
    "load_best_model_at_end": True,
    "save_steps": 1,
}
"""Ten random pairs of which nothing can be learned for others: the held-out loss rises sooner or later."""


def train(
    folder: Path, stop_at: int | None = None, resume: Path | None = None, **changes: Any
) -> tuple[Any, TrainState]:
    """Train in `folder`; with `stop_at`, Ctrl-C comes while that step ends."""
    what = tiny_run.recipe(train={**TRAIN, **changes}, lora={"lora_alpha": 64})
    folder.mkdir(exist_ok=True)
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder)
    with RunLog(folder, job.data_order.total_steps) as tracker:
        said = tracker.step

        def step(number: int) -> None:
            said(number)
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        tracker.step = step  # type: ignore[method-assign]
        state = train_loop(model, job, tiny_run.start(job), tracker, resume)
    return model, state


def evals(*losses: float, **more: list[float]) -> list[dict[str, Any]]:
    """Evaluations after every tenth step."""
    return [
        {"step": 10 * i, "eval_loss": loss, **{name: values[i] for name, values in more.items()}}
        for i, loss in enumerate(losses)
    ]


def test_the_best_is_the_lowest_loss_and_the_highest_accuracy() -> None:
    records = evals(0.69, 0.5, 0.6, 0.5, **{"eval_rewards/accuracies": [0.5, 0.7, 0.8, 0.8]})
    assert best_step(records, "loss") == 10
    assert best_step(records, "rewards/accuracies") == 20


def test_patience_is_counted_as_transformers_counts_it() -> None:
    def ends(*losses: float) -> bool:
        return out_of_patience(evals(*losses), TrainTable(early_stopping_patience=2))

    assert not ends(0.69, 0.6, 0.65)
    assert ends(0.69, 0.6, 0.65, 0.6)  # as good is no better
    assert not ends(0.69, 0.6, 0.65, 0.59)
    assert not ends(0.69, 0.6, 0.65, 0.59, 0.7)
    assert ends(0.69, 0.6, 0.65, 0.62)  # better than the one before, but not than the best one
    assert not out_of_patience(evals(0.1, 0.2, 0.3, 0.4), TrainTable())


def test_a_metric_that_a_run_does_not_measure_is_named_with_those_it_does() -> None:
    with pytest.raises(RunError) as error:
        best_step(evals(0.69, 0.5), "sft_loss")
    assert str(error.value) == ('train.metric_for_best_model = "sft_loss" is not measured in this run; it has loss')


def test_the_prefix_of_transformers_names_is_taken_off() -> None:
    assert TrainTable(metric_for_best_model="eval_rewards/margins").metric_for_best_model == "rewards/margins"  # type: ignore[arg-type]


def test_the_best_adapter_is_kept_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model, state = train(tmp_path)
    assert state.best is not None
    assert 0 < state.best < state.step == 18
    assert state.best == min(state.evals, key=lambda record: record["eval_loss"])["step"]
    AcceleratorState._reset_state(True)
    (tmp_path / "shorter").mkdir()
    with pytest.raises(Interrupted):
        train(tmp_path / "shorter", stop_at=state.best)
    expected = load_file(tmp_path / "shorter" / "checkpoints" / f"step-{state.best:06d}" / "adapter.safetensors")
    last = tiny_run.adapter(model)
    load_best(tmp_path, state.best, model)
    for name, value in tiny_run.adapter(model).items():
        assert torch.equal(value, expected[name]), name
    assert any(not torch.equal(last[name], expected[name]) for name in last)


def test_only_the_best_that_a_checkpoint_comes_back_to_is_kept(tmp_path: Path) -> None:
    _, state = train(tmp_path)
    home = tmp_path / "checkpoints"
    needed = {json.loads(file.read_text())["best"] for file in home.glob("step-*/state.json")} | {state.best}
    assert {int(folder.name.removeprefix("best-")) for folder in home.glob("best-*")} == needed


@pytest.mark.parametrize("stop_at", [2, pytest.param(7, marks=pytest.mark.slow), 15])
def test_a_resumed_run_has_the_same_best(stop_at: int, tmp_path: Path) -> None:
    _, whole = train(tmp_path / "whole")
    AcceleratorState._reset_state(True)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", stop_at=stop_at)
    AcceleratorState._reset_state(True)
    newest, _ = newest_valid(tmp_path / "parts")
    _, state = train(tmp_path / "parts", resume=newest)
    assert state.best is not None
    assert state.best == whole.best
    files = [best_adapter_dir(tmp_path / part, state.best) / "adapter.safetensors" for part in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_whose_best_adapter_is_damaged_is_not_resumed_from(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, stop_at=4)
    saved = json.loads((tmp_path / "checkpoints/step-000004/state.json").read_text())["best"]
    file = best_adapter_dir(tmp_path, saved) / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=rf"step-000004: skipped, since the best adapter so far, best-{saved:06d}, is d"):
        newest_valid(tmp_path)
    with pytest.raises(RunError, match=rf"best-{saved:06d}: is damaged: .*; go on from the newest checkpoint with"):
        load_best(tmp_path, saved, tiny_run.fresh(tiny_run.recipe(lora={"lora_alpha": 64})))


def test_a_run_that_finds_nothing_better_stops_early_with_its_last_steps_told(tmp_path: Path) -> None:
    _, state = train(tmp_path, early_stopping_patience=2, logging_steps=50)
    losses = [record["eval_loss"] for record in state.evals]
    lowest = losses.index(min(losses))
    assert len(losses) == lowest + 3  # the best and two more
    assert state.stopped == (
        f"stopped early after step {state.step}: 2 evaluations were no better by loss than step {3 * lowest}"
    )
    assert not state.stopped_by_sign
    logged = [record["step"] for record in read_metrics(tmp_path / METRICS) if record["kind"] == "train"]
    assert logged == [1, state.step]
    assert (tmp_path / "checkpoints" / f"step-{state.step:06d}").is_dir()


def test_trls_engine_stops_early_too_and_keeps_the_best(tmp_path: Path) -> None:
    from qlora_dpo.training.trl_engine import train_with_trl

    what = tiny_run.recipe(train={**TRAIN, "early_stopping_patience": 2, "engine": "trl"}, lora={"lora_alpha": 64})
    model: PeftModel = tiny_run.fresh(what)
    job = tiny_run.job(model, what, tmp_path)
    with RunLog(tmp_path, job.data_order.total_steps) as tracker:
        state = train_with_trl(model, job, tiny_run.start(job), tracker, tokenizer=tiny_run.tiny.tokenizer())
    losses = [record["eval_loss"] for record in state.evals]
    assert len(losses) == losses.index(min(losses)) + 3 < 7
    assert state.best is not None
    assert best_adapter_dir(tmp_path, state.best).is_dir()


@pytest.fixture(scope="module")
def stopped_by_a_sign(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """A run through the command line whose learning rate moves nothing, with `watch.stop = ["stuck"]`."""
    from cli_sandbox import fill
    from hub import Hub

    root = tmp_path_factory.mktemp("hub")
    fill(root)
    with Hub(root) as hub:
        place = Workplace(tmp_path_factory.mktemp("work"), hub)
        sets = {
            "train.learning_rate": "1e-12",
            "train.eval_steps": "1",
            "train.batch_size": "4",
            "watch.stop": '["stuck"]',
            "model.quantization": "none",
        }
        options = [each for key, value in sets.items() for each in ("--set", f"{key}={value}")]
        done = place.run("train", HH, *options)
        shutil.copytree(place.folder / "adapters/hh", place.folder / "kept")
        return done.returncode, done.stderr + done.stdout, place.folder / "kept"


def test_a_run_that_a_sign_ends_exits_with_3_and_has_an_adapter_and_a_report(
    stopped_by_a_sign: tuple[int, str, Path],
) -> None:
    code, told, folder = stopped_by_a_sign
    sentence = (
        "the held-out loss 0.6931 is still that of step 0; raise train.learning_rate (`qlora-dpo sweep RECIPE --probe` "
        "finds one), or look at the labels with `qlora-dpo data lint`"
    )
    results, run = (json.loads((folder / name).read_text()) for name in ("results.json", "run.json"))
    (stuck,) = (sign for sign in results["signs"] if sign["name"] == "stuck")
    step = stuck["step"]
    assert code == 3, told
    assert told.count("Traceback") == 0
    assert (
        f"qlora-dpo: adapters/hh: stopped after step {step} by watch.stop, stuck: {sentence}; the adapter is that of "
        "step 0, and --resume goes on" in told
    )
    assert stuck == {"step": step, "name": "stuck", "sentence": sentence}
    assert (run["status"], run["steps"], run["adapter_step"]) == ("stopped", step, 0)  # the best, by the recipe
    assert run["stopped"].startswith(f"stopped after step {step} by watch.stop, stuck: ")
    assert (folder / "adapter_model.safetensors").is_file()
    assert f"- Step {step}: the held-out loss 0.6931 is still" in (folder / "README.md").read_text()
