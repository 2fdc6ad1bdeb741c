"""Judges preference pairs before training, by the log-probabilities that the model gives their answers.

P pairs; G good and B bad answers, which are the chosen and rejected ones of pairs, or answers with labels; D width.
Log-probabilities are sums over an answer, in nats.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.encoded import EncodedPair, pair_lengths
from qlora_dpo.wilson import wilson_interval

NEARLY_IMPOSSIBLE_NATS = 3.0
"""Nats a token beyond the model's own answers from which an answer counts as next to impossible."""
ALIKE = 0.9
"""Share of common tokens from which the two answers of a pair count as alike."""
EASY_SHARE = 0.95
"""Share of the pairs that a linear probe ranks right from which they are called easy."""
MAX_LENGTH_AUC = 0.7
MAX_LIKELIHOOD_AUC = 0.8
MAX_IMPOSSIBLE_SHARE = 0.25
MAX_ALIKE_SHARE = 0.25
"""Bounds beyond which there is a sentence; docs/pairs.md has what they were measured on."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Auc:
    """The probability that a good answer scores above a bad one, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class OwnAnswers:
    """The model's own greedy answers to some of the prompts."""

    answers: int
    nats_per_token: float


@dataclass(frozen=True)
class AnswerLogps:
    """Log-probabilities and lengths in tokens of answers (A)."""

    logp_A: FloatArray
    tokens_A: FloatArray

    def __len__(self) -> int:
        return len(self.logp_A)

    @property
    def nats_per_token(self) -> float | None:
        """Nats a token, over all tokens; None without an answer."""
        return float(-self.logp_A.sum() / self.tokens_A.sum()) if len(self) else None

    def masked(self, mask_A: NDArray[np.bool_]) -> "AnswerLogps":
        """The answers of which `mask_A` is true."""
        return AnswerLogps(self.logp_A[mask_A], self.tokens_A[mask_A])


@dataclass(frozen=True)
class PairForecast:
    """What is known of a set of pairs before it is trained on. What does not apply to the set is None."""

    chosen: int
    rejected: int
    own: OwnAnswers | None
    chosen_nats: float | None
    """Nats a token of the chosen answers, or of those that are labelled good."""
    rejected_nats: float | None
    ranked_right: tuple[float, float, float] | None
    """The share of pairs whose chosen answer has the higher log-probability, with its 95 % interval."""
    auc_length: Auc | None
    """How well the number of tokens alone tells chosen from rejected answers; above 0.5 the chosen ones are longer."""
    auc_likelihood: Auc | None
    """The same for the log-probability a token; above 0.5 the chosen ones are likelier."""
    nearly_impossible: float | None
    """Share of the chosen answers with NEARLY_IMPOSSIBLE_NATS a token more than the model's own."""
    alike: float | None
    """Share of the pairs whose answers have ALIKE of their tokens in common."""
    separable: tuple[float, float, float] | None
    """The share of pairs that a linear probe of the model's hidden states ranks right, without having seen their
    prompts, with its 95 % interval; None if the states are not known."""

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as JSON holds them."""
        return asdict(self)


def forecast_pairs(
    pairs: Sequence[EncodedPair],
    logp_P2: FloatArray,
    labels: Sequence[bool] | None = None,
    own: OwnAnswers | None = None,
    states_P2D: FloatArray | None = None,
) -> PairForecast:
    """The forecast for `pairs` with the model's log-probabilities (P, 2) of their chosen and rejected answers.

    `states_P2D` are the means over each answer of the hidden states that predict its tokens.

    With `labels`, each row has one answer, the first, and its label says whether it is good; without rejected answers
    all are good.
    """
    lengths_P3 = pair_lengths(pairs).astype(np.float64)
    chosen, rejected = (AnswerLogps(logp_P2[:, side], lengths_P3[:, 1 + side]) for side in (0, 1))
    paired = labels is None and bool(lengths_P3[:, 2].all())
    if not paired:
        is_good_P = np.ones(len(pairs), dtype=bool) if labels is None else np.asarray(labels, dtype=bool)
        chosen, rejected = chosen.masked(is_good_P), chosen.masked(~is_good_P)
    two_sided = bool(len(chosen) and len(rejected))
    return PairForecast(
        chosen=len(chosen),
        rejected=len(rejected),
        own=own,
        chosen_nats=chosen.nats_per_token,
        rejected_nats=rejected.nats_per_token,
        ranked_right=_share_ranked_right(chosen, rejected) if paired else None,
        auc_length=auc(chosen.tokens_A, rejected.tokens_A, paired=paired) if two_sided else None,
        auc_likelihood=auc(-_nats(chosen), -_nats(rejected), paired=paired) if two_sided else None,
        nearly_impossible=_share_nearly_impossible(chosen, own) if own is not None and len(chosen) else None,
        alike=float(np.mean([_share_in_common(pair) >= ALIKE for pair in pairs])) if paired else None,
        separable=_share_separable(pairs, states_P2D) if paired and states_P2D is not None else None,
    )


def side_names(forecast: PairForecast) -> tuple[str, str]:
    """What the two groups of answers are called: those of pairs, of answers with labels, or of answers alone."""
    if forecast.ranked_right is not None:
        return "chosen answers", "rejected answers"
    return ("good answers", "bad answers") if forecast.rejected else ("answers", "")


def forecast_warnings(forecast: PairForecast) -> dict[str, str]:
    """A sentence of advice for each figure that is out of bounds, by its name; docs/pairs.md has the bounds."""
    return dict(_iter_warnings(forecast))


def _iter_warnings(forecast: PairForecast) -> Iterator[tuple[str, str]]:
    good, bad = side_names(forecast)
    if forecast.separable is not None and forecast.separable[1] <= 0.5:
        yield (
            "separable",
            f"a linear probe of the model's states ranks {forecast.separable[0]:.0%} of the pairs right, which a coin "
            f"may do too ({forecast.separable[1]:.0%} to {forecast.separable[2]:.0%}): a small set will teach little; "
            "look at the labels with `qlora-dpo data show`, or take many more pairs",
        )
    if forecast.separable is not None and forecast.separable[0] >= EASY_SHARE:
        yield (
            "separable",
            f"a linear probe of the model's states ranks {forecast.separable[0]:.0%} of the pairs right: they are told "
            "apart at a glance, and most of their gradient vanishes after a few dozen steps; few pairs are enough, and "
            "what is learned may be no more than the difference between two writers",
        )
    if forecast.auc_length is not None and abs(forecast.auc_length.value - 0.5) >= MAX_LENGTH_AUC - 0.5:
        side = "longer" if forecast.auc_length.value > 0.5 else "shorter"
        yield (
            "auc_length",
            f"length alone tells {good} from {bad} (AUC {forecast.auc_length.value:.2f}): the model will learn to "
            f'write {side} answers; if that is not what you want, try loss_type = "sampo", "rdpo" or "sigmoid_norm"',
        )
    if forecast.auc_likelihood is not None and abs(forecast.auc_likelihood.value - 0.5) >= MAX_LIKELIHOOD_AUC - 0.5:
        likelier = bad if forecast.auc_likelihood.value < 0.5 else good
        yield (
            "auc_likelihood",
            f"log-probability alone tells {good} from {bad} (AUC {forecast.auc_likelihood.value:.2f}): the {likelier} "
            "are much more like the model's own, as when another writer made the others; the first thing learned is "
            "that difference; pairs of the model's own answers have none (`qlora-dpo pairs`)",
        )
    if forecast.nearly_impossible is not None and forecast.nearly_impossible >= MAX_IMPOSSIBLE_SHARE:
        yield (
            "nearly_impossible",
            f"{forecast.nearly_impossible:.0%} of the {good} are next to impossible for the model: training on them "
            "moves it far from what it was, so other abilities may suffer; lower train.learning_rate, or begin with "
            "supervised tuning on them (recipes/sft.toml)",
        )
    if forecast.alike is not None and forecast.alike >= MAX_ALIKE_SHARE:
        yield (
            "alike",
            f"{forecast.alike:.0%} of the pairs have nearly the same tokens on both sides: what both share cancels, so "
            "there is little gradient from the first step on; take answers that differ in more than a few words",
        )


def auc(good_G: FloatArray, bad_B: FloatArray, *, paired: bool) -> Auc:
    """The area under the ROC curve, a tie counting one half, and its 95 % interval.

    The variance is that of DeLong et al. 1988; for paired answers it includes their covariance (Obuchowski 1997). The
    interval is symmetric in log odds. Where one group lies wholly above the other the variance is 0, and the interval's
    bound is that of the rule of three.
    """
    above_GB = (good_G[:, None] > bad_B).astype(np.float64) + (good_G[:, None] == bad_B) / 2
    value, good_place_G, bad_place_B = float(above_GB.mean()), above_GB.mean(1), above_GB.mean(0)
    count = min(len(good_G), len(bad_B))
    if count < 2:
        return Auc(value, 0.0, 1.0)
    if value in (0.0, 1.0):
        return Auc(value, max(0.0, value - 3 / count), min(1.0, value + 3 / count))
    if paired:
        variance = float(np.var(good_place_G + bad_place_B, ddof=1)) / count
    else:
        variance = float(np.var(good_place_G, ddof=1) / len(good_G) + np.var(bad_place_B, ddof=1) / len(bad_B))
    centre, half = math.log(value / (1 - value)), 1.959964 * math.sqrt(variance) / (value * (1 - value))
    return Auc(value, *(1 / (1 + math.exp(-max(-500.0, min(500.0, odds)))) for odds in (centre - half, centre + half)))


def _nats(answers: AnswerLogps) -> FloatArray:
    """Nats a token of each answer (A)."""
    return -answers.logp_A / answers.tokens_A


def _share_ranked_right(chosen: AnswerLogps, rejected: AnswerLogps) -> tuple[float, float, float]:
    """The share of pairs whose chosen answer is the likelier one, a tie counting one half, with its interval."""
    difference_P = chosen.logp_A - rejected.logp_A
    right = float((difference_P > 0).sum() + (difference_P == 0).sum() / 2)
    return (right / len(chosen), *wilson_interval(right, len(chosen)))


def _share_nearly_impossible(chosen: AnswerLogps, own: OwnAnswers) -> float:
    return float((_nats(chosen) > own.nats_per_token + NEARLY_IMPOSSIBLE_NATS).mean())


def _share_in_common(pair: EncodedPair) -> float:
    """Tokens that both answers have, whatever their order, as a share of the longer answer."""
    common = sum((Counter(pair.chosen) & Counter(pair.rejected)).values())
    return common / max(len(pair.chosen), len(pair.rejected))


def _share_separable(pairs: Sequence[EncodedPair], states_P2D: FloatArray) -> tuple[float, float, float]:
    """The share of pairs that a linear probe of the mean hidden states ranks right, and its interval.

    The probe is ridge regression of 1 on the difference between the chosen and the rejected answer's states, without an
    intercept, since exchanging the answers changes the sign of both. Each prompt's pairs are predicted by the fit to
    all others, in closed form (the residuals of a fit without them are G^-1 a, where a are the dual coefficients and G
    the rows and columns of those pairs of the inverse of the regularized kernel matrix).
    """
    difference_PD = states_P2D[:, 0] - states_P2D[:, 1]
    kernel_PP = difference_PD @ difference_PD.T
    ridge = max(float(np.trace(kernel_PP)) / len(pairs), 1e-12)
    inverse_PP = np.linalg.inv(kernel_PP + ridge * np.eye(len(pairs)))
    coefficient_P = inverse_PP.sum(1)
    places_by_prompt: dict[tuple[int, ...], list[int]] = {}
    for place, pair in enumerate(pairs):
        places_by_prompt.setdefault(pair.prompt, []).append(place)
    right = 0.0
    for places in places_by_prompt.values():
        residuals = np.linalg.solve(inverse_PP[np.ix_(places, places)], coefficient_P[places])
        predicted = 1 - residuals
        right += float((predicted > 0).sum() + (predicted == 0).sum() / 2)
    return (right / len(pairs), *wilson_interval(right, len(pairs)))
