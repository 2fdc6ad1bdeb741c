"""Measures how well an adapter's margins are calibrated, with sigmoid(margin) as a probability."""

from dataclasses import dataclass

import torch
from torch import Tensor

CALIBRATION_BINS = 10
"""Bins of equal width between 0.5 and 1; Guo et al. 2017 divide 0 to 1 in the same way."""


@dataclass(frozen=True)
class Bin:
    """Pairs with a confidence above `low` (or equal to it in the first bin) and at most `high`, and their means."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram and two scores computed from it."""

    bins: list[Bin]
    ece: float
    """Expected calibration error: the mean of |accuracy - confidence| over bins, weighted by pairs."""
    brier: float
    """Brier score: mean of (1 - p)^2, where p is the probability of the chosen answer; a constant 0.5 scores 0.25."""


def calibration(margin_P: Tensor, correct_P: Tensor) -> Calibration:
    """Calibration of the Bradley-Terry probability that the chosen answer is better, p = sigmoid(margin).

    The confidence of a pair is the probability of the answer with the higher reward, max(p, 1 - p). `correct_P` is 1 if
    that is the chosen answer, 0 if it is the rejected one, and 0.5 for a tie. Bins and expected calibration error as in
    Guo et al. 2017, eq. 3.
    """
    p_P = torch.sigmoid(margin_P.double())
    confidence_P = torch.maximum(p_P, 1 - p_P)
    # a confidence on a boundary belongs to the bin below it
    bin_P = (torch.ceil((confidence_P - 0.5) * 2 * CALIBRATION_BINS) - 1).clamp(0, CALIBRATION_BINS - 1)
    bins = []
    for number in range(CALIBRATION_BINS):
        in_bin_P = bin_P == number
        if pairs := int(in_bin_P.sum()):
            bins.append(
                Bin(
                    low=0.5 + number / (2 * CALIBRATION_BINS),
                    high=0.5 + (number + 1) / (2 * CALIBRATION_BINS),
                    pairs=pairs,
                    confidence=float(confidence_P[in_bin_P].mean()),
                    accuracy=float(correct_P[in_bin_P].double().mean()),
                )
            )
    ece = sum(bin_.pairs * abs(bin_.accuracy - bin_.confidence) for bin_ in bins) / len(margin_P)
    return Calibration(bins, ece, float((1 - p_P).square().mean()))
