"""Chooses the base weights of a merge, those trained against or the original ones, by a rule that is printed."""

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
    """Limits that a merged model must meet; None is no limit."""

    max_kl: float | None = None
    min_agreement: float | None = None

    def missed(self, metrics: MergeMetrics) -> str:
        """The limit that `metrics` miss, in words; empty if they miss none."""
        if self.max_kl is not None and metrics["kl"] > self.max_kl:
            return f"KL {metrics['kl']:.3g} nats per token is above --max-kl {self.max_kl:g}"
        if self.min_agreement is not None and metrics["top1"] < self.min_agreement:
            return f"top-1 agreement {metrics['top1']:.4f} is below --min-agreement {self.min_agreement:g}"
        return ""


def choose_base(candidates: Mapping[BaseWeights, MergeMetrics], thresholds: MergeThresholds) -> BaseWeights:
    """The base to keep, of the one or two measured; raises GateError if none meets the thresholds."""
    missed = {onto: thresholds.missed(metrics) for onto, metrics in candidates.items()}
    passed = [onto for onto, reason in missed.items() if not reason]
    if not passed:
        reasons = [f"onto {onto}: {reason}" if len(missed) > 1 else reason for onto, reason in missed.items()]
        raise GateError(f"{'; '.join(reasons)}; nothing was kept")
    if len(passed) == 1:
        return passed[0]
    return "original" if _better(candidates["original"], candidates["trained"]) else "trained"


def _better(one: MergeMetrics, other: MergeMetrics) -> bool:
    """True if `one` beats `other` by RULE; False without held-out pairs."""
    if one["why_no_accuracy"]:
        return False
    return bool(
        one["merged_accuracy"] >= other["merged_accuracy"]
        and one["merged_loss"] < other["merged_loss"]
        and one["merged_perplexity"] < other["merged_perplexity"]
    )
