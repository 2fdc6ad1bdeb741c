"""A run that is stopped goes on to the same bytes, from the newest checkpoint that is whole, or says why not."""

import math
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel

from qlora_dpo.errors import Interrupted, RunError, SourceError
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.checkpoint import save
from qlora_dpo.training.checkpoint.integrity import checkpoint_damage
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.loop import train_loop

pytestmark = tiny_run.LIBRARIES_WARN

TRAIN = {"num_train_epochs": 3, "save_steps": 2, "warmup_steps": 2, "lr_scheduler_type": "cosine"}


def train(
    folder: Path,
    dtype: str = "fp32",
    quantization: str = "nf4",
    stop_at: int | None = None,
    stop_with: signal.Signals = signal.SIGINT,
    resume: Path | None = None,
    heldout: int = 6,
    seed: int = 42,
    allowed: tuple[str, ...] = (),
    until: float = math.inf,
    **changes: Any,
) -> tuple[PeftModel, TrainState]:
    """Train in `folder`; with `stop_at`, the signal arrives while that step ends."""
    place = tiny_run.device.select_device(dtype)  # type: ignore[arg-type]
    tables = {
        "train": {**TRAIN, "seed": seed, **changes},
        "lora": {"lora_dropout": 0.1},
        "objective": {"sft_weight": 0.2},
    }
    what = tiny_run.recipe(quantization, **tables)
    folder.mkdir(exist_ok=True)
    model = tiny_run.fresh(what, place)
    job = replace(
        tiny_run.job(model, what, folder, heldout=heldout, place=place), allowed_changes=allowed, deadline=until
    )
    if resume is None:
        torch.manual_seed(1)
    with RunLog(folder, job.data_order.total_steps) as tracker:
        if stop_at is not None:
            said = tracker.step

            def step(number: int) -> None:
                said(number)
                if number == stop_at:
                    os.kill(os.getpid(), stop_with)

            tracker.step = step  # type: ignore[method-assign]
        return model, train_loop(model, job, tiny_run.start(job), tracker, resume)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The directory of a run of nine steps that was stopped after its fifth."""
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", stop_at=5)
    return tmp_path / "stopped"


def stepped(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Take a step by a gradient of ones."""
    for parameter in trainable_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_the_moments_of_a_paged_optimizer_are_put_back_into_its_own_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = tiny_run.recipe()
    model = tiny_run.fresh(what)
    state = tiny_run.start(tiny_run.job(model, what, tmp_path))
    weights = list(trainable_parameters(model).values())
    optimizer, other = (bnb.optim.PagedAdamW32bit(weights, lr=0.1) for _ in range(2))
    stepped(model, optimizer)
    expected = {each: dict(optimizer.state[each]) for each in weights}
    saved = save.save_checkpoint(tmp_path, state, model, optimizer.state)
    buffers, whole = list[torch.Tensor](), other.get_state_buffer

    def get_state_buffer(*arguments: Any, **keys: Any) -> torch.Tensor:
        buffers.append(whole(*arguments, **keys))  # on a GPU in pages
        return buffers[-1]

    monkeypatch.setattr(other, "get_state_buffer", get_state_buffer)
    save.load_checkpoint(saved, state, model, other)
    for each, parts in expected.items():
        found = other.state[each]
        assert found.keys() == parts.keys()
        assert all(torch.equal(found[key], torch.as_tensor(value)) for key, value in parts.items())
        for key in ("state1", "state2"):
            assert any(found[key] is buffer for buffer in buffers)
    before = tiny_run.adapter(model)
    stepped(model, optimizer)
    after = tiny_run.adapter(model)
    for name, parameter in trainable_parameters(model).items():
        parameter.data.copy_(before[name])
    stepped(model, other)
    assert tiny_run.all_apart(tiny_run.adapter(model), after) == 0


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(dtype: str, quantization: str, tmp_path: Path) -> None:
    whole, whole_state = train(tmp_path / "whole", dtype, quantization)
    AcceleratorState._reset_state(True)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", dtype, quantization, stop_at=5)
    AcceleratorState._reset_state(True)
    newest, skipped = newest_valid(tmp_path / "parts")
    assert (newest.name, skipped) == ("step-000005", [])
    resumed, state = train(tmp_path / "parts", dtype, quantization, resume=newest)
    expected = tiny_run.adapter(whole)
    for name, value in tiny_run.adapter(resumed).items():
        assert torch.equal(value, expected[name]), name
    assert (state.step, state.num_tokens) == (9, whole_state.num_tokens)
    assert [_untimed(each) for each in state.evals] == [_untimed(each) for each in whole_state.evals]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves_a_checkpoint(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as error:
        train(tmp_path, stop_at=3, stop_with=number)
    saved = tmp_path / "checkpoints" / "step-000003"
    assert str(error.value) == f"stopped after step 3 as asked; {saved} is saved, --resume goes on from there"
    assert error.value.exit_code == 130
    assert checkpoint_damage(saved) == ""
    assert "stopping and saving a checkpoint; once more stops at once\n" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_when_the_time_is_over_a_checkpoint_is_saved_that_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    AcceleratorState._reset_state(True)
    with pytest.raises(Interrupted) as error:
        train(tmp_path / "parts", until=time.monotonic())
    saved = tmp_path / "parts" / "checkpoints" / "step-000001"
    why = "since the next step would end after --max-hours"
    assert str(error.value) == f"stopped after step 1, {why}; {saved} is saved, --resume goes on from there"
    assert error.value.exit_code == 130
    AcceleratorState._reset_state(True)
    resumed, state = train(tmp_path / "parts", resume=saved, until=time.monotonic() + 3600)
    assert state.step == 9
    assert tiny_run.all_apart(tiny_run.adapter(resumed), tiny_run.adapter(whole)) == 0


def test_the_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = save.save_file

    def slow_disk(*given: Any) -> None:
        original(*given)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(save, "save_file", slow_disk)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_newest_two_checkpoints_are_kept(stopped: Path) -> None:
    assert sorted(folder.name for folder in (stopped / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_a_checkpoint_holds_safetensors_and_json_only(stopped: Path) -> None:
    assert sorted(file.name for file in (stopped / "checkpoints" / "step-000005").iterdir()) == [
        "adapter.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
    ]


DAMAGES = {
    "a flipped bit": "optimizer.safetensors has not its SHA-256",
    "cut in half": "adapter.safetensors has not its size",
    "a lost file": "random.safetensors is missing",
    "an edited state": "state.json has not its SHA-256",
    "a lost manifest": "manifest.json is missing",
    "a broken manifest": "manifest.json is damaged",
    "a manifest that lists nothing": "state.json is not in the manifest",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage: str, stopped: Path) -> None:
    newest = stopped / "checkpoints" / "step-000005"
    match damage:
        case "a flipped bit":
            content = bytearray((newest / "optimizer.safetensors").read_bytes())
            content[-1] ^= 4
            (newest / "optimizer.safetensors").write_bytes(content)
        case "cut in half":
            os.truncate(newest / "adapter.safetensors", (newest / "adapter.safetensors").stat().st_size // 2)
        case "a lost file":
            (newest / "random.safetensors").unlink()
        case "an edited state":
            text = (newest / "state.json").read_text()
            (newest / "state.json").write_text(text.replace('"step": 5', '"step": 6'))
        case "a lost manifest":
            (newest / "manifest.json").unlink()
        case "a broken manifest":
            (newest / "manifest.json").write_text("{")
        case "a manifest that lists nothing":
            (newest / "manifest.json").write_text("{}")
    assert newest_valid(stopped) == (
        stopped / "checkpoints" / "step-000004",
        [f"{newest}: skipped, since {DAMAGES[damage]}"],
    )


def test_without_a_valid_checkpoint_every_one_is_named(stopped: Path) -> None:
    older, newer = sorted((stopped / "checkpoints").iterdir())
    (older / "state.json").unlink()
    (newer / "state.json").unlink()
    with pytest.raises(RunError) as error:
        newest_valid(stopped)
    assert str(error.value) == (
        f"{newer}: skipped, since state.json is missing; {older}: skipped, since state.json is missing; "
        f"{stopped}: holds no checkpoint to resume from; train without --resume and with -o DIR"
    )


def test_a_changed_recipe_is_refused_with_what_changed(stopped: Path) -> None:
    newest, _ = newest_valid(stopped)
    with pytest.raises(RunError) as error:
        train(stopped, resume=newest, learning_rate=2e-3, seed=1)
    assert str(error.value) == (
        f"{newest}: belongs to another run; changed since: "
        "train.learning_rate was 0.001, is 0.002; train.seed was 42, is 1; put it back, or go on with "
        "--allow train.learning_rate --allow train.seed"
    )


def test_changed_data_tokenizer_template_and_base_are_refused_by_name(stopped: Path) -> None:
    newest, _ = newest_valid(stopped)
    model = tiny_run.fresh(tiny_run.recipe("nf4"))
    kept = TrainState(**save.json.loads((newest / "state.json").read_text()))
    for names in (["base"], ["pairs"], ["tokenizer", "pairs"], ["base", "tokenizer", "template", "pairs"]):
        asked = TrainState(0, kept.recipe, kept.fingerprints | dict.fromkeys(names, "other"))
        with pytest.raises(RunError) as error:
            save.load_checkpoint(newest, asked, model, torch.optim.AdamW(tiny_run.trainable_parameters(model).values()))
        assert str(error.value) == (
            f"{newest}: belongs to another run; changed since: "
            f"{'; '.join(save.FINGERPRINT_LABELS[name] for name in names)}; put it back, or go on with "
            f"{' '.join(f'--allow {name}' for name in names)}"
        )


def test_pairs_into_which_the_template_writes_another_date_are_refused_with_both_dates(stopped: Path) -> None:
    """A date alone is no change: only that of the pairs, which may have been encoded a moment before midnight."""
    newest, _ = newest_valid(stopped)
    kept = TrainState(**save.json.loads((newest / "state.json").read_text()))

    def resumed(**changed: str) -> TrainState:
        model = tiny_run.fresh(tiny_run.recipe("nf4"))
        now = TrainState(0, kept.recipe, kept.fingerprints | changed, template_date="2026-11-30")
        optimizer = torch.optim.AdamW(tiny_run.trainable_parameters(model).values())
        return save.load_checkpoint(newest, now, model, optimizer)

    assert resumed().template_date == "2026-11-30"
    with pytest.raises(RunError) as error:
        resumed(pairs="other")
    assert str(error.value) == (
        f"{newest}: belongs to another run; changed since: the training pairs, into which the chat template writes the "
        "date (another date then, 2026-11-30 now); put it back, or go on with --allow pairs"
    )


def test_a_checkpoint_of_another_version_is_named(stopped: Path, tmp_path: Path) -> None:
    newest, _ = newest_valid(stopped)
    shutil.copytree(newest, tmp_path / newest.name)
    state = save.json.loads((newest / "state.json").read_text())
    (tmp_path / newest.name / "state.json").write_text(save.json.dumps({**state, "a_later_field": 1}))
    model = tiny_run.fresh(tiny_run.recipe("nf4"))
    kept = TrainState(**state)
    with pytest.raises(RunError) as error:
        save.load_checkpoint(
            tmp_path / newest.name, kept, model, torch.optim.AdamW(tiny_run.trainable_parameters(model).values())
        )
    assert str(error.value) == (
        f"{tmp_path / newest.name}: was saved by another version of qlora_dpo; go on with that one"
    )


def test_a_checkpoint_with_the_field_names_of_version_0_1_opens(stopped: Path, tmp_path: Path) -> None:
    newest, _ = newest_valid(stopped)
    shutil.copytree(newest, tmp_path / newest.name)
    values = save.json.loads((newest / "state.json").read_text())
    since = values["since_eval"]
    former = {**values, "first_slope": 0.25, "since_eval": {**since, "vanished": 2}}
    del former["first_step_grad"], former["since_eval"]["small_grad_pairs"]
    (tmp_path / newest.name / "state.json").write_text(save.json.dumps(former))
    model = tiny_run.fresh(tiny_run.recipe("nf4"))
    optimizer = torch.optim.AdamW(tiny_run.trainable_parameters(model).values())
    state = save.load_checkpoint(tmp_path / newest.name, TrainState.from_json(values), model, optimizer)
    assert (state.first_step_grad, state.since_eval.small_grad_pairs) == (0.25, 2)


def test_every_generator_goes_on_where_it_stood() -> None:
    def draws() -> tuple[float, ...]:
        return (torch.rand(()).item(), random.random(), random.gauss(), np.random.rand(), np.random.randn())

    draws()  # gauss and randn make two numbers and keep one
    states = get_rng_states()
    expected = [draws() for _ in range(3)]
    set_rng_states(states)
    assert [draws() for _ in range(3)] == expected


def test_what_is_allowed_may_change_and_is_what_later_resumes_compare_with(stopped: Path) -> None:
    newest, _ = newest_valid(stopped)
    _, state = train(stopped, resume=newest, learning_rate=2e-3, allowed=("train.learning_rate",))
    assert state.recipe["train"]["learning_rate"] == 2e-3
    with pytest.raises(RunError, match=r"train\.learning_rate was 0\.002, is 0\.001; put it back"):
        train(stopped, resume=newest_valid(stopped)[0])


def test_another_rank_cannot_be_allowed(stopped: Path) -> None:
    newest, _ = newest_valid(stopped)
    model = tiny_run.fresh(tiny_run.recipe("nf4", lora={"r": 8}))
    kept = TrainState(**save.json.loads((newest / "state.json").read_text()))
    with pytest.raises(RunError) as error:
        save.load_checkpoint(newest, kept, model, torch.optim.AdamW(tiny_run.trainable_parameters(model).values()))
    assert str(error.value) == (
        f"{newest}: its adapter has other layers or ranks than [lora] asks for; put [lora] back"
    )


SAME = {name: name for name in save.FINGERPRINT_LABELS}


def every_key() -> list[str]:
    """All keys of a recipe that has every table."""
    tables = tiny_run.recipe(track={"wandb": "project"}, reference={"kind": "ema"}).model_dump()
    return [f"{table}.{key}" for table, keys in tables.items() for key in keys]


@pytest.mark.parametrize("key", every_key())
def test_every_key_of_a_recipe_that_changes_is_refused_by_name_or_free(key: str) -> None:
    was = TrainState(0, tiny_run.recipe(track={"wandb": "project"}, reference={"kind": "ema"}).model_dump(), SAME)
    now = TrainState(0, tiny_run.recipe(track={"wandb": "project"}, reference={"kind": "ema"}).model_dump(), dict(SAME))
    table, name = key.split(".")
    now.recipe[table][name] = "something else"
    free = key.startswith(("samples.", "track.", "watch.")) or key in {
        "data.max_bad_share",
        "train.max_steps",
        "train.logging_steps",
        "train.eval_steps",
        "train.save_steps",
        "train.early_stopping_patience",
    }
    assert list(save._resume_differences(was, now)) == ([] if free else [key])


def test_a_resumed_run_may_have_another_max_steps(stopped: Path) -> None:
    newest, _ = newest_valid(stopped)
    _, state = train(stopped, resume=newest, max_steps=7, logging_steps=2)
    assert (state.step, state.evals[-1]["step"]) == (7, 7)


def test_on_a_full_disk_the_old_checkpoints_stay_and_the_run_goes_on(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((stopped / "checkpoints").iterdir())

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_json", full)
    _, state = train(stopped, resume=newest_valid(stopped)[0])
    assert state.step == 9
    said = capsys.readouterr().err
    for step in (6, 8):
        folder = stopped / "checkpoints" / f"step-00000{step}"
        assert (
            f"step {step} is not saved: {folder}: the disk is full; free some space; the run goes on, and older "
            "checkpoints stay\n"
        ) in said
    assert sorted((stopped / "checkpoints").iterdir()) == before


def test_a_stopped_run_that_cannot_save_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_json", full)
    with pytest.raises(SourceError, match=r"step-000003: the disk is full; free some space$"):
        train(tmp_path, stop_at=3, save_steps=100)


def test_a_damaged_newest_checkpoint_is_replaced_by_the_run_that_skipped_it(stopped: Path) -> None:
    newest = stopped / "checkpoints" / "step-000005"
    (newest / "optimizer.safetensors").write_bytes(b"")
    (stopped / "checkpoints" / ".step-000005.killed").mkdir()
    train(stopped, resume=newest_valid(stopped)[0], save_steps=1)
    assert sorted(each.name for each in (stopped / "checkpoints").iterdir()) == ["step-000007", "step-000008"]
    assert newest_valid(stopped) == (stopped / "checkpoints" / "step-000008", [])


def test_a_damaged_checkpoint_does_not_count_among_the_two_that_are_kept(stopped: Path) -> None:
    newest = stopped / "checkpoints" / "step-000005"
    (newest / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(Interrupted):
        train(stopped, resume=newest_valid(stopped)[0], stop_at=6, save_steps=100)
    assert sorted(each.name for each in (stopped / "checkpoints").iterdir()) == ["step-000004", "step-000006"]


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds"}
