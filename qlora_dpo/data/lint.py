"""What is odd about preference data beyond rows that are no pairs: repeats, contradictions, leaks, length bias."""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.pairs import Found, Pair

LEAK_CHARACTERS = 40
"""A question that short may well be quoted in an answer."""
MARKED_EFFECT = 0.5
"""From here on a difference counts as medium (Cohen 1988)."""


@dataclass(frozen=True)
class Finding:
    """One kind of oddity: the rows it was found in, counted from 1, and what can be done."""

    what: str
    rows: tuple[int, ...]
    advice: str
    fixable: bool = True
    """True if leaving these rows out mends it."""


@dataclass(frozen=True)
class Lengths:
    """How the lengths of answers differ, in characters; shares are of all pairs."""

    pairs: int
    chosen_longer: float
    effect: float
    """The mean difference of the logarithms of both lengths in units of its standard deviation."""

    def sentence(self) -> str:
        """What the figures say."""
        side = "longer" if self.effect > 0 else "shorter"
        marked = f"; the loss may teach {side} answers" if abs(self.effect) >= MARKED_EFFECT else ""
        return (
            f"the chosen answer is the longer one in {self.chosen_longer:.1%}, effect size {self.effect:+.2f}{marked}"
        )


def findings(found: Found) -> list[Finding]:
    """Everything odd about the rows of one source, the worst first."""
    unusable = [Finding(f"no pair: {reason}", tuple(rows), "mend or remove") for reason, rows in found.dropped.items()]
    pairs = found.pairs
    return [
        *unusable,
        *_some("the same pair again", _repeats(pairs, _exactly), "keep one of them"),
        *_some(
            "alike but for case, punctuation and spaces", _repeats(pairs, _roughly, but=_exactly), "keep one of them"
        ),
        *_some("the opposite of another pair", _contradictions(pairs), "decide which answer is the better one"),
        *_some("an answer repeats the question", _leaks(pairs), "remove the question from the answer"),
        *_labels(pairs),
    ]


def lengths(pairs: Sequence[Pair]) -> Lengths | None:
    """How the lengths of chosen and rejected answers differ; None without pairs, or for unpaired answers."""
    if not pairs or pairs[0].label is not None:
        return None
    differences = [math.log(len(pair.chosen)) - math.log(len(pair.rejected)) for pair in pairs]
    mean = sum(differences) / len(pairs)
    spread = math.sqrt(sum((each - mean) ** 2 for each in differences) / max(1, len(pairs) - 1))
    longer = sum(0.5 if each == 0 else float(each > 0) for each in differences) / len(pairs)
    return Lengths(len(pairs), longer, mean / spread if spread else 0.0)


def overlap(train: Sequence[Pair], held: Sequence[Pair]) -> tuple[int, ...]:
    """Rows of the held-out pairs whose prompt is a training prompt as well."""
    known = {_prompt(pair) for pair in train}
    return tuple(sorted({pair.row for pair in held if _prompt(pair) in known}))


def _some(what: str, rows: Iterable[int], advice: str) -> list[Finding]:
    numbers = tuple(sorted(set(rows)))
    return [Finding(what, numbers, advice)] if numbers else []


def _prompt(pair: Pair) -> Hashable:
    return tuple((turn["role"], turn["content"]) for turn in pair.prompt)


def _exactly(pair: Pair) -> Hashable:
    return _prompt(pair), pair.chosen, pair.rejected if pair.label is None else None, pair.label


def _roughly(pair: Pair) -> Hashable:
    texts = [*(turn["content"] for turn in pair.prompt), pair.chosen, *([pair.rejected] if pair.label is None else [])]
    return tuple(re.sub(r"[\W_]+", " ", text).casefold().strip() for text in texts)


def _repeats(
    pairs: Sequence[Pair], key: Callable[[Pair], Hashable], but: Callable[[Pair], Hashable] | None = None
) -> Iterable[int]:
    """Rows whose key an earlier row has, unless its `but` is an earlier one's as well."""
    seen, other = set[Hashable](), set[Hashable]()
    for pair in pairs:
        mine, excused = key(pair), but(pair) if but else None
        if mine in seen and not (but and excused in other):
            yield pair.row
        seen.add(mine)
        other.add(excused)


def _contradictions(pairs: Sequence[Pair]) -> Iterable[int]:
    known = {(_prompt(pair), pair.chosen, pair.rejected) for pair in pairs if pair.label is None}
    yield from (pair.row for pair in pairs if (_prompt(pair), pair.rejected, pair.chosen) in known)


def _leaks(pairs: Sequence[Pair]) -> Iterable[int]:
    for pair in pairs:
        question = pair.prompt[-1]["content"].strip()
        answers = (pair.chosen, pair.rejected) if pair.label is None else (pair.chosen,)
        if len(question) >= LEAK_CHARACTERS and any(question in answer for answer in answers):
            yield pair.row


def _labels(pairs: Sequence[Pair]) -> list[Finding]:
    good = [pair for pair in pairs if pair.label]
    if not pairs or pairs[0].label is None or 0.2 <= len(good) / len(pairs) <= 0.8:
        return []
    rare = [pair.row for pair in pairs if bool(pair.label) != (2 * len(good) > len(pairs))]
    share = len(good) / len(pairs)
    words = f"labels are {share:.0%} true"
    return [Finding(words, tuple(rare), "set objective.desirable_weight and undesirable_weight", fixable=False)]


def as_json(found: Found, odd: Sequence[Finding], bias: Lengths | None) -> dict[str, Any]:
    """The whole result as one JSON object."""
    return {
        "shape": found.shape.value,
        "pairs": len(found.pairs),
        "findings": [
            {"what": each.what, "count": len(each.rows), "rows": list(each.rows), "advice": each.advice} for each in odd
        ],
        "length": bias and {"chosen_longer": bias.chosen_longer, "effect": bias.effect},
    }
