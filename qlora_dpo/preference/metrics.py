"""Sums over pairs that become the logged means, under TRL's names: independent of how the pairs were batched."""

from dataclasses import dataclass, field

from qlora_dpo.model import processes
from qlora_dpo.preference.logps import Scores
from qlora_dpo.preference.objective import Losses
from qlora_dpo.recipe_objective import Objective, WithSft

TIE = 1e-4
"""Nats. Margins below this are what float32 rounds differently in another batch, so the pair counts as a tie."""


@dataclass
class Sums:
    """Running totals over pairs and answer tokens. Rewards are beta times log(pi/pi_ref), in nats."""

    beta: float
    sft: bool
    pairs: int = 0
    tokens: int = 0
    ties: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0
    totals: dict[str, float] = field(default_factory=dict)

    def add_scores(self, scores: Scores, tokens: int = 0) -> None:
        """Add what one micro-batch, which took `tokens` tokens through the model, says about its pairs."""
        self.tokens += tokens
        self.chosen_tokens += int(scores.chosen_tokens_P.sum())
        self.rejected_tokens += int(scores.rejected_tokens_P.sum())
        self._add(
            {
                "logps/chosen": scores.chosen_logp_P.detach().double().sum().item(),
                "logps/rejected": scores.rejected_logp_P.detach().double().sum().item(),
                "logits/chosen": scores.chosen_logits_sum,
                "logits/rejected": scores.rejected_logits_sum,
                "entropy": scores.entropy_sum,
                "mean_token_accuracy": scores.chosen_top1_sum,
            }
        )

    def add_losses(self, losses: Losses) -> None:
        """Add the losses and rewards of some pairs."""
        chosen_P, rejected_P = losses.rewards_P2.unbind(1)
        tie_P = (chosen_P - rejected_P).abs() <= self.beta * TIE
        ties = int(tie_P.sum())
        self.pairs += len(chosen_P)
        self.ties += ties
        self._add(
            {
                "loss": losses.total_P.detach().double().sum().item(),
                "preference_loss": losses.preference_P.detach().double().sum().item(),
                "sft_loss": losses.sft_P.detach().double().sum().item(),
                "rewards/chosen": chosen_P.double().sum().item(),
                "rewards/rejected": rejected_P.double().sum().item(),
                # a tie is half right: neither answer is preferred
                "rewards/accuracies": float((chosen_P > rejected_P)[~tie_P].sum()) + ties / 2,
                "rewards/margins": (chosen_P - rejected_P).double().sum().item(),
            }
        )

    def _add(self, amounts: dict[str, float]) -> None:
        for name, amount in amounts.items():
            self.totals[name] = self.totals.get(name, 0.0) + amount

    def of_all(self) -> "Sums":
        """The sums of all processes that train together."""
        if processes.count() == 1:
            return self
        counts = [self.pairs, self.tokens, self.ties, self.chosen_tokens, self.rejected_tokens]
        present, amounts = (
            [float(name in self.totals) for name in ORDER],
            [self.totals.get(name, 0.0) for name in ORDER],
        )
        summed = processes.total([*counts, *present, *amounts])
        pairs, tokens, ties, chosen, rejected = map(int, summed[: len(counts)])
        there, totals = summed[len(counts) : -len(ORDER)], summed[-len(ORDER) :]
        known = {name: each for name, known, each in zip(ORDER, there, totals, strict=True) if known}
        return Sums(self.beta, self.sft, pairs, tokens, ties, chosen, rejected, known)

    def means(self) -> dict[str, float]:
        """Means over pairs, or over answer tokens where TRL's are (logits, entropy, token accuracy).

        Where no rejected answer went through the model, nothing is said of one.
        """
        weights = {
            "logits/chosen": self.chosen_tokens,
            "logits/rejected": self.rejected_tokens,
            "entropy": self.chosen_tokens + self.rejected_tokens,
            "mean_token_accuracy": self.chosen_tokens,
        }
        absent = OF_REJECTED if self.chosen_tokens and not self.rejected_tokens else set[str]()
        names = sorted(self.totals.keys() - absent, key=ORDER.index)
        return {
            name: self.totals[name] / weights.get(name, self.pairs) for name in names if self.sft or name != "sft_loss"
        }


def sums_for(table: Objective) -> Sums:
    """Empty sums for the figures of one objective."""
    return Sums(getattr(table, "beta", 1.0), sft=isinstance(table, WithSft) and table.sft_weight > 0)


OF_REJECTED = {"rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/rejected", "logits/rejected"}
ORDER = (
    *("loss", "preference_loss", "sft_loss"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"),
)
"""The order in which records name them."""
