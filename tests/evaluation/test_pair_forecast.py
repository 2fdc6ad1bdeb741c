"""The figures of a forecast are those of their definitions, whatever the pairs are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.evaluation.pair_forecast import Auc, OwnAnswers, PairForecast, auc, forecast_pairs, forecast_warnings


def pair(prompt: int, chosen: tuple[int, ...], rejected: tuple[int, ...]) -> EncodedPair:
    return EncodedPair((prompt,), chosen, rejected, prompt, digest_ids((prompt,), chosen, rejected))


FOUR = [
    pair(1, (7, 7), (8, 8, 8)),
    pair(2, (7, 8, 9), (9, 8, 7)),
    pair(3, (7,), (7, 7, 7, 7)),
    pair(4, (5, 6, 7, 8), (5,)),
]
LOGPS = np.array([[-2.0, -6.0], [-3.0, -3.0], [-5.0, -4.0], [-4.0, -3.0]])


def test_each_figure_is_that_of_its_definition() -> None:
    forecast = forecast_pairs(FOUR, LOGPS, own=OwnAnswers(20, 1.5))
    assert (forecast.chosen, forecast.rejected) == (4, 4)
    assert forecast.chosen_nats == 14 / 10
    assert forecast.rejected_nats == 16 / 11
    assert forecast.ranked_right is not None
    assert forecast.ranked_right[0] == (1 + 0.5) / 4
    assert forecast.alike == 1 / 4  # the same tokens in another order
    assert forecast.nearly_impossible == 1 / 4  # 5 nats a token, more than 1.5 + 3
    assert forecast.auc_length is not None
    chosen, rejected = (2, 3, 1, 4), (3, 3, 4, 1)
    wanted = np.mean([(a > b) + (a == b) / 2 for a in chosen for b in rejected])
    assert forecast.auc_length.value == pytest.approx(wanted)
    assert forecast.auc_likelihood is not None
    chosen_nats, rejected_nats = (1, 1, 5, 1), (2, 1, 1, 3)
    wanted = np.mean([(a < b) + (a == b) / 2 for a in chosen_nats for b in rejected_nats])
    assert forecast.auc_likelihood.value == pytest.approx(wanted)
    assert forecast.separable is None


def test_answers_with_labels_are_two_groups_and_answers_alone_are_one() -> None:
    labelled = forecast_pairs(FOUR, LOGPS, labels=[True, False, True, True])
    assert (labelled.chosen, labelled.rejected, labelled.chosen_nats, labelled.rejected_nats) == (3, 1, 11 / 7, 1.0)
    assert labelled.ranked_right is labelled.alike is labelled.separable is labelled.nearly_impossible is None
    assert labelled.auc_length is not None
    assert labelled.auc_length.value == 1 / 3
    alone = forecast_pairs([pair(one.row, one.chosen, ()) for one in FOUR], LOGPS, own=OwnAnswers(1, 0.0))
    assert (alone.chosen, alone.rejected, alone.rejected_nats, alone.auc_length) == (4, 0, None, None)
    assert alone.nearly_impossible == 1 / 4
    bad = forecast_pairs(FOUR, LOGPS, labels=[False] * 4, own=OwnAnswers(1, 0.0))
    assert (bad.chosen, bad.chosen_nats, bad.rejected_nats, bad.nearly_impossible) == (0, None, 1.4, None)


@pytest.mark.parametrize("paired", [True, False])
def test_95_of_100_intervals_hold_the_true_area(paired: bool) -> None:
    """Normal scores one standard deviation apart, paired ones with correlated parts, have an area known in advance."""
    draw, held, widths = np.random.default_rng(0), 0, []
    shared = 0.8 if paired else 0.0
    for _ in range(400):
        common = draw.normal(size=60) * np.sqrt(shared)
        good, bad = (common + draw.normal(size=60) * np.sqrt(1 - shared) for _ in range(2))
        found = auc(good + 1, bad, paired=paired)
        held += found.low <= 0.7602 <= found.high  # Phi(1 / sqrt(2))
        widths.append(found.high - found.low)
    assert 0.92 <= held / 400 <= 0.98
    unpaired = auc(good + 1, bad, paired=False)
    if paired:  # what the pairs share makes the area more certain
        assert found.high - found.low < 0.8 * (unpaired.high - unpaired.low)


def test_an_area_of_one_is_not_certain() -> None:
    found = auc(np.arange(10, 20.0), np.arange(10.0), paired=True)
    assert (found.value, found.low, found.high) == (1.0, 0.7, 1.0)
    assert auc(np.array([1.0]), np.array([0.0]), paired=True).low == 0.0


def test_the_probe_predicts_each_prompt_from_the_others() -> None:
    draw = np.random.default_rng(1)
    pairs = [pair(number // 2, (number, 1), (number, 2)) for number in range(40)]  # two of each prompt
    states = draw.normal(size=(40, 2, 12))
    states[:, 0, 0] += 1.0
    difference, right = states[:, 0] - states[:, 1], 0
    ridge = np.mean(np.sum(difference**2, axis=1))
    for prompt in range(20):
        others = [place for place in range(40) if place // 2 != prompt]
        x = difference[others]
        weight = np.linalg.solve(x.T @ x + ridge * np.eye(12), x.sum(0))
        right += int((difference[2 * prompt : 2 * prompt + 2] @ weight > 0).sum())
    forecast = forecast_pairs(pairs, np.zeros((40, 2)), states_P2D=states)
    assert forecast.separable is not None
    assert forecast.separable[0] == right / 40
    assert 0.5 < right / 40 < 1


def test_states_without_a_difference_tell_nothing() -> None:
    forecast = forecast_pairs(FOUR, LOGPS, states_P2D=np.zeros((4, 2, 3)))
    assert forecast.separable is not None
    assert forecast.separable[0] == 0.5


INSIDE = PairForecast(
    chosen=200,
    rejected=200,
    own=OwnAnswers(20, 0.8),
    chosen_nats=2.0,
    rejected_nats=2.1,
    ranked_right=(0.5, 0.43, 0.57),
    separable=(0.6, 0.53, 0.67),
    auc_length=Auc(0.55, 0.5, 0.6),
    auc_likelihood=Auc(0.45, 0.4, 0.5),
    nearly_impossible=0.1,
    alike=0.0,
)


@pytest.mark.parametrize(
    ("changed", "name", "part"),
    [
        (
            {"separable": (0.55, 0.48, 0.62)},
            "separable",
            "55% of the pairs right, which a coin may do too (48% to 62%)",
        ),
        ({"separable": (0.96, 0.93, 0.98)}, "separable", "they are told apart at a glance"),
        ({"auc_length": Auc(0.25, 0.2, 0.3)}, "auc_length", "the model will learn to write shorter answers"),
        ({"auc_length": Auc(0.71, 0.6, 0.8)}, "auc_length", "the model will learn to write longer answers"),
        (
            {"auc_likelihood": Auc(0.1, 0.0, 0.2)},
            "auc_likelihood",
            "the rejected answers are much more like the model's",
        ),
        ({"auc_likelihood": Auc(0.9, 0.8, 1.0)}, "auc_likelihood", "the chosen answers are much more like the model's"),
        ({"nearly_impossible": 0.3}, "nearly_impossible", "30% of the chosen answers are next to impossible"),
        ({"alike": 0.4}, "alike", "40% of the pairs have nearly the same tokens"),
    ],
)
def test_what_is_out_of_bounds_has_a_sentence_and_nothing_else_has(
    changed: dict[str, Any], name: str, part: str
) -> None:
    assert forecast_warnings(INSIDE) == {}
    (told,) = forecast_warnings(replace(INSIDE, **changed)).items()
    assert told[0] == name
    assert part in told[1]
