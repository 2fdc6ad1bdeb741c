"""What length has to do with an adapter's accuracy: by bins of length, and with length taken out.

P pairs; d_P is by how many tokens the chosen answer is longer.
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
    """Pairs of some lengths; both ends belong to it."""

    low: float
    high: float
    num_correct: float
    """How many of them are right, a tie as one half."""
    pairs: int


def accuracy_by_length(tokens_P2: Tensor, right_P: Tensor) -> list[LengthBin]:
    """Pairs in up to four bins of about as many each, by the mean length of their two answers in tokens."""
    mean_P = tokens_P2.double().mean(1)
    edges = np.quantile(
        mean_P.numpy(), [number / MAX_LENGTH_BINS for number in range(1, MAX_LENGTH_BINS)], method="lower"
    )
    bin_P = torch.bucketize(mean_P, torch.tensor(edges))
    return list(_length_bins(mean_P, bin_P, right_P))


def accuracy_by_length_difference(tokens_P2: Tensor, right_P: Tensor) -> dict[str, LengthBin]:
    """Pairs whose chosen answer is the shorter one, as long as the other, and the longer one; `low` and `high` are d.

    What knows nothing but length is always right in one group and never in another.
    """
    d_P = (tokens_P2[:, 0] - tokens_P2[:, 1]).double()
    names = {-1: "shorter", 0: "as long", 1: "longer"}
    return {names[int(each.low > 0) - int(each.low < 0)]: each for each in _length_bins(d_P, d_P.sign(), right_P)}


def _length_bins(length_P: Tensor, bin_P: Tensor, right_P: Tensor) -> Iterator[LengthBin]:
    for number in sorted(set(bin_P.tolist())):
        mine_P = bin_P == number
        some = length_P[mine_P]
        yield LengthBin(float(some.min()), float(some.max()), float(right_P[mine_P].sum()), int(mine_P.sum()))


@dataclass(frozen=True)
class LengthControlledAccuracy:
    """The accuracy with length taken out, and how much length pulls: above 0 where longer chosen answers win more."""

    accuracy: float
    length_coefficient: float


def length_controlled_accuracy(tokens_P2: Tensor, right_P: Tensor) -> LengthControlledAccuracy:
    """The accuracy that answers of equal length would have, after Dubois et al. 2024 (AlpacaEval), eq. 2.

    P(right) = sigmoid(theta + phi * tanh(d / sd(d))) is fitted to all pairs by maximum likelihood, and the accuracy is
    sigmoid(theta). Their term for the difficulty of the prompt is left out, for there is one pair a prompt; phi, as
    theirs, is regularized: phi^2 / 2 is taken off the log-likelihood, so that there is a solution where length alone
    explains everything. Without differences in length, or where all pairs are right or all wrong, it is the accuracy.
    """
    d_P = (tokens_P2[:, 0] - tokens_P2[:, 1]).double()
    share, spread = float(right_P.mean()), float(d_P.std(correction=0))
    if spread == 0 or share in (0.0, 1.0):
        return LengthControlledAccuracy(share, 0.0)
    x_P2 = torch.stack([torch.ones_like(d_P), torch.tanh(d_P / spread)], 1)
    ridge_22 = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    weight_2 = torch.zeros(2, dtype=torch.float64)
    for _ in range(MAX_NEWTON_STEPS):  # Newton's; each step is halved until it climbs
        p_P = torch.sigmoid(x_P2 @ weight_2)
        slope_2 = x_P2.T @ (right_P - p_P) - ridge_22 @ weight_2
        step_2 = torch.linalg.solve(x_P2.T @ (x_P2 * (p_P * (1 - p_P))[:, None]) + ridge_22, slope_2)
        now, scale = _log_likelihood(x_P2, right_P, weight_2), 1.0
        while _log_likelihood(x_P2, right_P, weight_2 + scale * step_2) < now and scale > TOLERANCE:
            scale /= 2
        weight_2 = weight_2 + scale * step_2
        if float(slope_2.norm()) < TOLERANCE * len(d_P):
            break
    return LengthControlledAccuracy(float(torch.sigmoid(weight_2[0])), float(weight_2[1]))


def _log_likelihood(x_P2: Tensor, right_P: Tensor, weight_2: Tensor) -> float:
    """The log-likelihood less the regularization, up to a constant."""
    z_P = x_P2 @ weight_2
    return float((right_P * z_P - torch.nn.functional.softplus(z_P)).sum() - weight_2[1] ** 2 / 2)
