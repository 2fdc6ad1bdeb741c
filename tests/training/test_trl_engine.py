"""Stock TRL as judge: the same loss, the same gradients, the same twenty steps."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from accelerate.state import AcceleratorState
from trl_trainer import inputs, our_losses, stirred_trainer

from qlora_dpo.errors import RecipeError, RunError
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.preference.objective import Logps, compute_losses
from qlora_dpo.preference.reference import model_logps
from qlora_dpo.preference.start_checks import probe_logits
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training.context import TrainContext
from qlora_dpo.training.loop import train_loop
from qlora_dpo.training.trl_engine import create_trainer, per_device_batch_size, train_with_trl

pytestmark = tiny_run.LIBRARIES_WARN

QUANTIZATIONS = pytest.mark.parametrize("quantization", ["none", "nf4"])


def train(engine: str, what: Any, folder: Path) -> tuple[Any, list[dict[str, Any]], TrainContext]:
    """Train with one of the engines: the model, the metrics and the job."""
    AcceleratorState._reset_state(True)
    folder.mkdir()
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder)
    with RunLog(folder, job.data_order.total_steps) as tracker:
        if engine == "trl":
            train_with_trl(model, job, tiny_run.start(job), tracker, tokenizer=tiny.tokenizer())
        else:
            train_loop(model, job, tiny_run.start(job), tracker)
    return model, read_metrics(folder / METRICS), job


def of_kind(metrics: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in metrics if line["kind"] == kind]


@QUANTIZATIONS
@pytest.mark.parametrize("at_once", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_twenty_steps_of_both_engines_agree(quantization: str, at_once: int, tmp_path: Path) -> None:
    # ten pairs in steps of 4, 4 and 2, so that epochs end in the middle of a batch
    table = {"num_train_epochs": 7, "max_steps": 20, "warmup_steps": 3, "micro_batch_tokens": 42 * at_once}
    what = tiny_run.recipe(quantization, train=table, data={"max_length": 21})
    assert per_device_batch_size(what) == at_once
    own, own_metrics, _ = train("qlora_dpo", what, tmp_path / "own")
    trl, trl_metrics, _ = train("trl", what, tmp_path / "trl")
    assert tiny_run.all_apart(tiny_run.adapter(trl), tiny_run.adapter(own)) < 1e-5
    means = {"loss": 1e-6, "rewards/margins": 1e-6, "logps/chosen": 1e-4, "logps/rejected": 1e-4}
    if at_once == 4:  # these are means over tokens, so TRL's depend on the micro-batches
        means |= {"entropy": 1e-4, "mean_token_accuracy": 1e-6, "logits/chosen": 1e-4, "logits/rejected": 1e-4}
    steps = {"step": 0, "epoch": 1e-12, "num_tokens": 0, "learning_rate": 1e-12, "grad_norm": 1e-5}
    for name, tolerance in {**means, **steps}.items():
        found, expected = (tiny_run.column(of_kind(each, "train"), name) for each in (trl_metrics, own_metrics))
        assert found == pytest.approx(expected, rel=0, abs=tolerance), name
    for name in means:
        found, expected = (
            tiny_run.column(of_kind(each, "eval"), f"eval_{name}") for each in (trl_metrics, own_metrics)
        )
        assert found == pytest.approx(expected, rel=0, abs=1e-4), name
    assert tiny_run.column(of_kind(trl_metrics, "train"), "step") == list(range(1, 21))


def test_engines_agree_with_gradient_checkpointing(tmp_path: Path) -> None:
    what = tiny_run.recipe("nf4", train={"gradient_checkpointing": True, "max_steps": 3})
    own, _, _ = train("qlora_dpo", what, tmp_path / "own")
    trl, _, _ = train("trl", what, tmp_path / "trl")
    # the first steps of Adam divide by gradients that are almost 0
    assert tiny_run.all_apart(tiny_run.adapter(trl), tiny_run.adapter(own)) < 3e-5


@QUANTIZATIONS
def test_loss_and_gradients_of_a_batch_are_trls(quantization: str, tmp_path: Path) -> None:
    model, job, trainer = stirred_trainer(quantization, tmp_path)
    loss = trainer.compute_loss(trainer.model, inputs(job, trainer))
    loss.backward()
    expected = tiny_run.gradients(model)
    model.zero_grad()
    losses = our_losses(model, job)
    losses.total_P.mean().backward()
    assert losses.total_P.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert abs(loss.item() - 0.693147) > 1e-3  # the adapter does something
    assert tiny_run.apart(tiny_run.gradients(model), expected) < 1e-5


@QUANTIZATIONS
def test_with_sft_term_both_agree_where_chosen_answers_are_of_one_length(quantization: str, tmp_path: Path) -> None:
    model, job, trainer = stirred_trainer(quantization, tmp_path, chosen_tokens=5, objective={"sft_weight": 0.5})
    loss = trainer.compute_loss(trainer.model, inputs(job, trainer))
    loss.backward()
    expected = tiny_run.gradients(model)
    model.zero_grad()
    losses = our_losses(model, job)
    losses.total_P.mean().backward()
    assert losses.total_P.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert losses.sft_P.mean().item() > 1
    assert tiny_run.apart(tiny_run.gradients(model), expected) < 1e-5


def test_the_sigmoid_loss_is_trls_on_the_same_log_probabilities(tmp_path: Path) -> None:
    _, job, trainer = stirred_trainer("none", tmp_path)
    for index in range(4):
        trainer._metrics["eval"].clear()
        one = inputs(job, trainer, [index])
        loss = trainer.compute_loss(trainer.model, one)
        reference_P2 = torch.stack(trainer.compute_ref_log_probs(trainer.model, one), dim=1)
        chosen_P, rejected_P = (torch.tensor(trainer._metrics["eval"][f"logps/{a}"]) for a in ("chosen", "rejected"))
        logps = Logps(chosen_P, rejected_P, torch.ones(1), torch.ones(1), reference_P2, chosen_P)
        ours = compute_losses(logps, job.recipe.objective)
        assert ours.preference_P.item() == pytest.approx(loss.item(), abs=1e-6)


def test_trls_reference_is_the_base_with_the_adapter_off(tmp_path: Path) -> None:
    _, job, trainer = stirred_trainer("nf4", tmp_path)
    asked = torch.stack(trainer.compute_ref_log_probs(trainer.model, inputs(job, trainer)), dim=1)
    torch.testing.assert_close(asked, job.train.reference_P2[:4], rtol=1e-5, atol=1e-5)


@QUANTIZATIONS
def test_trl_trains_our_float32_weights_from_where_they_start(quantization: str, tmp_path: Path) -> None:
    what = tiny_run.recipe(quantization)
    model = tiny_run.fresh(what)
    before = tiny_run.adapter(model)
    trainer = create_trainer(model, tiny_run.job(model, what, tmp_path), tiny.tokenizer(), str(tmp_path / "out"))
    now = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert now.keys() == before.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in now.items())
    assert list(model.peft_config) == ["default"]


def test_afterwards_the_model_computes_as_ours_does(tmp_path: Path) -> None:
    what = tiny_run.recipe("nf4")
    base = tiny_run.base_model("nf4")
    pair = tiny_run.pairs(1, seed=5)[0]
    before_LV = probe_logits(base, pair, tiny_run.CPU)
    model, _, _ = train("trl", what, tmp_path / "trl")
    with model.disable_adapter():
        assert torch.equal(probe_logits(model, pair, tiny_run.CPU), before_LV)
    assert "_fused_forward" not in repr(vars(model.get_base_model()).get("forward"))
    model.eval()
    logits = probe_logits(model, pair, tiny_run.CPU).log_softmax(-1)[len(pair.prompt) - 1 : -1]
    sums = logits.gather(-1, torch.tensor(pair.chosen)[:, None]).sum()
    torch.testing.assert_close(
        model_logps(model, [pair], tiny_run.PACKED, tiny_run.CPU)[0, 0], sums, rtol=1e-5, atol=1e-5
    )
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}


def test_trl_is_quiet_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    train("trl", tiny_run.recipe(objective={"sft_weight": 0.5}), tmp_path / "run")
    said = capsys.readouterr()
    assert said.out == ""
    assert "\nengine: TRL's SFT term is a mean over the tokens of a micro-batch, not over pairs\n" in said.err
    assert list((tmp_path / "temporary").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "temporary"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "reference"]


def test_label_smoothing_is_refused_since_trl_would_ignore_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        train("trl", tiny_run.recipe(objective={"label_smoothing": 0.1}), tmp_path / "run")
    assert str(error.value) == (
        "[objective] has label_smoothing, which TRL's sigmoid loss ignores; leave it out, or set train.engine = "
        '"qlora_dpo"'
    )


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    what = tiny_run.recipe()
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, tmp_path)
    next(iter(trainable_parameters(model).values())).data[0, 0] = float("nan")
    with RunLog(tmp_path, job.data_order.total_steps) as tracker, pytest.raises(RunError) as error:
        train_with_trl(model, job, tiny_run.start(job), tracker, tokenizer=tiny.tokenizer())
    assert str(error.value) == "step 1: TRL's loss is not finite; lower train.learning_rate or look at the data"


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_tokens", "max_length", "pairs"),
    [(16, 4096, 512, 4), (6, 4096, 512, 3), (7, 4096, 512, 1), (4, 10**6, 512, 4), (16, 100, 512, 1)],
)
def test_trl_takes_as_many_pairs_at_once_as_the_token_budget_holds(
    batch_size: int, micro_batch_tokens: int, max_length: int, pairs: int
) -> None:
    table = {"batch_size": batch_size, "micro_batch_tokens": micro_batch_tokens}
    assert per_device_batch_size(tiny_run.recipe(train=table, data={"max_length": max_length})) == pairs
