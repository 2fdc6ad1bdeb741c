"""NaN, infinity and overflow planted in a loss, a gradient, a weight and a datum: twelve of twelve end as promised."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qlora_dpo.data.encode import load_pairs
from qlora_dpo.errors import DataError, RunError
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training import train_step
from qlora_dpo.training.context import TrainContext
from qlora_dpo.training.loop import train_loop

pytestmark = tiny_run.LIBRARIES_WARN

VALUES = {"NaN": float("nan"), "infinity": float("inf"), "overflow": 3e38}
AT = 3
"""The step in which something is planted; each step before it is saved."""


def in_loss(model: PeftModel, job: TrainContext, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_step.compute_losses

    def planted(*given: Any) -> Any:
        losses = plain(*given)
        return replace(losses, total_P=losses.total_P * value)

    monkeypatch.setattr(train_step, "compute_losses", planted)


def in_gradient(model: PeftModel, job: TrainContext, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    list(trainable_parameters(model).values())[3].register_hook(lambda gradient: gradient.sign() * value)


def in_weight(model: PeftModel, job: TrainContext, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    list(trainable_parameters(model).values())[2].data[0, 0] = value


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("plant", [in_loss, in_gradient, in_weight])
def test_a_run_ends_by_name_and_saves_nothing_that_is_not_finite(
    plant: Callable[..., None], value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = tiny_run.recipe(train={"save_steps": 1, "num_train_epochs": 4})
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, tmp_path)
    rows = ", ".join(str(job.train.pairs[i].row) for i in job.data_order.batch_indices(AT))
    tracker = RunLog(tmp_path, job.data_order.total_steps)
    said, weights = tracker.step, dict[str, torch.Tensor]()

    def step(number: int) -> None:
        said(number)
        if number == AT - 1:
            plant(model, job, value, monkeypatch)
            weights.update(tiny_run.adapter(model))

    monkeypatch.setattr(tracker, "step", step)
    with tracker, pytest.raises(RunError) as error:
        train_loop(model, job, tiny_run.start(job), tracker)
    told = str(error.value)
    assert error.value.exit_code == 1
    if plant is in_weight:  # a weight of 3e38 is finite, and is found by what it does, at the next save or step
        assert " is not finite" in told
    else:
        assert told.startswith(f"step {AT}: the ") and f"; the step's pairs are rows {rows} of data.train; " in told
    for name, now in tiny_run.adapter(model).items():
        assert torch.equal(now.nan_to_num(), weights[name].nan_to_num()), name
    saved = list(tmp_path.rglob("*.safetensors"))
    assert any(file.name == "adapter.safetensors" for file in saved)
    for file in saved:
        assert all(tensor.double().isfinite().all() for tensor in load_file(file).values()), file


@pytest.mark.parametrize("word", ["NaN", "Infinity", "1e999"])
def test_a_datum_that_is_not_finite_is_no_text(word: str, empty_folder: Path) -> None:
    good = json.dumps({"prompt": "Is it late?", "chosen": "No.", "rejected": "Yes."})
    bad = f'{{"prompt": "Is it late?", "chosen": {word}, "rejected": "Yes."}}'
    Path("p.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
    table = DataTable(train="./p.jsonl", eval="./q.jsonl")
    if word == "1e999":
        assert load_pairs(table, "train", tiny.tokenizer(), 0).audit.dropped == {
            "chosen is a number, not a string": (2,)
        }
        return
    with pytest.raises(DataError) as refused:
        load_pairs(table, "train", tiny.tokenizer(), 0)
    assert str(refused.value) == f"p.jsonl:2: is not valid JSON: {word} is no JSON value"
