"""Makes preference pairs of scored answers to a prompt."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import combinations
from typing import Literal

from qlora_dpo.on_policy.answers import SampledAnswer
from qlora_dpo.on_policy.prompts import AskedPrompt

PairingRule = Literal["best_typical", "best_worst", "all"]
"""Which answers become a pair: the best and the one whose score is nearest to two standard deviations below the mean
(Xiao et al. 2025, "Finding the Sweet Spot"), the best and the worst, or any two of different scores."""
NEAR_EQUAL = 0.95
"""Share of common words in their order from which two answers count as equal."""


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer and its score; None for an answer that comes from the data."""

    answer: SampledAnswer
    score: float | None


@dataclass(frozen=True)
class AnswerPair:
    """A preference pair of answers to `prompt`."""

    prompt: AskedPrompt
    chosen: ScoredAnswer
    rejected: ScoredAnswer


@dataclass
class PairChoice:
    """The pairs, and why the other prompts and answers gave none: a count for each reason."""

    pairs: list[AnswerPair] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def usable_answers(answers: Sequence[SampledAnswer], left_out: Counter[str]) -> list[SampledAnswer]:
    """The different answers that have text and an end; the others are counted in `left_out`."""
    usable: dict[str, SampledAnswer] = {}
    for answer in answers:
        text = answer.text.strip()
        if not answer.ended:
            left_out["answers cut off by --max-new-tokens"] += 1
        elif not text:
            left_out["empty answers"] += 1
        elif text in usable:
            left_out["answers equal to another of their prompt"] += 1
        else:
            usable[text] = answer
    return list(usable.values())


def choose_pairs(prompt: AskedPrompt, scored: Sequence[ScoredAnswer], rule: PairingRule, choice: PairChoice) -> None:
    """Add the pairs of a prompt to `choice`, or the reason why there are none.

    With a chosen answer of the data, each pair has that one, and the rule names the rejected ones: with `all` every
    answer, else the one with the lowest score, or the first if they have none.
    """
    if not scored:
        choice.left_out["prompts without a usable answer"] += 1
    elif prompt.chosen:
        _choose_beside_data(prompt, scored, rule, choice)
    elif len(scored) < 2:
        choice.left_out["prompts with a single usable answer"] += 1
    else:
        _choose_among_answers(prompt, scored, rule, choice)


def _choose_beside_data(
    prompt: AskedPrompt, scored: Sequence[ScoredAnswer], rule: PairingRule, choice: PairChoice
) -> None:
    chosen = ScoredAnswer(SampledAnswer(prompt.chosen, 0, True), None)
    different = [each for each in scored if not are_near_equal(each.answer.text, prompt.chosen)]
    if not different:
        choice.left_out["prompts whose answers are nearly the chosen one"] += 1
        return
    rejected = different if rule == "all" else [min(different, key=lambda each: each.score or 0.0)]
    choice.pairs += [AnswerPair(prompt, chosen, each) for each in rejected]


def _choose_among_answers(
    prompt: AskedPrompt, scored: Sequence[ScoredAnswer], rule: PairingRule, choice: PairChoice
) -> None:
    scores = [each.score or 0.0 for each in scored]
    ordered = sorted(zip(scores, range(len(scored)), strict=True), key=lambda each: (-each[0], each[1]))
    best = ordered[0][0]
    if best == ordered[-1][0]:
        choice.left_out["prompts whose answers have equal scores"] += 1
        return
    candidates = [
        (scored[better], scored[worse])
        for (better_score, better), (worse_score, worse) in combinations(ordered, 2)
        if better_score > worse_score and not are_near_equal(scored[better].answer.text, scored[worse].answer.text)
    ]
    if not candidates:
        choice.left_out["prompts whose answers are nearly equal"] += 1
        return
    if rule == "all":
        choice.pairs += [AnswerPair(prompt, *each) for each in candidates]
        return
    top = max(better.score or 0.0 for better, _ in candidates)
    aim = statistics.fmean(scores) - 2 * statistics.pstdev(scores) if rule == "best_typical" else min(scores)
    of_best = [each for each in candidates if (each[0].score or 0.0) == top]
    choice.pairs.append(AnswerPair(prompt, *min(of_best, key=lambda each: abs((each[1].score or 0.0) - aim))))


def are_near_equal(one: str, other: str) -> bool:
    """True for texts with nearly the same words in the same order, whatever their case and white space."""
    words, others = one.casefold().split(), other.casefold().split()
    return words == others or SequenceMatcher(None, words, others, autojunk=False).ratio() >= NEAR_EQUAL


def length_effect(chosen: Sequence[int], rejected: Sequence[int]) -> float | None:
    """Cohen's d of the lengths: the difference of their means in pooled standard deviations; None if both are 0."""
    if len(chosen) < 2:
        return None
    pooled = ((statistics.variance(chosen) + statistics.variance(rejected)) / 2) ** 0.5
    return (statistics.fmean(chosen) - statistics.fmean(rejected)) / pooled if pooled else None
