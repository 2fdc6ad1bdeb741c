"""Sums over pairs that become the logged means, under TRL's names: independent of how the pairs were batched."""

from dataclasses import dataclass, field

from torch import Tensor

from qlora_dpo.preference.logps import Scores
from qlora_dpo.preference.objective import Losses

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

    def add(self, scores: Scores, losses: Losses, reference_P2: Tensor, tokens: int = 0) -> None:
        """Add the pairs of one micro-batch, which took `tokens` tokens through the model."""
        chosen_P = self.beta * (scores.chosen_logp_P.detach() - reference_P2[:, 0])
        rejected_P = self.beta * (scores.rejected_logp_P.detach() - reference_P2[:, 1])
        tie_P = (chosen_P - rejected_P).abs() <= self.beta * TIE
        ties = int(tie_P.sum())
        self.pairs += len(chosen_P)
        self.tokens += tokens
        self.ties += ties
        self.chosen_tokens += int(scores.chosen_tokens_P.sum())
        self.rejected_tokens += int(scores.rejected_tokens_P.sum())
        for name, amount in {
            "loss": losses.total_P.detach().double().sum().item(),
            "dpo_loss": losses.dpo_P.detach().double().sum().item(),
            "sft_loss": losses.sft_P.detach().double().sum().item(),
            "rewards/chosen": chosen_P.double().sum().item(),
            "rewards/rejected": rejected_P.double().sum().item(),
            # a tie is half right: neither answer is preferred
            "rewards/accuracies": float((chosen_P > rejected_P)[~tie_P].sum()) + ties / 2,
            "rewards/margins": (chosen_P - rejected_P).double().sum().item(),
            "logps/chosen": scores.chosen_logp_P.detach().double().sum().item(),
            "logps/rejected": scores.rejected_logp_P.detach().double().sum().item(),
            "logits/chosen": scores.chosen_logits_sum,
            "logits/rejected": scores.rejected_logits_sum,
            "entropy": scores.entropy_sum,
            "mean_token_accuracy": scores.chosen_top1_sum,
        }.items():
            self.totals[name] = self.totals.get(name, 0.0) + amount

    def means(self) -> dict[str, float]:
        """Means over pairs, or over answer tokens where TRL's are (logits, entropy, token accuracy)."""
        weights = {
            "logits/chosen": self.chosen_tokens,
            "logits/rejected": self.rejected_tokens,
            "entropy": self.chosen_tokens + self.rejected_tokens,
            "mean_token_accuracy": self.chosen_tokens,
        }
        return {
            name: total / weights.get(name, self.pairs)
            for name, total in self.totals.items()
            if self.sft or name != "sft_loss"
        }
