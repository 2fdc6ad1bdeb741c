"""Rows become pairs: the shape of the data is recognised, every row is checked, and unusable rows get a reason."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, assert_never

from qlora_dpo.data.dialogue import Message, Unusable, check_roles, is_hh, parse_hh, printable, split_chats, split_hh
from qlora_dpo.data.files import Row, kind_of
from qlora_dpo.data.sources import Rows
from qlora_dpo.errors import DataError, RecipeError

ROLES = ("system", "user", "assistant")


class Shape(Enum):
    """The shapes of preference data that are understood, in the words of messages and tables."""

    HH = "HH dialogues (chosen and rejected strings that hold the whole dialogue)"
    HH_PROMPT = "HH prompts (prompt, chosen and rejected strings, the prompt marked with Human and Assistant)"
    STRINGS = "strings (prompt, chosen and rejected)"
    MESSAGES = "message lists (prompt, chosen and rejected)"
    CHATS = "whole chats (chosen and rejected message lists that hold the prompt)"


UNDERSTOOD = (
    'understood are "chosen" and "rejected" as whole HH dialogues, as strings beside a "prompt" string, as message '
    'lists beside a "prompt" list, and as message lists that hold the whole chat'
)


MOST_CHARACTERS = 1_000_000
"""Characters of a row's prompt and answers; more is no conversation, and would be tokenized for seconds."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt (optional system turn, then user and assistant in turn, ending with user) and its two answers."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    row: int
    """Row number in the source, from 1."""
    extra: Mapping[str, str]
    """Values of the columns that were asked for, as text; null is the empty string."""


@dataclass(frozen=True)
class Found:
    """What the rows of a source hold: usable pairs in their order, and the numbers of all other rows by reason."""

    shape: Shape
    pairs: list[Pair]
    dropped: dict[str, list[int]]


def find_pairs(rows: Rows, keep: Mapping[str, str] = MappingProxyType({})) -> Found:
    """Read every row as a pair of the one shape that the source has.

    A row that is none (a column that is missing, null or of another type, equal or empty answers, unequal prompts,
    roles that do not alternate, a last turn that is not the assistant's, more text than any model reads) is counted
    under its reason. Raises DataError where no row has a shape that is understood, and RecipeError if a column of
    `keep` is missing.
    """
    shape = recognise(rows)
    found = Found(shape, [], {})
    for number, row in enumerate(rows.rows, 1):
        try:
            prompt, chosen, rejected = _turns(shape, row)
            _check(prompt, chosen, rejected)
        except Unusable as unusable:
            found.dropped.setdefault(str(unusable), []).append(number)
            continue
        extra = {column: _kept(row, column, key, rows) for column, key in keep.items()}
        found.pairs.append(Pair(prompt, chosen, rejected, number, extra))
    return found


def recognise(rows: Rows) -> Shape:
    """The shape of the first row that has one; raises DataError, about the first row with answers, if none has."""
    for row in rows.rows:
        if shape := _shape(row):
            return shape
    first = next((row for row in rows.rows if not {"chosen", "rejected"} <= row.keys() or _answered(row)), None)
    if first is None:
        raise DataError(f'{rows.name}: "chosen" or "rejected" is null in every row')
    _columns(first, rows.name)
    kinds = kind_of(first.get("prompt")), kind_of(first["chosen"]), kind_of(first["rejected"])
    if kinds == ("null", "a string", "a string"):
        raise DataError(
            f'{rows.name}: "chosen" and "rejected" are strings without "\\n\\nHuman:" and "\\n\\nAssistant:" '
            f'turns, and there is no "prompt"; it has the columns {_names(first)}; {UNDERSTOOD}'
        )
    prompt = f'"prompt" is {kinds[0]}' if "prompt" in first else 'there is no "prompt"'
    raise DataError(
        f'{rows.place(rows.rows.index(first) + 1)}: {prompt}, "chosen" is {kinds[1]} and "rejected" is {kinds[2]}; '
        f"it has the columns {_names(first)}; {UNDERSTOOD}"
    )


def _shape(row: Row) -> Shape | None:
    """The shape of a row by the types of its columns; None if it has none that is understood."""
    match row.get("prompt"), row.get("chosen"), row.get("rejected"):
        case None, str(chosen), str(rejected) if is_hh(chosen) or is_hh(rejected):
            return Shape.HH
        case str(prompt), str(), str():
            return Shape.HH_PROMPT if is_hh(prompt) else Shape.STRINGS
        case list(), list(chosen), list():
            return Shape.CHATS if _holds_user(chosen) else Shape.MESSAGES
        case None | str(), list(), list():
            return Shape.CHATS
        case _:
            return None


def _answered(row: Row) -> bool:
    return row["chosen"] is not None and row["rejected"] is not None


def _holds_user(messages: Sequence[Any]) -> bool:
    return any(isinstance(each, dict) and each.get("role") == "user" for each in messages)


def _names(row: Row) -> str:
    """The columns of a row, fit to be shown: the first twelve, each of at most 40 characters."""
    names = [printable(str(each))[:40] for each in row]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def _columns(row: Row, place: str) -> None:
    """Raise DataError if an answer column is missing, with the column that may have been meant."""
    for column in ("chosen", "rejected"):
        if column in row:
            continue
        others = [str(each) for each in row if each not in ("prompt", "chosen", "rejected")]
        close = difflib.get_close_matches(column, others, n=1)
        hint = f'rename "{printable(close[0])}" if it is meant' if close else UNDERSTOOD
        raise DataError(f'{place}: has no column "{column}"; it has {_names(row)}; {hint}')


Turns = tuple[tuple[Message, ...], str, str]

WANTED = {
    Shape.HH: {"chosen": "a string", "rejected": "a string"},
    Shape.HH_PROMPT: {"prompt": "a string", "chosen": "a string", "rejected": "a string"},
    Shape.STRINGS: {"prompt": "a string", "chosen": "a string", "rejected": "a string"},
    Shape.MESSAGES: {"prompt": "a list", "chosen": "a list", "rejected": "a list"},
    Shape.CHATS: {"chosen": "a list", "rejected": "a list"},
}


def _turns(shape: Shape, row: Row) -> Turns:
    """Prompt and two answers of a row; raises Unusable if it is not of `shape`."""
    wanted = WANTED[shape]
    for column, kind in wanted.items():
        if column not in row:
            raise Unusable(f"no column {column}")
        if (found := kind_of(row[column])) != kind:
            raise Unusable(f"{column} is null" if found == "null" else f"{column} is {found}, not {kind}")
    match shape:
        case Shape.HH:
            if row.get("prompt") is not None:
                raise Unusable("a prompt beside whole HH dialogues")
            return split_hh(row["chosen"], row["rejected"])
        case Shape.HH_PROMPT:
            return _hh_prompt(row["prompt"], row["chosen"], row["rejected"])
        case Shape.STRINGS:
            if is_hh(row["prompt"]):
                raise Unusable("prompt is marked as HH text, unlike the first row's")
            return ({"role": "user", "content": row["prompt"]},), row["chosen"], row["rejected"]
        case Shape.MESSAGES:
            prompt, chosen, rejected = (_messages(row[each], each) for each in wanted)
            return prompt, _one_answer(chosen), _one_answer(rejected)
        case Shape.CHATS:
            chosen, rejected = (_messages(row[each], each) for each in wanted)
            split = split_chats(chosen, rejected)
            _check_prompt_column(row.get("prompt"), split[0])
            return split
        case _:
            assert_never(shape)


def _hh_prompt(prompt: str, chosen: str, rejected: str) -> Turns:
    """A prompt that ends with an open Assistant marker, and two answers, each after one space."""
    turns = parse_hh(prompt)
    if turns[-1]["role"] != "assistant" or turns[-1]["content"].strip():
        raise Unusable("prompt does not end with an open Assistant turn")
    answers = [parse_hh("\n\nHuman: \n\nAssistant:" + each) for each in (chosen, rejected)]
    if any(len(each) != 2 for each in answers):
        raise Unusable("answer holds more than one turn")
    check_roles(turns[:-1])
    return tuple(turns[:-1]), answers[0][1]["content"], answers[1][1]["content"]


def _messages(value: list[Any], column: str) -> tuple[Message, ...]:
    """Check one message list; keys of a message other than role and content are left out."""
    return tuple(_message(each, f"a message of {column}") for each in value)


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise Unusable(f"{name} is {kind_of(value)}, not an object with role and content")
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            wrong = f"has {kind_of(value[key])} as its {key}" if key in value else f"has no {key}"
            raise Unusable(f"{name} {wrong}")
    if value["role"] not in ROLES:
        role = printable(value["role"])[:20]
        raise Unusable(f'{name} has the role "{role}", which is none of {", ".join(ROLES)}')
    return {"role": value["role"], "content": value["content"]}


def _one_answer(answer: tuple[Message, ...]) -> str:
    if len(answer) > 1:
        raise Unusable("answer holds more than one turn")
    if not answer or answer[0]["role"] != "assistant":
        raise Unusable("last turn is not the assistant's")
    return answer[0]["content"]


def _check_prompt_column(column: Any, prompt: tuple[Message, ...]) -> None:
    """A prompt beside whole chats must be found in them: as one of the user turns, or as all turns."""
    match column:
        case None:
            return
        case str():
            agrees = column in (turn["content"] for turn in prompt if turn["role"] == "user")
        case list():
            agrees = _messages(column, "prompt") == prompt
        case _:
            raise Unusable(f"prompt is {kind_of(column)}, not a string or a list")
    if not agrees:
        raise Unusable("prompt column is not the prompt of the chats")


def _check(prompt: tuple[Message, ...], chosen: str, rejected: str) -> None:
    """Raise Unusable with the first reason that holds."""
    check_roles(prompt)
    texts = (chosen, rejected, *(turn["content"] for turn in prompt))
    if not all(map(_is_text, texts)):
        raise Unusable("text with half a surrogate pair")
    if any(_is_blank(turn["content"]) for turn in prompt):
        raise Unusable("empty turn in the prompt")
    if _is_blank(chosen) or _is_blank(rejected):
        raise Unusable("empty answer")
    if chosen.strip() == rejected.strip():
        raise Unusable("equal answers")
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise Unusable(f"more than {MOST_CHARACTERS:,} characters")


def _is_blank(text: str) -> bool:
    """True if nobody would see anything of `text`: white space, control characters and characters without width."""
    return not any(letter.isprintable() and not letter.isspace() for letter in text)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kept(row: Row, column: str, key: str, rows: Rows) -> str:
    if column not in row:
        raise RecipeError(f'{rows.name}: has no column "{column}", which {key} names; it has {_names(row)}')
    return "" if row[column] is None else str(row[column])
