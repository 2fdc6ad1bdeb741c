"""What is odd about preference data beyond rows that are no pairs: repeats, contradictions, leaks, length bias."""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.pairs import Pair, ParsedRows

MIN_LEAK_CHARACTERS = 40
"""A question that short may well be quoted in an answer."""
MEDIUM_EFFECT_SIZE = 0.5
"""From here on a difference counts as medium (Cohen 1988)."""


@dataclass(frozen=True)
class LintFinding:
    """One kind of oddity: the rows it was found in, counted from 1, and what can be done."""

    problem: str
    rows: tuple[int, ...]
    advice: str
    fixable: bool = True
    """True if leaving these rows out mends it."""


@dataclass(frozen=True)
class LengthStats:
    """How the lengths of answers differ, in characters; shares are of all pairs."""

    num_pairs: int
    chosen_longer: float
    effect_size: float
    """The mean difference of the logarithms of both lengths in units of its standard deviation."""

    def describe(self) -> str:
        """What the figures say."""
        side = "longer" if self.effect_size > 0 else "shorter"
        marked = f"; the loss may teach {side} answers" if abs(self.effect_size) >= MEDIUM_EFFECT_SIZE else ""
        share = f"the chosen answer is the longer one in {self.chosen_longer:.1%}"
        return f"{share}, effect size {self.effect_size:+.2f}{marked}"


def find_problems(parsed: ParsedRows) -> list[LintFinding]:
    """Everything odd about the rows of one source, the worst first."""
    unusable = [
        LintFinding(f"no pair: {reason}", tuple(rows), "mend or remove") for reason, rows in parsed.dropped.items()
    ]
    pairs = parsed.pairs
    return [
        *unusable,
        *_optional_finding("the same pair again", _duplicates(pairs, _exact_key), "keep one of them"),
        *_optional_finding(
            "alike but for case, punctuation and spaces",
            _duplicates(pairs, _normalized_key, excluded_key=_exact_key),
            "keep one of them",
        ),
        *_optional_finding(
            "the opposite of another pair", _contradictions(pairs), "decide which answer is the better one"
        ),
        *_optional_finding(
            "an answer repeats the question", _prompt_leaks(pairs), "remove the question from the answer"
        ),
        *_label_imbalance(pairs),
    ]


def length_stats(pairs: Sequence[Pair]) -> LengthStats | None:
    """How the lengths of chosen and rejected answers differ; None without pairs, or for unpaired answers."""
    if not pairs or pairs[0].label is not None:
        return None
    differences = [math.log(len(pair.chosen)) - math.log(len(pair.rejected)) for pair in pairs]
    mean = sum(differences) / len(pairs)
    spread = math.sqrt(sum((each - mean) ** 2 for each in differences) / max(1, len(pairs) - 1))
    longer = sum(0.5 if each == 0 else float(each > 0) for each in differences) / len(pairs)
    return LengthStats(len(pairs), longer, mean / spread if spread else 0.0)


def prompt_overlap(train: Sequence[Pair], eval_pairs: Sequence[Pair]) -> tuple[int, ...]:
    """Rows of the held-out pairs whose prompt is a training prompt as well."""
    known = {_prompt_key(pair) for pair in train}
    return tuple(sorted({pair.row for pair in eval_pairs if _prompt_key(pair) in known}))


def _optional_finding(what: str, rows: Iterable[int], advice: str) -> list[LintFinding]:
    numbers = tuple(sorted(set(rows)))
    return [LintFinding(what, numbers, advice)] if numbers else []


def _prompt_key(pair: Pair) -> Hashable:
    return tuple((turn["role"], turn["content"]) for turn in pair.prompt)


def _exact_key(pair: Pair) -> Hashable:
    return _prompt_key(pair), pair.chosen, pair.rejected if pair.label is None else None, pair.label


def _normalized_key(pair: Pair) -> Hashable:
    texts = [*(turn["content"] for turn in pair.prompt), pair.chosen, *([pair.rejected] if pair.label is None else [])]
    return tuple(re.sub(r"[\W_]+", " ", text).casefold().strip() for text in texts)


def _duplicates(
    pairs: Sequence[Pair], key: Callable[[Pair], Hashable], excluded_key: Callable[[Pair], Hashable] | None = None
) -> Iterable[int]:
    """Rows whose key an earlier row has, unless its `excluded_key` is an earlier one's as well."""
    seen, other = set[Hashable](), set[Hashable]()
    for pair in pairs:
        mine, excused = key(pair), excluded_key(pair) if excluded_key else None
        if mine in seen and not (excluded_key and excused in other):
            yield pair.row
        seen.add(mine)
        other.add(excused)


def _contradictions(pairs: Sequence[Pair]) -> Iterable[int]:
    known = {(_prompt_key(pair), pair.chosen, pair.rejected) for pair in pairs if pair.label is None}
    yield from (pair.row for pair in pairs if (_prompt_key(pair), pair.rejected, pair.chosen) in known)


def _prompt_leaks(pairs: Sequence[Pair]) -> Iterable[int]:
    for pair in pairs:
        question = pair.prompt[-1]["content"].strip()
        answers = (pair.chosen, pair.rejected) if pair.label is None else (pair.chosen,)
        if len(question) >= MIN_LEAK_CHARACTERS and any(question in answer for answer in answers):
            yield pair.row


def _label_imbalance(pairs: Sequence[Pair]) -> list[LintFinding]:
    good = [pair for pair in pairs if pair.label]
    if not pairs or pairs[0].label is None or 0.2 <= len(good) / len(pairs) <= 0.8:
        return []
    rare = [pair.row for pair in pairs if bool(pair.label) != (2 * len(good) > len(pairs))]
    share = len(good) / len(pairs)
    words = f"labels are {share:.0%} true"
    return [LintFinding(words, tuple(rare), "set objective.desirable_weight and undesirable_weight", fixable=False)]


def findings_json(parsed: ParsedRows, problems: Sequence[LintFinding], stats: LengthStats | None) -> dict[str, Any]:
    """The whole result as one JSON object."""
    return {
        "shape": parsed.format.value,
        "pairs": len(parsed.pairs),
        "findings": [
            {"what": each.problem, "count": len(each.rows), "rows": list(each.rows), "advice": each.advice}
            for each in problems
        ],
        "length": stats and {"chosen_longer": stats.chosen_longer, "effect": stats.effect_size},
    }
