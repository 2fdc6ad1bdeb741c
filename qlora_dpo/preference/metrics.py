"""Sums over pairs that become the logged means, under TRL's names: independent of how the pairs were batched.

They are added up on the device and read when a line is logged, since reading a number makes the host wait for a GPU.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_dpo.model.distributed import processes
from qlora_dpo.preference.logps import HEAD_METRICS, Scores
from qlora_dpo.preference.objective import Losses
from qlora_dpo.recipe.objective import Objective, PairwiseLoss

TIE_MARGIN = 1e-4
"""Nats. Margins below this are what float32 rounds differently in another batch, so the pair counts as a tie."""

LOGP_METRICS = ("logps/chosen", "logps/rejected")
LOSS_METRICS = (
    *("loss", "preference_loss", "sft_loss"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
)
REJECTED_METRICS = {"rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/rejected", "logits/rejected"}
METRIC_ORDER = (*LOSS_METRICS, *LOGP_METRICS, *HEAD_METRICS)
"""The order in which records name them."""


@dataclass
class MetricSums:
    """Running totals over pairs and answer tokens. Rewards are beta times log(pi/pi_ref), in nats."""

    beta: float
    sft: bool
    pairs: int = 0
    tokens: int = 0
    completion_tokens: tuple[int, int] = (0, 0)
    """Of chosen and of rejected answers."""
    head_tokens: tuple[int, int] = (0, 0)
    """Those of them whose HEAD_METRICS were computed."""
    parts: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    """Sums in float64 on the device, a vector for each group of names; with the losses' group stand the ties."""

    def add_scores(self, scores: Scores, tokens: int = 0) -> None:
        """Add what one micro-batch, which took `tokens` tokens through the model, says about its pairs."""
        self.tokens += tokens
        self.completion_tokens = _added(self.completion_tokens, scores.completion_tokens)
        self._add(LOGP_METRICS, [scores.chosen_logp_P.double().sum(), scores.rejected_logp_P.double().sum()])
        if scores.head_metrics_4 is not None:
            self.head_tokens = _added(self.head_tokens, scores.completion_tokens)
            self._add(HEAD_METRICS, list(scores.head_metrics_4.double()))

    def add_losses(self, losses: Losses) -> None:
        """Add the losses and rewards of some pairs."""
        chosen_P, rejected_P = losses.rewards_P2.unbind(1)
        tie_P = (chosen_P - rejected_P).abs() <= self.beta * TIE_MARGIN
        self.pairs += len(chosen_P)
        # a tie is half right: neither answer is preferred
        right_P = torch.where(tie_P, 0.5, (chosen_P > rejected_P).double())
        amounts_P = (
            *(losses.total_P, losses.preference_P, losses.sft_P),
            *(chosen_P, rejected_P, right_P, chosen_P - rejected_P),
        )
        self._add((*LOSS_METRICS, "ties"), [each_P.double().sum() for each_P in (*amounts_P, tie_P)])

    def add(self, other: "MetricSums") -> None:
        """Add another one's sums in place, on the device."""
        self.pairs += other.pairs
        self.tokens += other.tokens
        self.completion_tokens = _added(self.completion_tokens, other.completion_tokens)
        self.head_tokens = _added(self.head_tokens, other.head_tokens)
        for names, vector in other.parts.items():
            self.parts[names] = self.parts[names] + vector if names in self.parts else vector

    def _add(self, names: tuple[str, ...], amounts: list[Tensor]) -> None:
        vector = torch.stack(amounts).detach()
        self.parts[names] = self.parts[names] + vector if names in self.parts else vector

    @property
    def totals(self) -> dict[str, float]:
        """All sums by name; the host waits for the device."""
        if not self.parts:
            return {}
        names = [name for group in self.parts for name in group]
        return dict(zip(names, torch.cat(list(self.parts.values())).tolist(), strict=True))

    def all_reduce(self) -> "MetricSums":
        """The sums of all processes that train together."""
        if processes.world_size() == 1:
            return self
        totals, groups = self.totals, (LOGP_METRICS, HEAD_METRICS, (*LOSS_METRICS, "ties"))
        names = [name for group in groups for name in group]
        counts = [self.pairs, self.tokens, *self.completion_tokens, *self.head_tokens]
        present, amounts = [float(name in totals) for name in names], [totals.get(name, 0.0) for name in names]
        summed = processes.all_reduce_sum([*counts, *present, *amounts])
        pairs, tokens, chosen, rejected, head_chosen, head_rejected = map(int, summed[: len(counts)])
        known = dict(zip(names, summed[len(counts) : -len(names)], strict=True))
        values = dict(zip(names, summed[-len(names) :], strict=True))
        parts: dict[tuple[str, ...], Tensor] = {
            group: torch.tensor([values[name] for name in group], dtype=torch.float64)
            for group in groups
            if known[group[0]]
        }
        return MetricSums(self.beta, self.sft, pairs, tokens, (chosen, rejected), (head_chosen, head_rejected), parts)

    def means(self) -> dict[str, float]:
        """Means over pairs, or over answer tokens where TRL's are (logits, entropy, token accuracy).

        Where no rejected answer went through the model, nothing is said of one.
        """
        totals, (chosen, rejected) = self.totals, self.head_tokens
        weights = {
            "logits/chosen": chosen,
            "logits/rejected": rejected,
            "entropy": chosen + rejected,
            "mean_token_accuracy": chosen,
        }
        absent = REJECTED_METRICS if self.completion_tokens[0] and not self.completion_tokens[1] else set[str]()
        return {
            name: totals[name] / weights.get(name, self.pairs)
            for name in METRIC_ORDER
            if name in totals and name not in absent and (self.sft or name != "sft_loss")
        }


def make_metric_sums(table: Objective) -> MetricSums:
    """Empty sums for the figures of one objective."""
    return MetricSums(getattr(table, "beta", 1.0), sft=isinstance(table, PairwiseLoss) and table.sft_weight > 0)


def _added(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]
