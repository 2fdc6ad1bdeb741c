"""How far an adapter's margins can be taken as probabilities: calibration of sigmoid(margin)."""

from dataclasses import dataclass

import torch
from torch import Tensor

CALIBRATION_BINS = 10
"""Bins of equal width between one half and 1, as Guo et al. 2017 take between 0 and 1."""


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence is above `low` and at most `high` (the first bin holds `low` too), and their means."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """The reliability diagram and two figures of it."""

    bins: list[Bin]
    ece: float
    """Expected calibration error: the mean of |accuracy - confidence| over bins, weighted by pairs."""
    brier: float
    """Mean of (1 - p)^2, p the probability of the chosen answer; a coin has 0.25."""


def calibration(margin_P: Tensor, right_P: Tensor) -> Calibration:
    """Bradley and Terry's model says that the chosen answer is better with probability p = sigmoid(margin).

    The confidence of a pair is that of the answer with the higher reward, max(p, 1 - p), and it is right if that is
    the chosen one, a tie half right; bins and expected calibration error as in Guo et al. 2017, eq. 3.
    """
    p_P = torch.sigmoid(margin_P.double())
    confidence_P = torch.maximum(p_P, 1 - p_P)
    # a confidence on a boundary belongs to the bin below it
    bin_P = (torch.ceil((confidence_P - 0.5) * 2 * CALIBRATION_BINS) - 1).clamp(0, CALIBRATION_BINS - 1)
    bins = []
    for number in range(CALIBRATION_BINS):
        mine_P = bin_P == number
        if pairs := int(mine_P.sum()):
            means = [float(each[mine_P].double().mean()) for each in (confidence_P, right_P)]
            bins.append(
                Bin(0.5 + number / (2 * CALIBRATION_BINS), 0.5 + (number + 1) / (2 * CALIBRATION_BINS), pairs, *means)
            )
    ece = sum(each.pairs * abs(each.accuracy - each.confidence) for each in bins) / len(margin_P)
    return Calibration(bins, ece, float((1 - p_P).square().mean()))
