"""Which base a merge keeps: the weights that were trained against or the original ones, by a rule that is printed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_dpo.deploy.merge_card import BaseWeights
from qlora_dpo.errors import GateError

RULE = (
    "onto the original weights only if, on held-out pairs, they give no lower preference accuracy, a lower loss and a "
    "lower perplexity of the chosen answers; else onto the weights it was trained on"
)

MergeMetrics = Mapping[str, Any]


@dataclass(frozen=True)
class MergeThresholds:
    """What the user asks of a merged model; None asks for nothing."""

    max_kl: float | None = None
    min_agreement: float | None = None

    def missed(self, figures: MergeMetrics) -> str:
        """The bar that `figures` miss, in words; empty if they miss none."""
        if self.max_kl is not None and figures["kl"] > self.max_kl:
            return f"KL {figures['kl']:.3g} nats per token is above --max-kl {self.max_kl:g}"
        if self.min_agreement is not None and figures["top1"] < self.min_agreement:
            return f"top-1 agreement {figures['top1']:.4f} is below --min-agreement {self.min_agreement:g}"
        return ""


def choose_base(candidates: Mapping[BaseWeights, MergeMetrics], bars: MergeThresholds) -> BaseWeights:
    """The base to keep, of one or two that were measured; raise GateError if none meets the bars."""
    missed = {onto: bars.missed(figures) for onto, figures in candidates.items()}
    kept = [onto for onto, words in missed.items() if not words]
    if not kept:
        each = "; ".join(f"onto {onto}: {words}" if len(missed) > 1 else words for onto, words in missed.items())
        raise GateError(f"{each}; nothing was kept")
    if len(kept) == 1:
        return kept[0]
    return "original" if _better(candidates["original"], candidates["trained"]) else "trained"


def _better(one: MergeMetrics, other: MergeMetrics) -> bool:
    """True if `one` beats `other` as RULE says; without held-out pairs nothing can."""
    if one["why_no_accuracy"]:
        return False
    return bool(
        one["merged_accuracy"] >= other["merged_accuracy"]
        and one["merged_loss"] < other["merged_loss"]
        and one["merged_perplexity"] < other["merged_perplexity"]
    )
