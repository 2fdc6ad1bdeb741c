"""Which answers become a pair, and which are too much alike."""

import statistics
from collections import Counter

import pytest

from qlora_dpo.on_policy.answers import SampledAnswer
from qlora_dpo.on_policy.choose import (
    PairChoice,
    PairingRule,
    ScoredAnswer,
    are_near_equal,
    choose_pairs,
    length_effect,
    usable_answers,
)
from qlora_dpo.on_policy.prompts import AskedPrompt

ASKED = AskedPrompt(({"role": "user", "content": "Why?"},))
WORDS = ("apple", "bread", "cloud", "dune", "ember", "frost", "grove", "haze")


def scored(*scores: float) -> list[ScoredAnswer]:
    words = [*WORDS, *(f"word {number}" for number in range(len(scores)))]
    return [ScoredAnswer(SampledAnswer(word, 1, True), score) for word, score in zip(words, scores, strict=False)]


def chosen(rule: PairingRule, *scores: float) -> list[tuple[float | None, float | None]]:
    choice = PairChoice()
    choose_pairs(ASKED, scored(*scores), rule, choice)
    return [(pair.chosen.score, pair.rejected.score) for pair in choice.pairs]


def test_by_default_the_rejected_answer_lies_two_deviations_below_the_mean() -> None:
    scores = (9.0, *[8.0] * 27, 4.0, 0.0)
    aim = statistics.fmean(scores) - 2 * statistics.pstdev(scores)
    assert 4 < aim < 5
    assert chosen("best_typical", *scores) == [(9.0, 4.0)]
    assert chosen("best_worst", *scores) == [(9.0, 0.0)]
    assert chosen("best_typical", 10.0, 6.0, 5.0, 5.0, 5.0, 5.0, 4.0, 1.0) == [(10.0, 1.0)]


def test_all_pairs_are_those_of_different_scores() -> None:
    assert chosen("all", 1.0, 3.0, 1.0) == [(3.0, 1.0), (3.0, 1.0)]


@pytest.mark.parametrize("rule", ["best_typical", "best_worst", "all"])
def test_answers_of_one_score_make_no_pair(rule: PairingRule) -> None:
    choice = PairChoice()
    choose_pairs(ASKED, scored(1.0, 1.0), rule, choice)
    choose_pairs(ASKED, scored(1.0), rule, choice)
    choose_pairs(ASKED, [], rule, choice)
    assert choice.pairs == []
    assert choice.left_out == {
        "prompts whose answers have equal scores": 1,
        "prompts with a single usable answer": 1,
        "prompts without a usable answer": 1,
    }


def test_answers_that_are_nearly_equal_make_no_pair() -> None:
    text = " ".join(WORDS * 5)
    alike = [
        ScoredAnswer(SampledAnswer(text, 40, True), 2.0),
        ScoredAnswer(SampledAnswer(text + " now", 41, True), 1.0),
    ]
    choice = PairChoice()
    choose_pairs(ASKED, alike, "best_typical", choice)
    assert (choice.pairs, choice.left_out) == ([], {"prompts whose answers are nearly equal": 1})
    choose_pairs(ASKED, [*alike, *scored(0.0)], "best_typical", choice)
    assert [pair.rejected.answer.text for pair in choice.pairs] == ["apple"]
    assert are_near_equal("A  b\nC", "a B c")
    assert not are_near_equal("one two three four", "one two three five")


def test_cut_off_empty_and_repeated_answers_are_counted() -> None:
    left_out: Counter[str] = Counter()
    answers = [
        SampledAnswer("yes", 1, True),
        SampledAnswer(" yes ", 1, True),
        SampledAnswer("  ", 1, True),
        SampledAnswer("so long", 9, False),
    ]
    assert usable_answers(answers, left_out) == answers[:1]
    assert sorted(left_out.values()) == [1, 1, 1]


def test_the_datas_answer_is_chosen_over_the_worst_that_is_not_it() -> None:
    asked, choice = AskedPrompt(ASKED.messages, "apple"), PairChoice()
    choose_pairs(asked, scored(0.0, 2.0, 1.0), "best_typical", choice)
    assert [(pair.chosen.answer.text, pair.rejected.answer.text) for pair in choice.pairs] == [("apple", "cloud")]


def test_the_effect_of_length_is_cohens_d() -> None:
    assert length_effect([4, 6], [1, 3]) == pytest.approx(3 / 2**0.5)
    assert length_effect([2, 2], [2, 2]) is None
    assert length_effect([2], [1]) is None
