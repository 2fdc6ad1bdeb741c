"""Rows become pairs: the shape of the data is recognised, every row is checked, and unusable rows get a reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from qlora_dpo.data.dialogue import Message, Unusable, check_roles
from qlora_dpo.data.files import Row
from qlora_dpo.data.shapes import NAMES, Shape, named, recognise, renamed, turns_of
from qlora_dpo.data.sources import Rows
from qlora_dpo.errors import RecipeError

MOST_CHARACTERS = 1_000_000
"""Characters of a row's prompt and answers; more is no conversation, and would be tokenized for seconds."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt (optional system turn, then user and assistant in turn, ending with user) and its two answers."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    row: int
    """Row number in the source, from 1; several pairs of one row of ranked answers share it."""
    extra: Mapping[str, str]
    """Values of the columns that were asked for, as text; null is the empty string."""
    label: bool | None = None
    """Of an unpaired answer, which is `chosen`; `rejected` is then the answer of another row, for comparison."""


@dataclass(frozen=True)
class Reading:
    """How the recipe says that rows are to be read."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    every_pair: bool = True


@dataclass(frozen=True)
class Found:
    """What the rows of a source hold: usable pairs in their order, and the numbers of all other rows by reason."""

    shape: Shape
    pairs: list[Pair]
    dropped: dict[str, list[int]]


def find_pairs(rows: Rows, keep: Mapping[str, str] = MappingProxyType({}), reading: Reading | None = None) -> Found:
    """Read every row as pairs of the one shape that the source has.

    A row that holds none (a column that is missing, null or of another type, equal or empty answers, unequal prompts,
    roles that do not alternate, a last turn that is not the assistant's, more text than any model reads) is counted
    under its reason. Raises DataError where no row has a shape that is understood, and RecipeError if a column of
    `keep` is missing.
    """
    reading = reading or Reading()
    rows = replace(rows, rows=[renamed(row, reading.columns) for row in rows.rows]) if reading.columns else rows
    shape = recognise(rows) if reading.format == "auto" else NAMES[reading.format]
    found = Found(shape, [], {})
    for number, row in enumerate(rows.rows, 1):
        try:
            some = turns_of(shape, row, reading.every_pair)
            for prompt, chosen, rejected in some:
                _check(prompt, chosen, rejected if shape is not Shape.UNPAIRED else None)
        except Unusable as unusable:
            found.dropped.setdefault(str(unusable), []).append(number)
            continue
        extra = {column: _kept(row, column, key, rows) for column, key in keep.items()}
        label = row["label"] if shape is Shape.UNPAIRED else None
        found.pairs.extend(Pair(prompt, chosen, rejected, number, extra, label) for prompt, chosen, rejected in some)
    return _compared(found) if shape is Shape.UNPAIRED else found


def _compared(found: Found) -> Found:
    """Give each unpaired answer the next one that differs for comparison: KTO estimates by it how far the policy is
    from the reference.
    """
    pairs, compared = found.pairs, list[Pair]()
    for place, pair in enumerate(pairs):
        others = (each.chosen for each in (*pairs[place + 1 :], *pairs[:place]) if each.chosen != pair.chosen)
        other = next(others, None)
        if other is None:
            found.dropped.setdefault("no other answer to compare with", []).append(pair.row)
        else:
            compared.append(replace(pair, rejected=other))
    return Found(found.shape, compared, found.dropped)


def _check(prompt: tuple[Message, ...], chosen: str, rejected: str | None) -> None:
    """Raise Unusable with the first reason that holds; `rejected` is None if there is one answer only."""
    check_roles(prompt)
    answers = (chosen,) if rejected is None else (chosen, rejected)
    texts = (*answers, *(turn["content"] for turn in prompt))
    if not all(map(_is_text, texts)):
        raise Unusable("text with half a surrogate pair")
    if any(_is_blank(turn["content"]) for turn in prompt):
        raise Unusable("empty turn in the prompt")
    if any(map(_is_blank, answers)):
        raise Unusable("empty answer")
    if rejected is not None and chosen.strip() == rejected.strip():
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
        raise RecipeError(f'{rows.name}: has no column "{column}", which {key} names; it has {named(row)}')
    return "" if row[column] is None else str(row[column])
