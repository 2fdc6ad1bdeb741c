"""The losses: log-probabilities in, one loss per pair out, in nats.

P pairs. `chosen_P` and `rejected_P` are log(pi/pi_ref) of the two completions, `margin_P` their difference. `_logp_P`
are log-probabilities of the policy alone. 2 columns: chosen, rejected.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_dpo.recipe.objective import (
    AlphaPo,
    Aot,
    BetaDpo,
    Cpo,
    Discopop,
    Dpop,
    ExoPair,
    FDivergenceLoss,
    Kto,
    Objective,
    Odpo,
    Orpo,
    PairwiseLoss,
    PlainLoss,
    Rdpo,
    ReferenceFree,
    Robust,
    SamPo,
    Sft,
    Sigmoid,
    Simpo,
    WeightedSum,
    reward_beta,
)

MIN_BETA = 1e-3
"""beta-DPO's beta falls no lower, as in the authors' code."""


@dataclass(frozen=True)
class Logps:
    """The inputs of a loss for P pairs. Log-probabilities are sums over a completion's tokens, in nats."""

    chosen_logp_P: Tensor
    """With the token weights of LD-DPO and SamPO, as in `reference_P2`."""
    rejected_logp_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    reference_P2: Tensor
    """The reference's log-probabilities; losses without a reference ignore them."""
    chosen_logp_all_P: Tensor
    """Of the chosen completion, every token counted once."""
    wpo_weight_P: Tensor | None = None
    """The model's own likelihood of both completions (WPO), without a gradient."""
    columns: "LossColumns | None" = None

    def items(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def empty(self) -> "Logps":
        """The same fields with no pairs."""
        columns = None if self.columns is None else self.columns.select([])
        return Logps(**{name: value[:0] for name, value in self.items().items()}, columns=columns)


@dataclass(frozen=True)
class LossColumns:
    """Columns of the data that a loss reads, one value per pair."""

    weight_P: Tensor | None = None
    margin_P: Tensor | None = None
    scores_P2: Tensor | None = None
    label_P: Tensor | None = None
    """For unpaired data: True if the chosen completion is desirable; the rejected one belongs to another prompt."""

    def select(self, indices: list[int]) -> "LossColumns":
        """The columns of the pairs at `indices`."""
        return LossColumns(**{name: None if value is None else value[indices] for name, value in vars(self).items()})

    def to(self, device: torch.device) -> "LossColumns":
        """The same columns on another device."""
        return LossColumns(**{name: None if value is None else value.to(device) for name, value in vars(self).items()})


def concat_logps(parts: Sequence[Logps]) -> Logps:
    """Concatenate the log-probabilities of several micro-batches."""
    tensors = {name: torch.cat([part.items()[name] for part in parts]) for name in parts[0].items()}
    column_parts = [vars(part.columns) for part in parts if part.columns is not None]
    names = [name for name, value in (column_parts[0] if column_parts else {}).items() if value is not None]
    columns = {name: torch.cat([column_part[name] for column_part in column_parts]) for name in names}
    return Logps(**tensors, columns=LossColumns(**columns) if column_parts else None)


@dataclass(frozen=True)
class Losses:
    """The parts of the objective and their weighted sum, one value per pair, and the implicit rewards."""

    total_P: Tensor
    preference_P: Tensor
    sft_P: Tensor
    rewards_P2: Tensor


def loss_gradients(losses: Losses, logps: Logps) -> Tensor:
    """The absolute derivatives of each pair's loss with respect to its log-probabilities, summed, (P,).

    The log-probabilities must require gradients; their graph is kept.
    """
    inputs = [logps.chosen_logp_P, logps.rejected_logp_P, logps.chosen_logp_all_P]
    grads = torch.autograd.grad(losses.total_P.sum(), inputs, retain_graph=True, allow_unused=True)
    return torch.stack([grad_P.abs() for grad_P in grads if grad_P is not None]).sum(0)


def dpo(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Rafailov et al. 2023, eq. 7; with `label_smoothing`, conservative DPO (Mitchell 2023, eq. 3). Nats per pair."""
    agree_P = -F.logsigmoid(beta * margin_P)
    flipped_P = -F.logsigmoid(-beta * margin_P)
    return (1 - label_smoothing) * agree_P + label_smoothing * flipped_P


def robust(margin_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Chowdhury et al. 2024, eq. 11: unbiased if the share `label_smoothing` of the labels is flipped."""
    agree_P = -F.logsigmoid(beta * margin_P)
    flipped_P = -F.logsigmoid(-beta * margin_P)
    return ((1 - label_smoothing) * agree_P - label_smoothing * flipped_P) / (1 - 2 * label_smoothing)


def hinge(margin_P: Tensor, beta: float) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023, eq. 1) on DPO's reward."""
    return torch.relu(1 - beta * margin_P)


def ipo(margin_P: Tensor, beta: float) -> Tensor:
    """Azar et al. 2023, eq. 17, on log-ratios per token."""
    return (margin_P - 1 / (2 * beta)) ** 2


def exo_pair(margin_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Ji et al. 2024, eq. 16, for two completions: KL from the policy's preference to the smoothed label."""
    agree_P, flipped_P = F.logsigmoid(beta * margin_P), F.logsigmoid(-beta * margin_P)
    return agree_P.exp() * (agree_P - math.log1p(-label_smoothing)) + flipped_P.exp() * (
        flipped_P - math.log(label_smoothing)
    )


def nca_pair(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Chen et al. 2024, eq. 11, for pairs."""
    return (
        -F.logsigmoid(beta * chosen_P) - 0.5 * F.logsigmoid(-beta * chosen_P) - 0.5 * F.logsigmoid(-beta * rejected_P)
    )


def bco_pair(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Jung et al. 2024, eq. 8, without the shift."""
    return -F.logsigmoid(beta * chosen_P) - F.logsigmoid(-beta * rejected_P)


def sppo_hard(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Wu et al. 2024, eq. 4.7, with a win rate of 1."""
    return (chosen_P - 0.5 / beta) ** 2 + (rejected_P + 0.5 / beta) ** 2


def apo_zero(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """D'Oosterlinck et al. 2024, eq. 7: the chosen completion up, the rejected one down."""
    return torch.sigmoid(-beta * chosen_P) + torch.sigmoid(beta * rejected_P)


def apo_down(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """D'Oosterlinck et al. 2024, eq. 8: both down, the rejected one more."""
    return torch.sigmoid(beta * chosen_P) + torch.sigmoid(-beta * (chosen_P - rejected_P))


def discopop(margin_P: Tensor, beta: float, tau: float) -> Tensor:
    """Lu et al. 2024, eq. 5: logistic for misranked pairs, exponential for correctly ranked pairs."""
    logits_P = beta * margin_P
    blend_P = torch.sigmoid(logits_P / tau)
    return (1 - blend_P) * -F.logsigmoid(logits_P) + blend_P * torch.exp(-logits_P)


def cal_dpo(chosen_P: Tensor, rejected_P: Tensor, beta: float) -> Tensor:
    """Xiao et al. 2024: DPO with a beta of 1, and log-ratios pulled to +-1 / (2 beta), as in the authors' code."""
    pull_P = (chosen_P - 0.5 / beta) ** 2 + (rejected_P + 0.5 / beta) ** 2
    return dpo(chosen_P - rejected_P, 1.0) + 0.5 * pull_P


def aot(one_P: Tensor, other_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Melnyk et al. 2024, eq. 12: the k-th smallest of one distribution meets the k-th smallest of the other."""
    return dpo(one_P.sort().values - other_P.sort().values, beta, label_smoothing)


def dpop(margin_P: Tensor, chosen_P: Tensor, beta: float, dpop_lambda: float) -> Tensor:
    """Pal et al. 2024, eq. 3: a chosen log-ratio below 0 is penalized with weight `dpop_lambda`."""
    return dpo(margin_P - dpop_lambda * torch.relu(-chosen_P), beta)


def rdpo(margin_P: Tensor, longer_P: Tensor, beta: float, length_alpha: float) -> Tensor:
    """Park et al. 2024, eq. 9: the preference for r - length_alpha * tokens, solved for the policy.

    `longer_P` is the number of tokens by which the chosen completion is longer.
    """
    return -F.logsigmoid(beta * margin_P + length_alpha * longer_P)


def odpo(margin_P: Tensor, scores_P2: Tensor, beta: float, odpo_alpha: float) -> Tensor:
    """Amini et al. 2024, eq. 7, with a logarithmic offset; score differences are clamped to at least 1e-6."""
    ahead_P = (scores_P2[:, 0] - scores_P2[:, 1]).to(margin_P.dtype)
    offset_P = ahead_P.clamp(min=1e-6).log()
    return -F.logsigmoid(beta * margin_P - odpo_alpha * offset_P)


def simpo(reward_P: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """Meng et al. 2024, eq. 6; `reward_P` is the difference of the rewards before `beta`."""
    return dpo(reward_P - gamma / beta, beta, label_smoothing)


def alpha_reward(mean_logp_P: Tensor, alpha: float) -> Tensor:
    """Gupta et al. 2025, eq. 8: (1 - p^-alpha) / alpha of a mean log-probability; log p at alpha 0."""
    return mean_logp_P if alpha == 0 else -torch.expm1(-alpha * mean_logp_P) / alpha


def kto(ratio_P: Tensor, label_P: Tensor, mean_P: Tensor, table: Kto, beta: float) -> Tensor:
    """Ethayarajh et al. 2024, eq. 8; `mean_P` is the estimate of KL(policy || reference), in nats."""
    good_P = table.desirable_weight * torch.sigmoid(-beta * (ratio_P - mean_P))
    bad_P = table.undesirable_weight * torch.sigmoid(beta * (ratio_P - mean_P))
    return torch.where(label_P, good_P, bad_P)


def kto_kl(other_P: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference) (eq. 7): the mean log-ratio of mismatched completions, at least 0."""
    return other_P.detach().mean().clamp(min=0).expand_as(other_P)


def orpo(chosen_mean_P: Tensor, rejected_mean_P: Tensor, beta: float) -> Tensor:
    """Hong et al. 2024, eq. 7: minus `beta` times the log-sigmoid of the log odds ratio, of mean log-probabilities."""
    odds_P = (chosen_mean_P - rejected_mean_P) - (_log1mexp(chosen_mean_P) - _log1mexp(rejected_mean_P))
    return -beta * F.logsigmoid(odds_P)


def sft(chosen_logp_P: Tensor, chosen_tokens_P: Tensor) -> Tensor:
    """Negative log-likelihood per token of the chosen completion, in nats (Pang et al. 2024, eq. 1, second term)."""
    return -chosen_logp_P / chosen_tokens_P


def f_score(ratio_P: Tensor, table: FDivergenceLoss) -> Tensor:
    """f'(pi/pi_ref) for the divergence of `table`, up to a constant (Wang et al. 2023, table 1)."""
    match table.f_divergence_type:
        case "reverse_kl":
            return ratio_P
        case "forward_kl":
            return 1 - torch.exp(-ratio_P)
        case "js_divergence":
            return math.log(2) + F.logsigmoid(ratio_P)
        case "alpha_divergence":
            power = (0.5 if table.f_alpha_divergence_coef is None else table.f_alpha_divergence_coef) - 1
            # e^80 is close to the largest number that float32 holds
            return ratio_P if abs(power) < 1e-6 else torch.expm1((power * ratio_P).clamp(max=80.0)) / power
        case never:
            assert_never(never)


def needs_reference(table: Objective) -> bool:
    """False for losses that read only the policy's log-probabilities."""
    return not isinstance(table, ReferenceFree)


def uses_wpo_weighting(table: Objective) -> bool:
    """True if pairs are weighted by the model's own likelihood of their completions (WPO)."""
    return isinstance(table, PairwiseLoss) and table.use_weighting


def needs_whole_step(table: Objective) -> bool:
    """True if a pair's loss depends on the other pairs of its step."""
    return isinstance(table, Aot | BetaDpo | Kto)


def compute_losses(logps: Logps, table: Objective, beta: float | None = None) -> Losses:
    """The recipe's loss per pair; `beta` is the step's, by default the table's."""
    beta = reward_beta(table) if beta is None else beta
    ratio_P2 = torch.stack([logps.chosen_logp_P, logps.rejected_logp_P], 1)
    if needs_reference(table):
        ratio_P2 = ratio_P2 - logps.reference_P2
    # a missing completion has no tokens and a log-probability of 0
    tokens_P2 = torch.stack([logps.chosen_tokens_P, logps.rejected_tokens_P], 1).clamp(min=1)
    sft_P = sft(logps.chosen_logp_all_P, logps.chosen_tokens_P)
    rewards_P2 = beta * _reward(ratio_P2, tokens_P2, table)
    if logps.columns is not None and logps.columns.label_P is not None:
        # a desirable completion should be above the KL estimate, an undesirable one below it
        both_P2 = torch.stack([rewards_P2[:, 0], beta * kto_kl(ratio_P2[:, 1])], 1)
        rewards_P2 = torch.where(logps.columns.label_P[:, None], both_P2, both_P2.flip(1))
    preference_P = _preference_loss(logps, ratio_P2, tokens_P2, table, beta)
    if logps.wpo_weight_P is not None:
        preference_P = preference_P * logps.wpo_weight_P
    total_P = preference_P + (table.sft_weight * sft_P if isinstance(table, PairwiseLoss) else 0)
    if logps.columns is not None and logps.columns.weight_P is not None:
        total_P = total_P * logps.columns.weight_P
    return Losses(total_P, preference_P, sft_P, rewards_P2.detach())


def _reward(ratio_P2: Tensor, tokens_P2: Tensor, table: Objective) -> Tensor:
    """The implicit reward before beta: log-ratios, or mean log-probabilities for losses that compare those."""
    match table:
        case AlphaPo():
            return alpha_reward(ratio_P2 / tokens_P2, table.alphapo_alpha)
        case Simpo() | Orpo() | Sft():
            return ratio_P2 / tokens_P2
        case _:
            return ratio_P2


def _preference_loss(logps: Logps, ratio_P2: Tensor, tokens_P2: Tensor, table: Objective, beta: float) -> Tensor:
    chosen_P, rejected_P = ratio_P2.unbind(1)
    margin_P = chosen_P - rejected_P
    scores_P2 = f_score(ratio_P2, table) if isinstance(table, FDivergenceLoss) else ratio_P2
    score_P, mean_P2 = scores_P2[:, 0] - scores_P2[:, 1], ratio_P2 / tokens_P2
    columns = logps.columns or LossColumns()
    match table:
        case Sigmoid():
            target_P = 0 if columns.margin_P is None else columns.margin_P / beta
            return dpo(score_P - target_P, beta, table.label_smoothing)
        case Robust():
            return robust(score_P, beta, table.label_smoothing)
        case ExoPair():
            return exo_pair(score_P, beta, table.label_smoothing)
        case Discopop():
            return discopop(score_P, beta, table.discopop_tau)
        case PlainLoss():
            return _beta_only_loss(table.loss_type, scores_P2, ratio_P2, tokens_P2, beta)
        case WeightedSum():
            parts = [
                weight * _beta_only_loss(name, ratio_P2, ratio_P2, tokens_P2, beta)
                for name, weight in table.loss_weights.items()
            ]
            return torch.stack(parts).sum(0)
        case Aot() if table.loss_type == "aot":
            policy_P = logps.chosen_logp_P - logps.rejected_logp_P
            reference_P = logps.reference_P2[:, 0] - logps.reference_P2[:, 1]
            return aot(policy_P, reference_P, beta, table.label_smoothing)
        case Aot():
            return aot(chosen_P, rejected_P, beta, table.label_smoothing)
        case Dpop():
            return dpop(margin_P, chosen_P, beta, table.dpop_lambda)
        case Rdpo():
            return rdpo(margin_P, tokens_P2[:, 0] - tokens_P2[:, 1], beta, table.length_alpha)
        case Odpo():
            if columns.scores_P2 is None:
                raise ValueError("odpo needs scores")
            return odpo(margin_P, columns.scores_P2, beta, table.odpo_alpha)
        case BetaDpo() | SamPo():
            return dpo(margin_P, beta)
        case Simpo():
            return simpo(mean_P2[:, 0] - mean_P2[:, 1], beta, table.simpo_gamma, table.label_smoothing)
        case AlphaPo():
            shaped_P2 = alpha_reward(mean_P2, table.alphapo_alpha)
            return simpo(shaped_P2[:, 0] - shaped_P2[:, 1], beta, table.simpo_gamma)
        case Cpo():
            return dpo(margin_P, beta, table.label_smoothing)
        case Orpo():
            return orpo(mean_P2[:, 0], mean_P2[:, 1], beta)
        case Kto():
            if columns.label_P is None:
                raise ValueError("kto needs labels")
            return kto(chosen_P, columns.label_P, kto_kl(rejected_P), table, beta)
        case Sft():
            return sft(logps.chosen_logp_all_P, logps.chosen_tokens_P)
        case never:
            assert_never(never)


def _beta_only_loss(name: str, scores_P2: Tensor, ratio_P2: Tensor, tokens_P2: Tensor, beta: float) -> Tensor:
    """The losses whose only parameter is `beta`; `scores_P2` are the log-ratios, or `f_score` of them."""
    (chosen_P, rejected_P), score_P = ratio_P2.unbind(1), scores_P2[:, 0] - scores_P2[:, 1]
    per_token_P2 = scores_P2 / tokens_P2
    per_token_P = per_token_P2[:, 0] - per_token_P2[:, 1]
    match name:
        case "sigmoid":
            return dpo(score_P, beta)
        case "sigmoid_norm":
            return dpo(per_token_P, beta)
        case "hinge":
            return hinge(score_P, beta)
        case "ipo":
            return ipo(per_token_P, beta)
        case "nca_pair":
            return nca_pair(chosen_P, rejected_P, beta)
        case "bco_pair":
            return bco_pair(chosen_P, rejected_P, beta)
        case "sppo_hard":
            return sppo_hard(chosen_P, rejected_P, beta)
        case "apo_zero":
            return apo_zero(chosen_P, rejected_P, beta)
        case "apo_down":
            return apo_down(chosen_P, rejected_P, beta)
        case "cal_dpo":
            return cal_dpo(chosen_P, rejected_P, beta)
        case _:
            raise ValueError(name)


def dynamic_beta(margin_P: Tensor, mean: float, table: BetaDpo, beta: float) -> tuple[float, float]:
    """The beta of a step and the new running mean of margins, in nats (Wu et al. 2024, eqs. 7 and 8).

    As in the authors' code, the mean starts at 0 and includes this step's margins.
    """
    now = float(margin_P.mean())
    mean = table.beta_momentum * mean + (1 - table.beta_momentum) * now
    return max(MIN_BETA, beta * (1 + table.beta_alpha * (now - mean))), mean


def _log1mexp(logp_P: Tensor) -> Tensor:
    """log(1 - p) from log p, accurate for every p (Maechler 2012)."""
    return torch.where(
        logp_P > -math.log(2), torch.log(-torch.expm1(logp_P)), torch.log1p(-torch.exp(logp_P.clamp(max=-1e-30)))
    )
