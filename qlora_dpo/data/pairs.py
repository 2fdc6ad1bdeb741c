"""Rows become pairs: the shape of the data is recognised, every row is checked, and unusable rows get a reason."""

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data import scan_cache
from qlora_dpo.data.dialogue import Message, Unusable, check_roles
from qlora_dpo.data.files import Row
from qlora_dpo.data.formats import NAMES, Shape, named, recognise, renamed, tools_of, turns_of
from qlora_dpo.data.lazy_sequence import Lazily
from qlora_dpo.data.progress import Watch, unwatched, watched
from qlora_dpo.data.sources import Rows
from qlora_dpo.errors import RecipeError

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]

FORMAT = 1
"""Goes up when the same row would be another pair, so that no reading of an older version is used."""
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
    tools: str = ""
    """The tools that the template is told of, as a JSON list of their schemas; empty: none."""


@dataclass(frozen=True)
class Reading:
    """How the recipe says that rows are to be read."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    every_pair: bool = True


@dataclass(frozen=True)
class Found:
    """What the rows of a source hold: usable pairs in their order, and the numbers of all other rows by reason.

    Pairs are made from their rows when they are asked for; `row_P` has the row number of each.
    """

    shape: Shape
    pairs: Sequence[Pair]
    dropped: dict[str, list[int]]
    row_P: Numbers
    held_P: Flags | None = None
    """Which pairs are of the held-out share of the prompts, where one was asked for."""

    def only(self, keep_P: Flags) -> "Found":
        """The same with a part of the pairs."""
        places = np.flatnonzero(keep_P)
        pairs = Lazily(len(places), lambda index: self.pairs[int(places[index])])
        return replace(self, pairs=pairs, row_P=self.row_P[places], held_P=None)


def find_pairs(
    rows: Rows,
    keep: Mapping[str, str] = MappingProxyType({}),
    reading: Reading | None = None,
    share: float | None = None,
    watch: Watch = unwatched,
) -> Found:
    """Read every row as pairs of the one shape that the source has; `share` of the prompts are marked as held out.

    A row that holds none (a column that is missing, null or of another type, equal or empty answers, unequal prompts,
    roles that do not alternate, a last turn that is not the assistant's, more text than any model reads) is counted
    under its reason. Raises DataError where no row has a shape that is understood, and RecipeError if a column of
    `keep` is missing.
    """
    reading = reading or Reading()
    if reading.columns:
        read, columns = rows.rows, reading.columns
        rows = replace(rows, rows=Lazily(len(read), lambda index: renamed(read[index], columns)))
    large = rows.fingerprint and len(rows.rows) >= scan_cache.MANY
    name = scan_cache.name_of(FORMAT, rows.fingerprint, vars(reading), share, sorted(keep)) if large else None
    scan = _recalled(name)
    if scan is None:
        scan = _scanned(rows, keep, reading, share, watch)
        _kept_for_later(name, scan)
    shape, row_P, which_P = scan.shape, scan.row_P, scan.which_P

    def make(index: int) -> Pair:
        number, which = row_P[index], which_P[index]
        row = rows.rows[number - 1]
        prompt, chosen, rejected = turns_of(shape, row, reading.every_pair)[which]
        extra = {column: _kept(row, column, key, rows) for column, key in keep.items()}
        label = row["label"] if shape is Shape.UNPAIRED else None
        return Pair(prompt, chosen, rejected, number, extra, label, tools_of(row))

    held = np.array(scan.held_P, dtype=bool) if share is not None else None
    found = Found(shape, Lazily(len(row_P), make), scan.dropped, np.array(row_P), held)
    return _compared(found, scan.answers) if shape is Shape.UNPAIRED else found


@dataclass(frozen=True)
class _Scan:
    """What looking at every row has found: of each pair its row and which of the row's pairs it is, and so on."""

    shape: Shape
    row_P: "array[int]"
    which_P: "array[int]"
    held_P: "array[int]"
    answers: list[bytes]
    """A digest of each unpaired answer."""
    dropped: dict[str, list[int]]


def _recalled(name: str | None) -> _Scan | None:
    """What an earlier run has found in these rows, if it is kept."""
    known = scan_cache.recall(name)
    if known is None:
        return None
    row_P, which_P = (array("q", known.columns[each].tobytes()) for each in ("row", "which"))
    answers = [bytes(each) for each in known.columns["answer"].reshape(-1, 16)]
    held_P = array("b", known.columns["held"].tobytes())
    return _Scan(Shape(known.facts["shape"]), row_P, which_P, held_P, answers, known.facts["dropped"])


def _kept_for_later(name: str | None, scan: _Scan) -> None:
    columns: scan_cache.Columns = {
        "row": np.array(scan.row_P, dtype=np.int64),
        "which": np.array(scan.which_P, dtype=np.int64),
        "held": np.array(scan.held_P, dtype=np.uint8),
        "answer": np.frombuffer(b"".join(scan.answers), dtype=np.uint8),
    }
    scan_cache.keep(name, columns, {"shape": scan.shape.value, "dropped": scan.dropped})


def _scanned(rows: Rows, keep: Mapping[str, str], reading: Reading, share: float | None, watch: Watch) -> _Scan:
    """Look at every row; raises as `find_pairs` does."""
    shape = recognise(rows) if reading.format == "auto" else NAMES[reading.format]
    dropped = dict[str, list[int]]()
    row_P, which_P, held_P, answers = array("q"), array("q"), array("b"), list[bytes]()
    for number, row in enumerate(watched(rows.rows, "read", len(rows.rows), watch), 1):
        try:
            some = turns_of(shape, row, reading.every_pair)
            tools_of(row)
            for prompt, chosen, rejected in some:
                _check(prompt, chosen, rejected if shape is not Shape.UNPAIRED else None)
        except Unusable as unusable:
            dropped.setdefault(str(unusable), []).append(number)
            continue
        for column, key in keep.items():
            _kept(row, column, key, rows)
        for which, (prompt, chosen, _) in enumerate(some):
            row_P.append(number)
            which_P.append(which)
            if share is not None:
                held_P.append(in_share(prompt, share))
            if shape is Shape.UNPAIRED:
                answers.append(sha256(chosen.encode()).digest()[:16])
    return _Scan(shape, row_P, which_P, held_P, answers, dropped)


def in_share(prompt: tuple[Message, ...], share: float) -> bool:
    """True for `share` of all prompts: it depends on the prompt's text alone."""
    text = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") < share * 2**64


def _compared(found: Found, answers: Sequence[bytes]) -> Found:
    """Give each unpaired answer the next one that differs for comparison: KTO estimates by it how far the policy is
    from the reference. `answers` has a digest of each.
    """
    count, pairs = len(answers), found.pairs
    if len(set(answers)) < 2:
        dropped = {**found.dropped, "no other answer to compare with": found.row_P.tolist()} if count else found.dropped
        nothing = np.zeros(count, dtype=bool)
        return replace(found.only(nothing), dropped=dropped)
    following = array("q", [0]) * count
    for place in range(2 * count - 2, -1, -1):  # twice round, since the last one's next is among the first
        here, after = place % count, (place + 1) % count
        following[here] = after if answers[here] != answers[after] else following[after]
    return replace(
        found, pairs=Lazily(count, lambda index: replace(pairs[index], rejected=pairs[following[index]].chosen))
    )


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
