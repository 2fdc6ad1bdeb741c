"""Every loss: equal to TRL's where TRL has it, to a worked number where not, and to DPO at its limits."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from pydantic import TypeAdapter
from torch import Tensor
from trl_trainer import inputs, our_losses, stirred_trainer

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import Logps, LossColumns, compute_losses, concat_logps, dynamic_beta
from qlora_dpo.preference.pack import collate, micro_batches
from qlora_dpo.preference.token_weights import make_token_weighting
from qlora_dpo.recipe.objective import OBJECTIVE_TABLES, BetaDpo, Objective, loss_types
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training import train_step
from qlora_dpo.training.loop import train_loop
from qlora_dpo.training.trl_engine import check_trl_supports

pytestmark = tiny_run.LIBRARIES_WARN

READER: TypeAdapter[Any] = TypeAdapter(Objective)
ALL = [name for table in OBJECTIVE_TABLES for name in loss_types(table)]
NEEDED: dict[str, dict[str, Any]] = {
    "robust": {"label_smoothing": 0.1},
    "sum": {"loss_weights": {"sigmoid": 0.8, "bco_pair": 0.2}},
    "odpo": {"score_columns": ["better", "worse"]},
}


def table(loss_type: str, **keys: Any) -> Any:
    return READER.validate_python({"loss_type": loss_type, **NEEDED.get(loss_type, {}), **keys})


# --- the same as TRL's

TRLS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    **{name: {} for name in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")},
    **{name: {} for name in ("sigmoid_norm", "discopop", "aot", "aot_unpaired", "robust")},
    "exo_pair": {"label_smoothing": 0.1},
    "robust at another beta": {"beta": 0.7, "label_smoothing": 0.3},
    "aot with smoothing": {"label_smoothing": 0.2},
    "discopop at another tau": {"discopop_tau": 0.3, "beta": 0.5},
    "sigmoid: forward_kl": {"f_divergence_type": "forward_kl"},
    "sigmoid: js_divergence": {"f_divergence_type": "js_divergence"},
    "sigmoid: alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ipo: js_divergence": {"f_divergence_type": "js_divergence"},
    "sigmoid: LD": {"ld_alpha": 0.4},
    "ipo: LD": {"ld_alpha": 0.0},
    "sigmoid: WPO": {"use_weighting": True},
    "apo_zero: WPO": {"use_weighting": True},
    "sum": {},
}


@pytest.mark.parametrize("case", TRLS)
def test_loss_and_gradients_are_those_of_trl(case: str, tmp_path: Path) -> None:
    name = case.replace(":", " ").split()[0]
    what = {"loss_type": name, **NEEDED.get(name, {}), **TRLS[case]}
    model, job, trainer = stirred_trainer("none", tmp_path, objective=what)
    loss = trainer.compute_loss(trainer.model, inputs(job, trainer))
    loss.backward()
    expected = tiny_run.gradients(model)
    model.zero_grad()
    if "ld_alpha" in what:  # the reference weighs the same tokens
        packing = replace(tiny_run.PACKED, token_weighting=make_token_weighting(job.recipe.objective))
        with model.disable_adapter():
            scores = score_batch(model, collate(job.train.pairs[:4], packing), tiny_run.CPU)
        job.train.reference_P2[:4] = torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], 1).detach()
    losses = our_losses(model, job)
    losses.total_P.mean().backward()
    assert losses.total_P.mean().item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert tiny_run.apart(tiny_run.gradients(model), expected) < 2e-5


@pytest.mark.parametrize("name", [name for name in ALL if name not in {case.split()[0].strip(":") for case in TRLS}])
def test_what_trl_does_not_have_is_refused_for_its_engine(name: str) -> None:
    with pytest.raises(RecipeError) as error:
        check_trl_supports(table(name))
    assert str(error.value) == (
        f'[objective] has loss_type = "{name}", which TRL\'s DPOTrainer does not have; leave it out, or set '
        'train.engine = "qlora_dpo"'
    )


# --- worked numbers

WORKED: dict[str, tuple[Any, float]] = {
    # log-ratios of 1 and -2 nats, so a margin of 3; 4 and 5 tokens; log-probabilities of -8 and -12
    "dpop, nothing lost": (table("dpop", beta=0.5), math.log1p(math.exp(-1.5))),
    "rdpo": (table("rdpo", beta=0.5, length_alpha=0.2), math.log1p(math.exp(-(1.5 - 0.2)))),
    "odpo": (table("odpo", beta=0.5, odpo_alpha=0.5), math.log1p(math.exp(-(1.5 - 0.5 * math.log(4))))),
    # the authors' code: -ln s(3) + ((1 - 1)^2 + (-2 + 1)^2) / 2
    "cal_dpo": (table("cal_dpo", beta=0.5), math.log1p(math.exp(-3)) + 0.5),
    # means of -2 and -2.4: 2 * 0.4 - 0.5
    "simpo": (table("simpo", beta=2.0, simpo_gamma=0.5), math.log1p(math.exp(-(0.8 - 0.5)))),
    # (1 - e^(0.5 * 2)) / 0.5 and (1 - e^(0.5 * 2.4)) / 0.5
    "alphapo": (
        table("alphapo", beta=2.0, simpo_gamma=0.5, alphapo_alpha=0.5),
        math.log1p(math.exp(-(2 * ((1 - math.exp(1)) / 0.5 - (1 - math.exp(1.2)) / 0.5) - 0.5))),
    ),
    "cpo": (table("cpo", beta=0.5, sft_weight=0.0), math.log1p(math.exp(-2))),
    # odds e^-2 / (1 - e^-2) against e^-2.4 / (1 - e^-2.4)
    "orpo": (
        table("orpo", beta=0.3, sft_weight=0.0),
        0.3 * math.log1p((math.exp(-2.4) / (1 - math.exp(-2.4))) / (math.exp(-2) / (1 - math.exp(-2)))),
    ),
    "sft": (table("sft"), 2.0),
    # the other answer's log-ratio of -2 is no distance; s(-0.5 * 1)
    "kto, good": (table("kto", beta=0.5), 1 / (1 + math.exp(0.5))),
    "kto, bad": (table("kto", beta=0.5, undesirable_weight=3.0), 3 / (1 + math.exp(-0.5))),
    "margin": (table("sigmoid", beta=0.5, margin_column="m"), math.log1p(math.exp(-(1.5 - 0.7)))),
    "sum": (
        table("sum", beta=0.5, loss_weights={"hinge": 2.0, "bco_pair": 0.5}),
        0.5 * (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1))),
    ),
}


def worked(free: bool = False) -> Logps:
    reference_P2 = torch.zeros(1, 2) if free else torch.tensor([[-9.0, -10.0]])
    columns = LossColumns(torch.tensor([1.0]), torch.tensor([0.7]), torch.tensor([[5.0, 1.0]]), torch.tensor([True]))
    one = [torch.tensor([value]) for value in (-8.0, -12.0, 4.0, 5.0)]
    return Logps(*one, reference_P2, one[0], None, columns)


@pytest.mark.parametrize("case", WORKED)
def test_the_loss_of_one_pair_is_the_number_worked_by_hand(case: str) -> None:
    what, expected = WORKED[case]
    free = what.loss_type in ("simpo", "alphapo", "cpo", "orpo", "sft")
    logps = worked(free)
    if case != "margin":  # only this one asks for a column of margins
        logps = replace(logps, columns=replace(logps.columns, margin_P=None))  # type: ignore[type-var]
    if case == "kto, bad":
        logps = replace(logps, columns=replace(logps.columns, label_P=torch.tensor([False])))  # type: ignore[type-var]
    assert compute_losses(logps, what).total_P.item() == pytest.approx(expected, rel=1e-5)


def test_kto_measures_a_good_answer_by_how_far_the_policy_is_from_the_reference() -> None:
    logps = replace(worked(), reference_P2=torch.tensor([[-9.0, -13.5]]))  # the other answer is 1.5 nats likelier
    losses = compute_losses(logps, table("kto", beta=0.5))
    assert losses.total_P.item() == pytest.approx(1 / (1 + math.exp(0.5 * (1.0 - 1.5))), rel=1e-6)
    assert losses.rewards_P2.tolist() == [[0.5, 0.75]]


def test_dpop_counts_what_the_chosen_answer_loses() -> None:
    logps = replace(worked(), reference_P2=torch.tensor([[-7.5, -10.0]]))  # the chosen one is 0.5 nats less likely
    found = compute_losses(logps, table("dpop", beta=0.5, dpop_lambda=2.0)).total_P.item()
    assert found == pytest.approx(math.log1p(math.exp(-0.5 * (1.5 - 2.0 * 0.5))), rel=1e-6)


# --- limits and identities


def random_logps(count: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> Logps:
    generator = torch.Generator().manual_seed(seed)
    values = -20 * torch.rand(count, 4, generator=generator, dtype=dtype)
    tokens = torch.randint(3, 30, (count, 2), generator=generator).to(dtype)
    scores_P2 = torch.rand(count, 2, generator=generator, dtype=dtype) + torch.tensor([1.0, 0.0])
    return Logps(
        values[:, 0],
        values[:, 1],
        tokens[:, 0],
        tokens[:, 1],
        values[:, 2:],
        values[:, 0],
        None,
        LossColumns(scores_P2=scores_P2, label_P=torch.arange(count) % 2 == 0),
    )


AS_DPO = {
    "beta-DPO with alpha 0": table("beta_dpo", beta_alpha=0.0),
    "DPOP with lambda 0": table("dpop", dpop_lambda=0.0),
    "R-DPO with alpha 0": table("rdpo", length_alpha=0.0),
    "ODPO with alpha 0": table("odpo", odpo_alpha=0.0),
    "alpha divergence at 1": table("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    "a sum of one": table("sum", loss_weights={"sigmoid": 1.0}),
}


@pytest.mark.parametrize("case", AS_DPO)
def test_at_its_limit_a_loss_is_dpo(case: str) -> None:
    logps = random_logps()
    torch.testing.assert_close(
        compute_losses(logps, AS_DPO[case]).total_P, compute_losses(logps, table("sigmoid")).total_P
    )


def test_alphapo_is_simpo_as_alpha_goes_to_0() -> None:
    logps = replace(random_logps(), reference_P2=torch.zeros(6, 2, dtype=torch.float64))
    simpo = compute_losses(logps, table("simpo")).total_P
    torch.testing.assert_close(compute_losses(logps, table("alphapo", alphapo_alpha=0.0)).total_P, simpo)
    torch.testing.assert_close(
        compute_losses(logps, table("alphapo", alphapo_alpha=1e-7)).total_P, simpo, rtol=1e-5, atol=1e-5
    )


def test_orpo_is_finite_where_an_answer_is_all_but_certain() -> None:
    sure = torch.tensor([-1e-7, -50.0, -0.7], requires_grad=True)
    one = torch.ones(3)
    logps = Logps(sure, torch.tensor([-3.0, -3.0, -1e-9]), one, one, torch.zeros(3, 2), sure)
    total_P = compute_losses(logps, table("orpo")).total_P
    total_P.sum().backward()
    assert total_P.isfinite().all() and sure.grad is not None and sure.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_the_slope_is_that_of_autograd_and_finite_far_out(name: str) -> None:
    what = table(name)
    logps = random_logps()
    leaves = {key: getattr(logps, key).clone().requires_grad_() for key in ("chosen_logp_P", "rejected_logp_P")}

    def total(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        return compute_losses(replace(logps, chosen_logp_P=chosen_P, rejected_logp_P=rejected_P), what).total_P.sum()

    assert torch.autograd.gradcheck(total, tuple(leaves.values()))
    if name == "discopop":  # its exponential part grows without bound for hopeless pairs only where it is blended in
        return
    far = random_logps(2, torch.float32)
    chosen_P = torch.tensor([-1e4, -1.0], requires_grad=True)
    losses = compute_losses(replace(far, chosen_logp_P=chosen_P, chosen_logp_all_P=chosen_P), what)
    losses.total_P.sum().backward()
    assert losses.total_P.isfinite().all() or name == "alphapo"  # whose reward is e to the mean log-probability


@pytest.mark.parametrize("name", ALL)
def test_the_loss_of_a_pair_is_multiplied_by_its_weight(name: str) -> None:
    logps, weight_P = random_logps(), torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    weighed = replace(logps, columns=replace(logps.columns, weight_P=weight_P))  # type: ignore[type-var]
    torch.testing.assert_close(
        compute_losses(weighed, table(name)).total_P, weight_P * compute_losses(logps, table(name)).total_P
    )


def test_dynamic_beta_follows_the_margins_as_the_authors_code_does() -> None:
    what = BetaDpo(loss_type="beta_dpo", beta_alpha=0.6, beta_momentum=0.9)
    beta, mean = dynamic_beta(torch.tensor([1.0, 3.0]), 0.5, what, 0.1)
    assert mean == pytest.approx(0.9 * 0.5 + 0.1 * 2.0)
    assert beta == pytest.approx(0.1 * (1 + 0.6 * (2.0 - mean)))
    assert dynamic_beta(torch.tensor([-100.0]), 0.0, what, 0.1)[0] == 1e-3


def test_the_parts_of_a_step_are_put_together_in_order() -> None:
    whole = random_logps()
    parts = [
        Logps(
            *(getattr(whole, name)[some] for name in ("chosen_logp_P", "rejected_logp_P", "chosen_tokens_P")),
            whole.rejected_tokens_P[some],
            whole.reference_P2[some],
            whole.chosen_logp_all_P[some],
            None,
            whole.columns.select(some),  # type: ignore[union-attr]
        )
        for some in ([0, 1], [2], [3, 4, 5])
    ]
    found = concat_logps(parts)
    for name, value in whole.items().items():
        assert torch.equal(found.items()[name], value), name
    assert torch.equal(found.columns.scores_P2, whole.columns.scores_P2)  # type: ignore[union-attr,arg-type]


# --- in training


@pytest.mark.parametrize(
    "name",
    [
        *("aot", "beta_dpo", "sampo", "sum"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_unpaired", "orpo", "sft")),
    ],
)
def test_the_token_budget_changes_no_adapter(name: str, tmp_path: Path) -> None:
    runs = []
    for budget in (1, 5000):
        AcceleratorState._reset_state(True)
        what = tiny_run.recipe(
            objective={"loss_type": name, **NEEDED.get(name, {})},
            train={"micro_batch_tokens": budget, "num_train_epochs": 2},
        )
        model = tiny_run.fresh(what)
        folder = tmp_path / str(budget)
        folder.mkdir()
        job = tiny_run.job(model, what, folder)
        with RunLog(folder, job.data_order.total_steps) as tracker:
            train_loop(model, job, tiny_run.start(job), tracker)
        runs.append((tiny_run.adapter(model), read_metrics(folder / METRICS)))
    assert tiny_run.all_apart(runs[0][0], runs[1][0]) < 2e-5
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        for key in ("loss", "preference_loss", "eval_loss", "grad_norm", "num_tokens"):
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=2e-4, abs=2e-5), (key, one["step"])


def test_a_loss_over_a_whole_step_has_the_gradient_of_one_pass(tmp_path: Path) -> None:
    what = tiny_run.recipe(
        objective={"loss_type": "aot"}, train={"batch_size": 8, "micro_batch_tokens": 40, "max_steps": 1}
    )
    model = tiny_run.stirred(tiny_run.fresh(what))
    job = tiny_run.job(model, what, tmp_path)
    assert len(micro_batches([job.train.pairs[i] for i in job.data_order.batch_indices(1)], job.packing)) > 2
    some = job.data_order.batch_indices(1)
    scores = score_batch(model, collate([job.train.pairs[i] for i in some], tiny_run.PACKED), tiny_run.CPU)
    compute_losses(scores.with_reference(job.train.reference_P2[some]), what.objective).total_P.mean().backward()
    expected = tiny_run.gradients(model).norm()
    model.zero_grad()
    with RunLog(tmp_path, 1) as tracker:
        train_loop(model, job, tiny_run.start(job), tracker)
    logged = next(record for record in read_metrics(tmp_path / METRICS) if record["kind"] == "train")
    assert logged["grad_norm"] == pytest.approx(float(expected), rel=1e-5)
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all() for parameter in trainable_parameters(model).values()
    )


def test_a_loss_over_a_whole_step_asks_twice_with_the_same_dropout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = tiny_run.recipe(
        objective={"loss_type": "aot"},
        train={"batch_size": 8, "micro_batch_tokens": 40, "max_steps": 1},
        lora={"lora_dropout": 0.5},
    )
    model = tiny_run.stirred(tiny_run.fresh(what)).train()
    job = tiny_run.job(model, what, tmp_path)
    asked = list[Tensor]()

    def seen(*given: Any, **more: Any) -> Any:
        found = score_batch(*given, **more)
        asked.append(found.chosen_logp_P.detach())
        return found

    monkeypatch.setattr(train_step, "score_batch", seen)
    train_step.accumulate_gradients(model, job, tiny_run.start(job), job.packing, lambda loss: loss.backward())
    once, again = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    assert len(once) == len(again) > 2
    assert all(torch.equal(first, second) for first, second in zip(once, again, strict=True))
    with torch.no_grad():  # and it is dropout that differs from one time to another
        seen(model, collate([job.train.pairs[i] for i in range(8)], job.packing), tiny_run.CPU)
        seen(model, collate([job.train.pairs[i] for i in range(8)], job.packing), tiny_run.CPU)
    assert not torch.equal(asked[-1], asked[-2])


def test_sampo_counts_as_many_tokens_of_both_answers_the_same_each_time() -> None:
    weigh = make_token_weighting(table("sampo"))
    assert weigh is not None
    for pair in tiny_run.pairs(20):
        chosen, rejected = weigh.weights(pair)
        assert (len(chosen), len(rejected)) == (len(pair.chosen), len(pair.rejected))
        assert sum(chosen) == sum(rejected) == min(len(chosen), len(rejected))
        assert (chosen, rejected) == weigh.weights(pair)


def test_ld_weighs_what_lies_beyond_the_shorter_answer() -> None:
    weigh = make_token_weighting(table("sigmoid", ld_alpha=0.25))
    assert weigh is not None and make_token_weighting(table("sigmoid", ld_alpha=1.0)) is None
    pair = replace(tiny_run.pairs(1)[0], chosen=(5, 6), rejected=(7, 8, 9, 10))
    assert weigh.weights(pair) == ([1.0, 1.0], [1.0, 1.0, 0.25, 0.25])
