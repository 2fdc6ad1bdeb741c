"""Measures how far an adapter's accuracy depends on length: by bins of length, and controlled for length.

P pairs; d_P is the number of tokens by which the chosen answer is longer than the rejected one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_LENGTH_BINS = 4
MAX_NEWTON_STEPS = 100
TOLERANCE = 1e-12


@dataclass(frozen=True)
class LengthBin:
    """Pairs with lengths from `low` to `high`, both included."""

    low: float
    high: float
    num_correct: float
    """Pairs that are ranked correctly; a tie counts as one half."""
    pairs: int


def accuracy_by_length(tokens_P2: Tensor, correct_P: Tensor) -> list[LengthBin]:
    """Accuracy in up to four bins of about equal size, by the mean length of a pair's two answers in tokens."""
    mean_P = tokens_P2.double().mean(1)
    edges = np.quantile(
        mean_P.numpy(), [number / MAX_LENGTH_BINS for number in range(1, MAX_LENGTH_BINS)], method="lower"
    )
    bin_P = torch.bucketize(mean_P, torch.tensor(edges))
    return list(_length_bins(mean_P, bin_P, correct_P))


def accuracy_by_length_difference(tokens_P2: Tensor, correct_P: Tensor) -> dict[str, LengthBin]:
    """Accuracy where the chosen answer is the shorter one, as long as the other, or the longer one.

    `low` and `high` are values of d. A model that goes by length alone is always right in one group, never in another.
    """
    d_P = (tokens_P2[:, 0] - tokens_P2[:, 1]).double()
    names = {-1: "shorter", 0: "as long", 1: "longer"}
    bins = _length_bins(d_P, d_P.sign(), correct_P)
    return {names[int(length_bin.low > 0) - int(length_bin.low < 0)]: length_bin for length_bin in bins}


def _length_bins(length_P: Tensor, bin_P: Tensor, correct_P: Tensor) -> Iterator[LengthBin]:
    for number in sorted(set(bin_P.tolist())):
        in_bin_P = bin_P == number
        lengths = length_P[in_bin_P]
        yield LengthBin(
            low=float(lengths.min()),
            high=float(lengths.max()),
            num_correct=float(correct_P[in_bin_P].sum()),
            pairs=int(in_bin_P.sum()),
        )


@dataclass(frozen=True)
class LengthControlledAccuracy:
    """Accuracy controlled for length, and the coefficient of length: positive if longer answers tend to win."""

    accuracy: float
    length_coefficient: float


def length_controlled_accuracy(tokens_P2: Tensor, correct_P: Tensor) -> LengthControlledAccuracy:
    """The accuracy expected for answers of equal length, after Dubois et al. 2024 (AlpacaEval), eq. 2.

    P(correct) = sigmoid(theta + phi * tanh(d / sd(d))) is fitted to all pairs by maximum likelihood, and the accuracy
    is sigmoid(theta). Their term for the difficulty of the prompt is omitted, since there is one pair per prompt. As in
    theirs, phi is regularized: phi^2 / 2 is subtracted from the log-likelihood, so that there is a solution even if
    length explains everything. If all lengths are equal, or all pairs correct or all wrong, the plain accuracy is
    returned.
    """
    d_P = (tokens_P2[:, 0] - tokens_P2[:, 1]).double()
    accuracy, deviation = float(correct_P.mean()), float(d_P.std(correction=0))
    if deviation == 0 or accuracy in (0.0, 1.0):
        return LengthControlledAccuracy(accuracy, 0.0)
    x_P2 = torch.stack([torch.ones_like(d_P), torch.tanh(d_P / deviation)], 1)
    ridge_22 = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    weight_2 = torch.zeros(2, dtype=torch.float64)
    for _ in range(MAX_NEWTON_STEPS):  # a step is halved until it raises the likelihood
        p_P = torch.sigmoid(x_P2 @ weight_2)
        grad_2 = x_P2.T @ (correct_P - p_P) - ridge_22 @ weight_2
        step_2 = torch.linalg.solve(x_P2.T @ (x_P2 * (p_P * (1 - p_P))[:, None]) + ridge_22, grad_2)
        before, scale = _log_likelihood(x_P2, correct_P, weight_2), 1.0
        while _log_likelihood(x_P2, correct_P, weight_2 + scale * step_2) < before and scale > TOLERANCE:
            scale /= 2
        weight_2 = weight_2 + scale * step_2
        if float(grad_2.norm()) < TOLERANCE * len(d_P):
            break
    return LengthControlledAccuracy(float(torch.sigmoid(weight_2[0])), float(weight_2[1]))


def _log_likelihood(x_P2: Tensor, correct_P: Tensor, weight_2: Tensor) -> float:
    """The regularized log-likelihood, up to a constant."""
    z_P = x_P2 @ weight_2
    return float((correct_P * z_P - torch.nn.functional.softplus(z_P)).sum() - weight_2[1] ** 2 / 2)
