"""Rows that hold two answers and a word on which is the better one: arena's, HelpSteer's, PKU-SafeRLHF's and others."""

import math
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
PROMPT_COLUMNS = ("prompt", "context", "question", "instruction")
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


def find_answer_columns(row: Row) -> tuple[str, str] | None:
    """The columns of two answers in a row that says otherwise which is the better one; None if it has none."""
    for name in ANSWER_NAMES:
        for first, second in _SUFFIXES:
            for joint in ("_", ""):
                columns = f"{name}{joint}{first}", f"{name}{joint}{second}"
                if row.get(columns[0]) is not None and row.get(columns[1]) is not None:
                    return columns
    return None


def join_compared(row: Row, repairs: list[str]) -> Row:
    """`row` with the better of two answers as `chosen` and the other as `rejected`.

    Raises InvalidRow if they tie, or if it is not clear which one is the better.
    """
    if not _ANSWERED.isdisjoint(row) or (columns := find_answer_columns(row)) is None:
        return row
    verdict_columns, place = _find_better(row, columns)
    better, worse = columns if place == 0 else columns[::-1]
    repairs.append(f"{columns[0]} and {columns[1]} read as chosen and rejected by {verdict_columns}")
    joined = {**row, "chosen": row[better], "rejected": row[worse]}
    if row.get("prompt") is None and (prompt := next((name for name in PROMPT_COLUMNS if row.get(name)), None)):
        joined["prompt"] = row[prompt]
    return joined


def _find_better(row: Row, columns: tuple[str, str]) -> tuple[str, int]:
    """The column that says which answer is the better one, and which: 0 or 1."""
    if {"winner_model_a", "winner_model_b"} <= row.keys():
        won = [_as_number(row[name]) == 1 for name in ("winner_model_a", "winner_model_b")]
        if won[0] == won[1]:
            raise InvalidRow(TIE)
        return "winner_model_a", won.index(True)
    column = next((name for name in VERDICT_COLUMNS if name in row), None)
    if column is None:
        raise InvalidRow(
            f"{columns[0]} and {columns[1]} are two answers, but no column says which is the better one "
            f"({', '.join(VERDICT_COLUMNS[:4])}, ...)"
        )
    value, number = row[column], _as_number(row[column])
    if value is None:
        raise InvalidRow(f"{column} is null")
    if column in SIGNED_COLUMNS and number is not None:
        if number == 0:
            raise InvalidRow(TIE)
        return column, int(number > 0)
    word = " ".join(str(value).casefold().replace("_", " ").replace("-", " ").split())
    word = str(int(number)) if number is not None and number.is_integer() else word
    if word in _TIES:
        raise InvalidRow(TIE)
    for place, name in enumerate(columns):
        if word in _names(name, place, columns):
            return column, place
    shown = sanitize_text(str(value))[:40]
    raise InvalidRow(f'{column} is "{shown}", which names neither {columns[0]} nor {columns[1]}')


def _names(column: str, place: int, columns: tuple[str, str]) -> set[str]:
    """The words for an answer: its column, the column's ending, and the model of that ending."""
    ending = column[-1]
    written = f"{' '.join(column[:-1].replace('_', ' ').split())} {ending}"
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
