"""The losses as mathematics: worked numbers and identities."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter

from qlora_dpo.preference.metrics import make_metric_sums
from qlora_dpo.preference.objective import Logps, Losses, compute_losses, dpo, sft
from qlora_dpo.recipe.objective import Objective, Sigmoid, reward_beta

RECIPE_OBJECTIVE: TypeAdapter[Objective] = TypeAdapter(Objective)
MARGINS = torch.tensor([-40.0, -3.0, -0.5, 0.0, 0.25, 2.0, 60.0], dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_is_ln_2_where_policy_and_reference_agree(beta: float, label_smoothing: float) -> None:
    assert dpo(torch.zeros(1), beta, label_smoothing).item() == pytest.approx(math.log(2), abs=1e-7)


def test_dpo_of_a_margin_of_2_nats_at_beta_one_half() -> None:
    # -ln(1 / (1 + e^-1)) = ln(1 + 0.36788)
    assert dpo(torch.tensor([2.0]), beta=0.5).item() == pytest.approx(0.3132617, abs=1e-7)


def test_conservative_dpo_of_a_margin_of_2_nats_at_beta_one_half() -> None:
    # 0.9 ln(1 + e^-1) + 0.1 ln(1 + e)
    assert dpo(torch.tensor([2.0]), beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.4132617, abs=1e-7)


def test_label_smoothing_adds_its_share_of_the_reward_margin() -> None:
    # -ln s(-x) = x - ln s(x), so both terms together are the plain loss plus a linear one
    smoothed = dpo(MARGINS, 0.3, 0.1)
    torch.testing.assert_close(smoothed, dpo(MARGINS, 0.3) + 0.1 * 0.3 * MARGINS)


def test_dpo_stays_finite_and_keeps_its_slope_at_a_hopeless_margin() -> None:
    margin_P = torch.tensor([-1e4], requires_grad=True)
    loss_P = dpo(margin_P, beta=0.1)
    loss_P.sum().backward()
    assert margin_P.grad is not None
    assert (loss_P.item(), margin_P.grad.item()) == (pytest.approx(1000.0), pytest.approx(-0.1))


def test_swapping_chosen_and_rejected_negates_the_margin() -> None:
    here = logps()
    there = replace(
        here,
        chosen_logp_P=here.rejected_logp_P,
        rejected_logp_P=here.chosen_logp_P,
        reference_P2=here.reference_P2.flip(1),
    )
    margin_P = (here.chosen_logp_P - here.reference_P2[:, 0]) - (here.rejected_logp_P - here.reference_P2[:, 1])
    torch.testing.assert_close(compute_losses(here, Sigmoid(beta=0.3)).preference_P, dpo(margin_P, 0.3))
    torch.testing.assert_close(compute_losses(there, Sigmoid(beta=0.3)).preference_P, dpo(-margin_P, 0.3))


def test_sft_is_the_chosen_answers_negative_log_likelihood_per_token() -> None:
    assert sft(torch.tensor([-6.0, -1.0]), torch.tensor([3, 4])).tolist() == [2.0, 0.25]


def test_the_objective_adds_the_weighted_sft_term() -> None:
    losses = compute_losses(logps(), Sigmoid(sft_weight=0.5))
    torch.testing.assert_close(losses.total_P, losses.preference_P + 0.5 * losses.sft_P)


def logps() -> Logps:
    """Four pairs of random log-probabilities in float64."""
    generator = torch.Generator().manual_seed(0)
    values = -20 * torch.rand(4, 4, generator=generator, dtype=torch.float64)
    tokens = torch.randint(3, 30, (4, 2), generator=generator).double()
    return Logps(values[:, 0], values[:, 1], tokens[:, 0], tokens[:, 1], values[:, 2:], values[:, 0])


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto", "simpo", "sft"])
def test_rewards_are_scaled_by_the_beta_of_the_loss_and_by_1_where_it_has_none(loss_type: str) -> None:
    table = RECIPE_OBJECTIVE.validate_python({"loss_type": loss_type})
    assert reward_beta(table) == {"sigmoid": 0.1, "kto": 0.1, "simpo": 2.0, "sft": 1.0}[loss_type]


def test_sums_of_two_steps_are_the_sums_over_their_pairs() -> None:
    rewards_P2 = torch.tensor([[1.0, 0.5], [0.25, 0.25], [-1.0, 2.0]])
    window, both = make_metric_sums(Sigmoid()), make_metric_sums(Sigmoid())
    for rows in (slice(0, 2), slice(2, 3)):
        step = make_metric_sums(Sigmoid())
        count = len(rewards_P2[rows])
        step.add_losses(Losses(torch.ones(count), torch.ones(count), torch.zeros(count), rewards_P2[rows]))
        step.tokens, step.completion_tokens, step.head_tokens = 10, (3, 4), (1, 2)
        window.add(step)
    both.add_losses(Losses(torch.ones(3), torch.ones(3), torch.zeros(3), rewards_P2))
    assert (window.pairs, window.tokens, window.completion_tokens, window.head_tokens) == (3, 20, (6, 8), (2, 4))
    assert window.totals == both.totals
    # a pair right, a tie, a pair wrong
    assert window.means()["rewards/accuracies"] == pytest.approx(0.5)
