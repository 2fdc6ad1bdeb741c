"""A training step is the same however it is cut, moves every LoRA weight and nothing else, and is told as it was."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.errors import RunError
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.model.quantized import dequantized, linear4bit_layers
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import compute_losses
from qlora_dpo.preference.pack import collate, micro_batches
from qlora_dpo.recipe.objective import Sigmoid
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training import nonfinite
from qlora_dpo.training.checkpoint.state import StepTotals, TrainState
from qlora_dpo.training.context import PreferenceDataset
from qlora_dpo.training.evaluate import evaluate
from qlora_dpo.training.loop import train_loop
from qlora_dpo.training.train_step import accumulate_gradients

pytestmark = tiny_run.LIBRARIES_WARN

PAIRS = tiny_run.pairs(8)


def train(
    folder: Path, quantization: str = "none", model: PeftModel | None = None, **tables: dict[str, Any]
) -> tuple[PeftModel, TrainState, list[dict[str, Any]]]:
    """Train the tiny model in `folder`: the model, the final state and the metrics."""
    what = tiny_run.recipe(quantization, **tables)
    folder.mkdir(exist_ok=True)
    model = model or tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder)
    with RunLog(folder, job.data_order.total_steps) as tracker:
        state = train_loop(model, job, tiny_run.start(job), tracker)
    return model, state, read_metrics(folder / METRICS)


def step_gradient(
    model: PeftModel,
    reference_P2: Tensor,
    groups: list[list[int]],
    table: Sigmoid,
    pairs: Sequence[EncodedPair] = PAIRS,
) -> Tensor:
    """The gradient of the mean loss over all pairs, summed over micro-batches."""
    model.zero_grad()
    for group in groups:
        scores = score_batch(model, collate([pairs[i] for i in group], tiny_run.PACKED), tiny_run.CPU)
        (compute_losses(scores.with_reference(reference_P2[group]), table).total_P.sum() / len(pairs)).backward()
    return tiny_run.gradients(model)


def test_a_reference_that_is_computed_in_a_step_is_not_computed_again(tmp_path: Path) -> None:
    what = tiny_run.recipe(train={"num_train_epochs": 2})
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, tmp_path)
    known_P2 = job.train.reference_P2.clone()
    job.train.reference_P2[:] = torch.nan
    before = job.reference_cache.local_computed
    with RunLog(tmp_path, job.data_order.total_steps) as tracker:
        train_loop(model, job, tiny_run.start(job), tracker)
    assert torch.allclose(job.train.reference_P2, known_P2)
    assert job.reference_cache.local_computed == before + len(job.train.pairs)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_gradient_of_a_step_does_not_depend_on_the_micro_batches(quantization: str) -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe(quantization)))
    reference_P2 = -30 * torch.rand(len(PAIRS), 2, generator=torch.Generator().manual_seed(0))
    table = Sigmoid(sft_weight=0.3, label_smoothing=0.1)
    whole = step_gradient(model, reference_P2, [list(range(len(PAIRS)))], table)
    for budget in (1, 100, 200):
        cut = step_gradient(
            model, reference_P2, micro_batches(PAIRS, replace(tiny_run.PACKED, token_budget=budget)), table
        )
        assert tiny_run.apart(cut, whole) < 1e-5, budget


def test_the_short_last_step_of_an_epoch_is_the_mean_over_its_own_pairs(tmp_path: Path) -> None:
    what = tiny_run.recipe(train={"max_grad_norm": 1e9})
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, tmp_path)  # ten pairs in steps of four: the third step has two
    last = job.data_order.batch_indices(3)
    assert (len(last), job.data_order.total_steps) == (2, 3)
    tracker = RunLog(tmp_path, 3)
    said, expected = tracker.step, list[torch.Tensor]()

    def step(number: int) -> None:
        said(number)
        if number == 2:
            for pair in last:  # one at a time
                some, reference_P2 = [job.train.pairs[pair]], job.train.reference_P2[[pair]]
                expected.append(step_gradient(model, reference_P2, [[0]], what.objective, some))
            model.zero_grad()

    tracker.step = step  # type: ignore[method-assign]
    with tracker:
        train_loop(model, job, tiny_run.start(job), tracker)
    logged = [record["grad_norm"] for record in read_metrics(tmp_path / METRICS) if record["kind"] == "train"]
    assert logged[2] == pytest.approx(float(torch.stack(expected).mean(0).norm()), rel=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_token_budget_changes_neither_the_adapter_nor_what_is_logged(quantization: str, tmp_path: Path) -> None:
    runs = []
    for budget in (1, 100, 5000):
        AcceleratorState._reset_state(True)
        tables = {"train": {"micro_batch_tokens": budget, "num_train_epochs": 2}, "objective": {"sft_weight": 0.5}}
        runs.append(train(tmp_path / str(budget), quantization, **tables))
    (model, _, metrics), *others = runs
    for other, _, lines in others:
        assert tiny_run.all_apart(tiny_run.adapter(other), tiny_run.adapter(model)) < 1e-5
        for line, expected in zip(lines, metrics, strict=True):
            for name in sorted(expected.keys() - VARYING - {"name", "sentence"}):
                # of margins this small, rounding is a hundredth
                room = 2e-3 if name == "eval_length_correlation" else 2e-5
                assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=room), (name, expected["step"])


# a rounding error decides between a tie and a preference while policy and reference are still the same
VARYING = {
    "kind",
    "pairs_per_second",
    "tokens_per_second",
    "seconds",
    "memory_bytes",
    "eval_ties",
    "rewards/accuracies",
    "eval_rewards/accuracies",
}


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_an_evaluation_does_not_depend_on_the_token_budget(budget: int) -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()))
    side = PreferenceDataset(PAIRS, -30 * torch.rand(len(PAIRS), 2, generator=torch.Generator().manual_seed(0)))
    table = Sigmoid(sft_weight=0.3)
    expected, found = (
        evaluate(model, side, table, replace(tiny_run.PACKED, token_budget=tokens), tiny_run.CPU)
        for tokens in (200, budget)
    )
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"seconds"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def test_an_evaluation_leaves_the_model_in_its_mode_and_weights() -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe())).train()
    before = tiny_run.adapter(model)
    evaluate(model, PreferenceDataset(PAIRS, torch.zeros(8, 2)), Sigmoid(), tiny_run.PACKED, tiny_run.CPU)
    assert model.training
    assert tiny_run.all_apart(tiny_run.adapter(model), before) == 0


def test_a_tie_counts_as_half_a_right_answer() -> None:
    model = tiny_run.base_model()
    batch = score_batch(model, collate(PAIRS, tiny_run.PACKED), tiny_run.CPU)
    reference_P2 = torch.stack([batch.chosen_logp_P, batch.rejected_logp_P], 1).detach()
    reference_P2[:2, 0] -= 1  # two pairs are right by 1 nat, one is wrong by 1, five are ties
    reference_P2[2, 0] += 1
    found = evaluate(model, PreferenceDataset(PAIRS, reference_P2), Sigmoid(), tiny_run.PACKED, tiny_run.CPU)
    assert (found["eval_rewards/accuracies"], found["eval_ties"], found["eval_pairs"]) == (4.5 / 8, 5, 8)
    assert found["eval_rewards/margins"] == pytest.approx(0.1 * (2 - 1) / 8)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_ten_small_steps_move_nearly_every_lora_weight(quantization: str, tmp_path: Path) -> None:
    tables = {"train": {"learning_rate": 5e-6, "num_train_epochs": 4, "max_steps": 10}}
    before = tiny_run.adapter(tiny_run.fresh(tiny_run.recipe(quantization, **tables)))
    model, _, _ = train(tmp_path, quantization, **tables)
    after = tiny_run.adapter(model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    for part in ("lora_A", "lora_B"):
        moved = torch.cat([(after[name] != before[name]).flatten() for name in after if part in name])
        assert moved.float().mean() > 0.99, part


@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_training_leaves_every_bit_of_a_4_bit_base_as_it_was(dtype: Any, tmp_path: Path) -> None:
    what = tiny_run.recipe("nf4", train={"num_train_epochs": 2})
    place = tiny_run.device.select_device(dtype)
    model = tiny_run.fresh(what, place)
    job = tiny_run.job(model, what, tmp_path, place=place)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    weights = {name: dequantized(layer).clone() for name, layer in linear4bit_layers(model).items()}
    with RunLog(tmp_path, job.data_order.total_steps) as tracker:
        train_loop(model, job, tiny_run.start(job), tracker)
    now = dict(model.named_parameters())
    assert len(weights) == 14
    assert [name for name, value in frozen.items() if not torch.equal(now[name], value)] == []
    layers = linear4bit_layers(model)
    assert [name for name, value in weights.items() if not torch.equal(dequantized(layers[name]), value)] == []


def test_gradient_checkpointing_does_not_change_the_steps(tmp_path: Path) -> None:
    plain, _, _ = train(tmp_path / "plain", "nf4")
    AcceleratorState._reset_state(True)
    recomputed, _, _ = train(tmp_path / "recomputed", "nf4", train={"gradient_checkpointing": True})
    assert tiny_run.all_apart(tiny_run.adapter(recomputed), tiny_run.adapter(plain)) < 1e-6


def test_training_lowers_the_loss_on_what_it_trains_on(tmp_path: Path) -> None:
    _, _, metrics = train(tmp_path, train={"num_train_epochs": 10, "learning_rate": 1e-2})
    epochs = [line for line in metrics if line["kind"] == "train"]
    assert max(line["loss"] for line in epochs[-3:]) < min(line["loss"] for line in epochs[:3])
    assert [line["rewards/accuracies"] for line in epochs[-3:]] == [1.0, 1.0, 1.0]


def test_the_first_step_has_ln_2_and_no_margin(tmp_path: Path) -> None:
    _, _, metrics = train(tmp_path, train={"max_steps": 1})
    untrained, first = metrics[0], metrics[1]
    assert untrained["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert untrained[f"eval_{name}"] == pytest.approx(0, abs=1e-5)
        assert first[name] == pytest.approx(0, abs=1e-5)


def test_the_learning_rate_of_each_step_is_the_one_it_took(tmp_path: Path) -> None:
    _, _, metrics = train(tmp_path, train={"num_train_epochs": 2, "warmup_steps": 2})
    rates = [line["learning_rate"] for line in metrics if line["kind"] == "train"]
    assert rates == pytest.approx([0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize(
    ("train_table", "logged", "evaluated"),
    [
        ({"logging_steps": 4}, [1, 4, 6], [0, 3, 6]),
        ({"logging_steps": 100, "eval_steps": 4}, [1, 6], [0, 4, 6]),
        ({"logging_steps": 5, "max_steps": 4}, [1, 4], [0, 3, 4]),
    ],
)
def test_logging_and_evaluation_come_when_the_recipe_says(
    train_table: dict[str, Any], logged: list[int], evaluated: list[int], tmp_path: Path
) -> None:
    _, state, metrics = train(tmp_path, train={"num_train_epochs": 2, **train_table})
    assert [line["step"] for line in metrics if line["kind"] == "train"] == logged
    assert [line["step"] for line in metrics if line["kind"] == "eval"] == evaluated
    assert [each["step"] for each in state.evals] == evaluated


MEANS = {
    "loss",
    "preference_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
}
RUNNING = {"learning_rate", "grad_norm", "num_tokens", "pairs_per_second", "tokens_per_second", "seconds"}


@pytest.mark.parametrize(("sft_weight", "extra"), [(0.0, set()), (0.5, {"sft_loss"})])
def test_metrics_have_trls_names(sft_weight: float, extra: set[str], tmp_path: Path) -> None:
    _, _, metrics = train(tmp_path, train={"max_steps": 1}, objective={"sft_weight": sft_weight})
    common = {"kind", "step", "epoch"}
    assert metrics[1].keys() == MEANS | extra | RUNNING | common | {"memory_bytes"}
    assert metrics[0].keys() == {f"eval_{name}" for name in MEANS | extra} | common | {
        "eval_pairs",
        "eval_ties",
        "eval_loss_stderr",
        "eval_logps/chosen_per_token",
        "eval_kl",
        "seconds",
    }


def test_a_logged_line_is_the_mean_over_all_pairs_since_the_last(tmp_path: Path) -> None:
    # ten pairs in steps of 4, 4 and 2: the last line covers steps 2 and 3, six pairs
    _, _, each = train(tmp_path / "each", train={"logging_steps": 1})
    AcceleratorState._reset_state(True)
    _, _, rare = train(tmp_path / "rare", train={"logging_steps": 3})
    two, three = [line for line in each if line["kind"] == "train"][1:]
    last = [line for line in rare if line["kind"] == "train"][-1]
    assert last["loss"] == pytest.approx((4 * two["loss"] + 2 * three["loss"]) / 6, rel=1e-6)
    assert last["num_tokens"] == three["num_tokens"]


def test_a_weight_that_is_not_finite_is_refused_by_name_with_the_steps_rows(tmp_path: Path) -> None:
    what = tiny_run.recipe()
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, tmp_path)
    name, weight = next(iter(trainable_parameters(model).items()))
    weight.data[0, 0] = float("nan")
    before = copy.deepcopy(tiny_run.adapter(model))
    rows = ", ".join(str(job.train.pairs[i].row) for i in job.data_order.batch_indices(1))
    with RunLog(tmp_path, job.data_order.total_steps) as tracker, pytest.raises(RunError) as error:
        train_loop(model, job, tiny_run.start(job), tracker)
    assert str(error.value) == (
        f"step 1: the weight {name} is not finite, so nothing was changed; the step's pairs are rows {rows} of "
        "data.train; look at them, or lower train.learning_rate"
    )
    assert all(torch.equal(value.nan_to_num(), before[n].nan_to_num()) for n, value in tiny_run.adapter(model).items())


def test_a_reference_that_is_not_finite_is_found_by_the_row_of_its_pair(tmp_path: Path) -> None:
    what = tiny_run.recipe()
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, tmp_path)
    pair = job.data_order.batch_indices(1)[2]
    job.train.reference_P2[pair, 0] = float("inf")
    before = tiny_run.adapter(model)
    with RunLog(tmp_path, job.data_order.total_steps) as tracker, pytest.raises(RunError) as error:
        train_loop(model, job, tiny_run.start(job), tracker)
    assert str(error.value).startswith(f"step 1: the loss of row {job.train.pairs[pair].row} is not finite, so nothing")
    assert tiny_run.all_apart(tiny_run.adapter(model), before) == 0


def test_a_gradient_that_overflows_is_found_by_the_name_of_its_weight(tmp_path: Path) -> None:
    what = tiny_run.recipe()
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, tmp_path)
    name, weight = list(trainable_parameters(model).items())[3]
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with RunLog(tmp_path, job.data_order.total_steps) as tracker, pytest.raises(RunError) as error:
        train_loop(model, job, tiny_run.start(job), tracker)
    assert str(error.value).startswith(f"step 1: the gradient of {name} is not finite, so nothing was changed; ")


def test_a_learning_rate_that_blows_the_weights_up_ends_the_run_and_saves_nothing(tmp_path: Path) -> None:
    tables = {"train": {"learning_rate": 1e30, "max_grad_norm": 1e9, "save_steps": 1, "num_train_epochs": 5}}
    with pytest.raises(RunError, match="is not finite"):
        train(tmp_path, **tables)
    for file in tmp_path.rglob("adapter.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())


def test_steps_skipped_in_a_row_are_counted_apart_from_all() -> None:
    state, counts = TrainState(0, {}, {}), []
    for skipped in (True, True, False, True):
        state.commit(StepTotals(1, 1, 0.0, 0.0, 0, 0.0), 1, skipped=skipped)
        counts.append((state.skipped_steps, state.skipped_in_a_row))
    assert counts == [(1, 1), (2, 2), (2, 0), (3, 1)]


def test_scaled_gradients_may_overflow_four_times_in_a_row_but_not_five() -> None:
    nonfinite.check_finite(7, float("inf"), {}, [3], [3, 4], scaled=True)
    nonfinite.check_skipped_steps(7, 4, {}, [], [3, 4])
    with pytest.raises(RunError) as error:
        nonfinite.check_skipped_steps(7, 5, {}, [], [3, 4])
    assert str(error.value) == (
        "step 7: the norm of the gradient is not finite, so nothing was changed; the step's pairs are rows 3, 4 of "
        "data.train; look at them, or lower train.learning_rate; 5 steps in a row were skipped"
    )


@pytest.mark.parametrize("scaled", [True, False])
def test_a_loss_that_is_not_finite_beside_a_finite_gradient_is_refused(scaled: bool) -> None:
    with pytest.raises(RunError, match="step 7: the loss of row 3 is not finite"):
        nonfinite.check_finite(7, 1.0, {}, [3], [3, 4], scaled=scaled)


def test_in_fp16_a_loss_that_is_not_finite_is_told_to_be_an_overflow() -> None:
    with pytest.raises(RunError) as error:
        nonfinite.check_finite(1, float("nan"), {}, [3], [3, 4], scaled=False, fp16=True)
    assert str(error.value) == (
        "step 1: the loss of row 3 is not finite, so nothing was changed; the step's pairs are rows 3, 4 of "
        'data.train; they may overflow fp16, which ends at 65,504: set model.dtype = "fp32", or take a card with '
        "bf16 (compute capability 8.0 or newer)"
    )
    weights = {"a": torch.nn.Parameter(torch.tensor([float("nan")]))}  # then it is no overflow of a pair's
    with pytest.raises(RunError, match=r"the weight a is not finite.* lower train\.learning_rate$"):
        nonfinite.check_finite(1, float("nan"), weights, [3], [3, 4], scaled=False, fp16=True)


def test_the_logged_gradient_norm_is_that_of_the_mean_loss(tmp_path: Path) -> None:
    tables = {"train": {"max_steps": 1, "batch_size": 8, "max_grad_norm": 1e-3}}
    what = tiny_run.recipe(**tables)
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, tmp_path, train=8)
    expected = step_gradient(model, job.train.reference_P2, [list(range(8))], what.objective).norm()
    model.zero_grad()
    with RunLog(tmp_path, job.data_order.total_steps) as tracker:
        train_loop(model, job, tiny_run.start(job), tracker)
    (line,) = [each for each in read_metrics(tmp_path / METRICS) if each["kind"] == "train"]
    assert line["grad_norm"] == pytest.approx(float(expected), rel=1e-4)


def test_dropout_works_in_training_and_not_in_an_evaluation(tmp_path: Path) -> None:
    what = tiny_run.recipe(lora={"lora_dropout": 0.5}, train={"max_steps": 3})
    kept = []
    for seed in (1, 2):
        AcceleratorState._reset_state(True)
        model = tiny_run.stirred(tiny_run.fresh(what))  # in evaluation mode, as after asking the reference
        job = tiny_run.job(model, what, tmp_path / str(seed))
        torch.manual_seed(seed)
        with RunLog(tmp_path / str(seed), job.data_order.total_steps) as tracker:
            train_loop(model, job, tiny_run.start(job), tracker)
        kept.append(tiny_run.adapter(model))
    assert tiny_run.all_apart(kept[0], kept[1]) > 1e-4
    side = PreferenceDataset(PAIRS, torch.zeros(8, 2))
    first, second = (evaluate(model.train(), side, Sigmoid(), tiny_run.PACKED, tiny_run.CPU) for _ in range(2))
    assert first["eval_loss"] == second["eval_loss"]


@pytest.mark.parametrize("loss", ["sigmoid", "beta_dpo"])
def test_a_step_changes_nothing_but_gradients_until_it_is_committed(loss: str, tmp_path: Path) -> None:
    what = tiny_run.recipe(objective={"loss_type": loss}, train={"batch_size": 8, "micro_batch_tokens": 60})
    model = tiny_run.stirred(tiny_run.fresh(what)).train()
    context = tiny_run.job(model, what, tmp_path)
    context.train.reference_P2[:] = torch.nan  # computed along with the step, and kept by the commit alone
    state = tiny_run.start(context)
    before, reference_P2 = copy.deepcopy(vars(state)), context.train.reference_P2.clone()
    computed, results, gradients = context.reference_cache.num_computed(), [], []
    for _ in range(2):
        results.append(accumulate_gradients(model, context, state, context.packing, lambda loss: loss.backward()))
        gradients.append(tiny_run.gradients(model))
    assert vars(state) == before
    assert context.train.reference_P2.isnan().equal(reference_P2.isnan())
    assert context.reference_cache.num_computed() == computed
    assert torch.equal(*gradients)  # a second attempt begins anew
    one, other = results
    assert (one.totals, one.nonfinite, one.reference_indices) == (
        other.totals,
        other.nonfinite,
        other.reference_indices,
    )
    assert sorted(one.reference_indices) == sorted(context.data_order.batch_indices(1))
    state.commit(one.totals, 8, skipped=False)
    assert (state.step, state.since_eval.pairs, state.num_tokens) == (1, 8, one.totals.tokens)
