"""Rows that hold two answers and a word on which is the better one: arena's, HelpSteer's, PKU-SafeRLHF's and others."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from qlora_dpo.data.dialogue import InvalidRow, sanitize_text
from qlora_dpo.data.files import Row

ANSWER_NAMES = ("response", "answer", "completion", "output", "conversation", "model_response", "candidate")
"""What the columns of two answers are called, before `_a` and `_b`, `_1` and `_2`, or `_0` and `_1`."""
VERDICT_COLUMNS = (
    "winner",
    "preference",
    "preferred",
    "better",
    "choice",
    "verdict",
    "better_response_id",
    "preference_strength",
    "overall_preference",
    "label",
)
SIGNED_COLUMNS = ("preference_strength", "overall_preference")
"""HelpSteer's scales from -3 to 3: below 0 the first answer is the better one, above 0 the second."""
PROMPT_COLUMNS = ("prompt", "context", "question", "instruction", "input")
TIE = "neither of two answers is the better one"

_TIES = (
    "tie",
    "bothbad",
    "both bad",
    "both",
    "equal",
    "same",
    "draw",
    "neither",
    "none",
    "tie (bothbad)",
    "tie (both bad)",
)
_ANSWERED = frozenset({"chosen", "rejected", "responses"})
_SUFFIXES = (("a", "b"), ("0", "1"), ("1", "2"))
_MAPPED = ("a", "b")
"""What `data.columns` calls two answers; the word on them is then in `winner`."""
_VOTE = re.compile(r"(?:annotator|vote|rater)_?\d+")
_SCORE_NAMES = ("score", "rating")


def find_answer_columns(row: Row) -> tuple[str, str] | None:
    """The columns of two answers in a row that says otherwise which is the better one; None if it has none."""
    if all(row.get(name) is not None for name in _MAPPED) and ("winner" in row or _score_columns(row, _MAPPED)):
        return _MAPPED
    for name in ANSWER_NAMES:
        for first, second in _SUFFIXES:
            for joint in ("_", ""):
                columns = f"{name}{joint}{first}", f"{name}{joint}{second}"
                if row.get(columns[0]) is not None and row.get(columns[1]) is not None:
                    return columns
    return None


def find_first_number(rows: Iterable[Row]) -> int | None:
    """What the first of two answers a and b is called where the better one is numbered: 0 or 1, by these rows.

    None if all that is named is 1, which may be either.
    """
    numbers = set[float]()
    for row in rows:
        if (columns := find_answer_columns(row)) is not None and columns[0][-1].casefold() == "a":
            values = [row[name] for name in (*VERDICT_COLUMNS, *_vote_columns(row)) if name in row]
            numbers |= {number for number in map(_as_number, values) if number is not None}
    if 2 in numbers:
        return 1
    return 0 if 0 in numbers else None


def join_compared(row: Row, repairs: list[str], first_number: int | None = None) -> Row:
    """`row` with the better of two answers as `chosen` and the other as `rejected`.

    `first_number` is what `find_first_number` found. Raises InvalidRow if the answers tie, or if it is not clear which
    one is the better.
    """
    if not _ANSWERED.isdisjoint(row) or (columns := find_answer_columns(row)) is None:
        return row
    verdict_columns, place = _find_better(row, columns, first_number)
    better, worse = columns if place == 0 else columns[::-1]
    repairs.append(f"{columns[0]} and {columns[1]} read as chosen and rejected by {verdict_columns}")
    joined = {**row, "chosen": row[better], "rejected": row[worse]}
    is_alpaca = isinstance(row.get("instruction"), str) and isinstance(row.get("input"), str)
    prompt = next((name for name in PROMPT_COLUMNS if row.get(name)), None)
    if row.get("prompt") is None and prompt is not None and not is_alpaca:
        joined["prompt"] = row[prompt]
    return joined


def _find_better(row: Row, columns: tuple[str, str], first_number: int | None) -> tuple[str, int]:
    """The column that says which answer is the better one, and which: 0 or 1."""
    if {"winner_model_a", "winner_model_b"} <= row.keys():
        won = [_as_number(row[name]) == 1 for name in ("winner_model_a", "winner_model_b")]
        if won[0] == won[1]:
            raise InvalidRow(TIE)
        return "winner_model_a", won.index(True)
    column = next((name for name in VERDICT_COLUMNS if name in row), None)
    if column is None and (scores := _score_columns(row, columns)):
        return " and ".join(scores), _higher(row, scores)
    if column is None and (votes := _vote_columns(row)):
        return ", ".join(votes), _most_voted(row, votes, columns, first_number)
    if column is None:
        raise InvalidRow(
            f"{columns[0]} and {columns[1]} are two answers, but no column says which is the better one "
            f"({', '.join(VERDICT_COLUMNS[:4])}, ...)"
        )
    return column, _better_place(row, column, columns, first_number)


def _better_place(row: Row, column: str, columns: tuple[str, str], first_number: int | None) -> int:
    """Which answer a column names as the better one: 0 or 1."""
    value, number = row[column], _as_number(row[column])
    if value is None:
        raise InvalidRow(f"{column} is null")
    if column in SIGNED_COLUMNS and number is not None:
        if number == 0:
            raise InvalidRow(TIE)
        return int(number > 0)
    if number is not None and first_number is not None and columns[0][-1].casefold() == "a":
        if number not in (first_number, first_number + 1):
            raise InvalidRow(TIE if number == 0 else f"{column} is {number:g}, which is the number of no answer")
        return int(number - first_number)
    word = _words(value)
    word = str(int(number)) if number is not None and number.is_integer() else word
    if word in _TIES:
        raise InvalidRow(TIE)
    for place, name in enumerate(columns):
        if word in _names(name, place):
            return place
    models = [_words(row.get(f"model_{name[-1]}")) for name in columns]
    if models[0] != models[1] and word in models:
        return models.index(word)
    shown = sanitize_text(str(value))[:40]
    raise InvalidRow(f'{column} is "{shown}", which names neither {columns[0]} nor {columns[1]}')


def _score_columns(row: Row, columns: tuple[str, str]) -> tuple[str, str] | None:
    """The columns with the scores of two answers; None if there are none."""
    for name in _SCORE_NAMES:
        for joint in ("_", ""):
            first, second = (f"{name}{joint}{column[-1]}" for column in columns)
            if first in row and second in row:
                return first, second
    return None


def _higher(row: Row, scores: tuple[str, str]) -> int:
    first, second = (_as_number(row[name]) for name in scores)
    if first is None or second is None:
        raise InvalidRow(f"{scores[0]} or {scores[1]} is no number")
    if first == second:
        raise InvalidRow(TIE)
    return int(second > first)


def _vote_columns(row: Row) -> list[str]:
    return [name for name in row if _VOTE.fullmatch(str(name))]


def _most_voted(row: Row, votes: Sequence[str], columns: tuple[str, str], first_number: int | None) -> int:
    """The answer that most of the voters name; a vote for neither counts for neither."""
    places = list[int]()
    for vote in votes:
        number = _as_number(row[vote])
        if number != 0 or "0" in (columns[0][-1], str(first_number)):
            places.append(_better_place(row, vote, columns, first_number))
    first, second = places.count(0), places.count(1)
    if first == second:
        raise InvalidRow(TIE)
    return int(second > first)


def _words(value: Any) -> str:
    return " ".join(str(value).casefold().replace("_", " ").replace("-", " ").split())


def _names(column: str, place: int) -> set[str]:
    """The words for an answer: its column, the column's ending, and the model of that ending."""
    ending = column[-1].casefold()
    written = f"{_words(column[:-1])} {ending}".strip()
    counted = ("first", "left") if place == 0 else ("second", "right")
    return {
        written,
        ending,
        f"model {ending}",
        f"response {ending}",
        f"answer {ending}",
        f"assistant {ending}",
        *counted,
    }


def _as_number(value: Any) -> float | None:
    """A number, or the number that a text is; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
