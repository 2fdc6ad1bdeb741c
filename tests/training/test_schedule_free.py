"""`train.optim = "schedule_free_adamw"`: what is evaluated and kept is the mean; a resumed run has the same bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from stopping_tracker import tracker_that_stops

from qlora_dpo.errors import Interrupted, RecipeError
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.extras import check_extras
from qlora_dpo.training import optim
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.evaluate import evaluate
from qlora_dpo.training.loop import train_loop
from qlora_dpo.training.optim import create_optimizer

pytestmark = tiny_run.LIBRARIES_WARN


@pytest.fixture
def schedulefree() -> Any:
    return pytest.importorskip("schedulefree", reason="schedulefree is not installed")


def recipe(**train: Any) -> Recipe:
    steps = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "num_train_epochs": 2}
    own = {"optim": "schedule_free_adamw", "learning_rate": 0.01, **steps, **train}
    return tiny_run.recipe(train=own, lora={"loraplus_lr_ratio": 2.0, "lora_dropout": 0.1})


def trained(what: Recipe, folder: Path, resume: Path | None = None, stop_at: int = 0) -> tuple[Any, Any, Any]:
    """The model, its job and the state at the end."""
    AcceleratorState._reset_state(True)
    folder.mkdir(exist_ok=True)
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder)
    with tracker_that_stops(folder, job.data_order.total_steps, stop_at) as tracker:
        state = train_loop(model, job, tiny_run.start(job), tracker, resume)
    return model.eval(), job, state


def test_it_steps_as_the_package_does_by_itself(schedulefree: Any) -> None:
    """With constant gradients g, AdamW's normalized step is sign(g) times the rate; the mean of z has weights lr^2."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    table = recipe(learning_rate=0.1).train
    optimizer = create_optimizer({"lora_A": parameter}, table, tiny_run.CPU)
    points = []
    for _ in range(4):
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
        points.append(optimizer.state[parameter]["z"].clone())
    torch.testing.assert_close(points[-1], -0.4 * torch.tensor([1.0, -1.0, 1.0]), atol=1e-5, rtol=1e-5)
    with optim.eval_weights(optimizer):
        torch.testing.assert_close(parameter.data, torch.stack(points).mean(0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(parameter.data, torch.stack(points).mean(0), atol=1e-3)


def test_the_mean_is_evaluated_and_the_point_comes_back_bit_for_bit(schedulefree: Any) -> None:
    parameter = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    optimizer = create_optimizer({"lora_A": parameter}, recipe().train, tiny_run.CPU)
    for step in range(3):
        parameter.grad = torch.randn(1000, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    point = parameter.detach().clone()
    with optim.eval_weights(optimizer):
        assert not torch.equal(parameter, point)
    assert torch.equal(parameter, point)
    parameter.grad = torch.ones(1000)
    optimizer.step()


def test_other_optimizers_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = create_optimizer({"lora_A": parameter}, tiny_run.recipe().train, tiny_run.CPU)
    with optim.eval_weights(optimizer):
        pass
    optim.finalize(optimizer)
    assert optim.get_counters(optimizer) == []
    assert torch.equal(parameter, torch.ones(3))


def test_a_resumed_run_has_the_bytes_of_one_that_was_never_stopped_however_often_it_is_evaluated(
    schedulefree: Any, tmp_path: Path
) -> None:
    whole = tiny_run.adapter(trained(recipe(), tmp_path / "whole")[0])
    often = tiny_run.adapter(trained(recipe(eval_steps=1), tmp_path / "often")[0])
    assert all(torch.equal(often[name], whole[name]) for name in whole)
    with pytest.raises(Interrupted):
        trained(recipe(), tmp_path / "part", stop_at=3)
    checkpoint = newest_valid(tmp_path / "part")[0]
    assert [group["k"] for group in json.loads((checkpoint / "state.json").read_text())["counters"]] == [3, 3]
    resumed = tiny_run.adapter(trained(recipe(), tmp_path / "part", resume=checkpoint)[0])
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_model_at_the_end_is_the_one_of_the_last_evaluation(schedulefree: Any, tmp_path: Path) -> None:
    model, job, state = trained(recipe(), tmp_path / "run")
    found = evaluate(model, job.heldout, job.recipe.objective, job.packing, tiny_run.CPU)
    assert found["eval_loss"] == state.evals[-1]["eval_loss"]
    assert any(
        float(each.detach().abs().max()) > 0 for name, each in trainable_parameters(model).items() if "lora_B" in name
    )


def test_a_falling_rate_is_refused() -> None:
    with pytest.raises(ValidationError) as raised:
        recipe(lr_scheduler_type="linear")
    assert (
        'has optim = "schedule_free_adamw", whose mean takes the place of lr_scheduler_type = "linear"; write '
        '"constant" or "constant_with_warmup"'
    ) in str(raised.value)


def test_without_the_package_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_dpo.recipe.extras.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as raised:
        check_extras(recipe())
    assert str(raised.value) == (
        'train.optim = "schedule_free_adamw" needs the package schedulefree, which is not installed; install it with: '
        "pip install 'qlora_dpo[schedule-free]'"
    )
