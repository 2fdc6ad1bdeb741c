"""Finds problems of preference data: unusable rows, duplicates, contradictions, leaked prompts, length bias."""

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from qlora_dpo.data.pairs import Pair, ParsedRows

MIN_LEAK_CHARACTERS = 40
"""Shorter questions may well be quoted in an answer."""
MIN_HEAD_CHARACTERS, MIN_HEAD_QUESTION_CHARACTERS = 20, 8
"""The shortest prompt, and the shortest that ends with a question mark, at the head of an answer that is said to repeat
it: a greeting is often answered by itself."""
QUESTION_FIRST = "the answers begin with the question"
"""The finding that is mended by leaving the question out."""
MEDIUM_EFFECT_SIZE = 0.5
"""The effect size from which a difference is called medium (Cohen 1988)."""


_PUNCTUATION = re.compile(r"(?:[^\w\u2190-\u2bff\ue000-\uf8ff\U0001f000-\U000dffff]|_)+")
"""All but letters, digits, arrows and pictures: emoji, those of later Unicode versions too, are words of their own."""


@dataclass(frozen=True)
class LintFinding:
    """One kind of problem: the rows that have it, counted from 1, and what to do."""

    problem: str
    rows: tuple[int, ...]
    advice: str
    fixable: bool = True
    """True if removing these rows solves it."""


@dataclass(frozen=True)
class LengthStats:
    """How the lengths of the two answers differ, in characters."""

    num_pairs: int
    chosen_longer: float
    """The share of pairs whose chosen answer is the longer one; a tie counts one half."""
    effect_size: float
    """The mean difference of the log lengths, divided by its standard deviation (Cohen's d of paired samples)."""

    def describe(self) -> str:
        """The statistics as a sentence."""
        side = "longer" if self.effect_size > 0 else "shorter"
        warning = f"; the loss may teach {side} answers" if abs(self.effect_size) >= MEDIUM_EFFECT_SIZE else ""
        share = f"the chosen answer is the longer one in {self.chosen_longer:.1%}"
        return f"{share}, effect size {self.effect_size:+.2f}{warning}"


def find_problems(parsed: ParsedRows) -> list[LintFinding]:
    """All problems of the rows of one source, the worst first; each pair is parsed once."""
    unusable = [
        LintFinding(f"no pair: {reason}", tuple(rows), "mend or remove") for reason, rows in parsed.dropped.items()
    ]
    scan = _LintScan()
    for pair in parsed.pairs:
        scan.add(pair)
    return [
        *unusable,
        *_repeated_keys(parsed.repeated_keys),
        *_optional_finding("the same pair again", scan.duplicates, "keep one of them"),
        *_optional_finding("alike but for case, punctuation and spaces", scan.near_duplicates, "keep one of them"),
        *_optional_finding(
            "the opposite of another pair", scan.contradictions(), "decide which answer is the better one"
        ),
        *_optional_finding(QUESTION_FIRST, scan.question_first, "leave it out, as --fix does"),
        *_optional_finding("an answer repeats the question", scan.leaks, "remove the question from the answer"),
        *_label_imbalance(scan.labels),
    ]


class _LintScan:
    """The problems of pairs that are added one by one; texts are kept as digests."""

    def __init__(self) -> None:
        self.duplicates, self.near_duplicates, self.leaks = list[int](), list[int](), list[int]()
        self.question_first = list[int]()
        self.labels = list[tuple[int, bool | None]]()
        self._exact, self._normalized = set[bytes](), set[bytes]()
        self._rows_by_answers = dict[bytes, list[int]]()
        self._reversed = dict[bytes, bytes]()

    def add(self, pair: Pair) -> None:
        """Compare a pair with those before it."""
        exact, normalized = _digest(_exact_key(pair)), _digest(_normalized_key(pair))
        if exact in self._exact:
            self.duplicates.append(pair.row)
        elif normalized in self._normalized:
            self.near_duplicates.append(pair.row)
        self._exact.add(exact)
        self._normalized.add(normalized)
        if begin_with_question(pair):
            self.question_first.append(pair.row)
        elif _leaks_prompt(pair):
            self.leaks.append(pair.row)
        self.labels.append((pair.row, pair.label))
        if len(pair.answers) == 2:
            prompt = _prompt_key(pair)
            answers, swapped = (
                _digest((prompt, pair.chosen, pair.rejected)),
                _digest((prompt, pair.rejected, pair.chosen)),
            )
            self._rows_by_answers.setdefault(answers, []).append(pair.row)
            self._reversed[answers] = swapped

    def contradictions(self) -> Iterable[int]:
        """Rows of pairs whose answers another pair has the other way round."""
        for answers, rows in self._rows_by_answers.items():
            if self._reversed[answers] in self._rows_by_answers:
                yield from rows


def length_stats(pairs: Sequence[Pair]) -> LengthStats | None:
    """Length statistics of chosen and rejected answers; None without pairs, or for rows of one answer."""
    if not pairs or len(pairs[0].answers) < 2:
        return None
    differences = [math.log(len(pair.chosen)) - math.log(len(pair.rejected)) for pair in pairs]
    mean = sum(differences) / len(pairs)
    spread = math.sqrt(sum((difference - mean) ** 2 for difference in differences) / max(1, len(pairs) - 1))
    longer = sum(0.5 if difference == 0 else float(difference > 0) for difference in differences) / len(pairs)
    return LengthStats(len(pairs), longer, mean / spread if spread else 0.0)


def prompt_overlap(train: Sequence[Pair], eval_pairs: Sequence[Pair]) -> tuple[int, ...]:
    """Rows of the held-out pairs whose prompt is also a training prompt."""
    train_prompts = {_prompt_key(pair) for pair in train}
    return tuple(sorted({pair.row for pair in eval_pairs if _prompt_key(pair) in train_prompts}))


def _optional_finding(problem: str, rows: Iterable[int], advice: str) -> list[LintFinding]:
    numbers = tuple(sorted(set(rows)))
    return [LintFinding(problem, numbers, advice)] if numbers else []


def _prompt_key(pair: Pair) -> Hashable:
    return tuple((turn["role"], turn["content"]) for turn in pair.prompt)


def _exact_key(pair: Pair) -> Hashable:
    return _prompt_key(pair), pair.answers, pair.label


def _normalized_key(pair: Pair) -> Hashable:
    texts = [*(turn["content"] for turn in pair.prompt), *pair.answers]
    return tuple(_PUNCTUATION.sub(" ", text).casefold().strip() for text in texts)


def _digest(key: Hashable) -> bytes:
    return sha256(repr(key).encode(errors="surrogatepass")).digest()[:16]


def _leaks_prompt(pair: Pair) -> bool:
    question = pair.prompt[-1]["content"].strip()
    return len(question) >= MIN_LEAK_CHARACTERS and any(question in answer for answer in pair.answers)


def begin_with_question(pair: Pair) -> bool:
    """True if both answers, or the only one, begin with the last turn of the prompt."""
    question = pair.prompt[-1]["content"].strip()
    shortest = MIN_HEAD_QUESTION_CHARACTERS if question.endswith(("?", "？")) else MIN_HEAD_CHARACTERS
    return len(question) >= shortest and all(_rest(answer, question) is not None for answer in pair.answers)


def _rest(answer: str, question: str) -> str | None:
    """What follows the question at the head of an answer; None if the answer does not begin with it."""
    text = answer.lstrip()
    rest = text.removeprefix(question)
    is_longer_word = question[-1:].isalnum() and rest[:1].isalnum()
    return None if len(rest) == len(text) or is_longer_word else rest.lstrip()


def leave_question_out(row: Mapping[str, Any], pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """`row` without the question at the head of its answers; None if that leaves no pair, or the answers are not found.

    `pairs` are all pairs of the row. A text of the row is an answer if it ends with it, as a whole dialogue does.
    """
    mended = dict[str, str]()
    for pair in filter(begin_with_question, pairs):
        rests = [_rest(answer, pair.prompt[-1]["content"].strip()) or "" for answer in pair.answers]
        if not all(rests) or (len(rests) == 2 and rests[0] == rests[1]):
            return None
        mended |= dict(zip(pair.answers, rests, strict=True))
    found = set[str]()

    def edit(value: Any) -> Any:
        match value:
            case str():
                answer = next((answer for answer in mended if value.endswith(answer)), None)
                if answer is None:
                    return value
                found.add(answer)
                return value[: len(value) - len(answer)] + mended[answer]
            case dict():
                return {key: edit(inner) for key, inner in value.items()}
            case list():
                return [edit(inner) for inner in value]
            case _:
                return value

    edited: dict[str, Any] = edit(dict(row))
    return edited if found == mended.keys() else None


def _repeated_keys(repeated_keys: Mapping[int, str]) -> list[LintFinding]:
    """A finding about rows of JSON that have a key twice; it cannot be told which value was meant."""
    if not repeated_keys:
        return []
    names = ", ".join(f'"{key}"' for key in list(dict.fromkeys(repeated_keys.values()))[:3])
    problem = f"a key twice in one object ({names})"
    return [LintFinding(problem, tuple(sorted(repeated_keys)), "the last value is read; keep one", fixable=False)]


def _label_imbalance(labels: Sequence[tuple[int, bool | None]]) -> list[LintFinding]:
    """A finding about the rarer label, if under a fifth of the rows have it; `labels` holds row number and label."""
    num_true = sum(bool(label) for _, label in labels)
    if not labels or labels[0][1] is None or 0.2 <= num_true / len(labels) <= 0.8:
        return []
    rare_rows = tuple(row for row, label in labels if bool(label) != (2 * num_true > len(labels)))
    problem = f"labels are {num_true / len(labels):.0%} true"
    return [LintFinding(problem, rare_rows, "set objective.desirable_weight and undesirable_weight", fixable=False)]


def findings_json(parsed: ParsedRows, problems: Sequence[LintFinding], stats: LengthStats | None) -> dict[str, Any]:
    """The findings and the length statistics as one JSON object."""
    return {
        "shape": parsed.format.value,
        "pairs": len(parsed.pairs),
        "findings": [
            {"what": finding.problem, "count": len(finding.rows), "rows": list(finding.rows), "advice": finding.advice}
            for finding in problems
        ],
        "length": stats and {"chosen_longer": stats.chosen_longer, "effect": stats.effect_size},
    }
