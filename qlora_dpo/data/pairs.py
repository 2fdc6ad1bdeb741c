"""Rows become pairs: the shape of the data is recognised, every row is checked, and unusable rows get a reason."""

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qlora_dpo.data import arrow_cache
from qlora_dpo.data.dialogue import InvalidRow, Message, check_roles
from qlora_dpo.data.files import Row
from qlora_dpo.data.formats import (
    FORMATS_BY_NAME,
    PreferenceFormat,
    detect_format,
    list_columns,
    parse_row,
    parse_tools,
    rename_columns,
)
from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.progress import ProgressCallback, no_progress, track_progress
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.errors import RecipeError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

PARSE_VERSION = 1
"""Goes up when the same row would be another pair, so that no reading of an older version is used."""
MAX_CHARACTERS = 1_000_000
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
class ParseOptions:
    """How the recipe says that rows are to be read."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    every_pair: bool = True


@dataclass(frozen=True)
class ParsedRows:
    """What the rows of a source hold: usable pairs in their order, and the numbers of all other rows by reason.

    Pairs are made from their rows when they are asked for; `row_P` has the row number of each.
    """

    format: PreferenceFormat
    pairs: Sequence[Pair]
    dropped: dict[str, list[int]]
    row_P: IntArray
    is_eval_P: BoolArray | None = None
    """Which pairs are of the held-out share of the prompts, where one was asked for."""

    def select(self, keep_P: BoolArray) -> "ParsedRows":
        """The same with a part of the pairs."""
        places = np.flatnonzero(keep_P)
        pairs = LazySequence(len(places), lambda index: self.pairs[int(places[index])])
        return replace(self, pairs=pairs, row_P=self.row_P[places], is_eval_P=None)


def parse_pairs(
    rows: SourceRows,
    extra_columns: Mapping[str, str] = MappingProxyType({}),
    options: ParseOptions | None = None,
    eval_share: float | None = None,
    progress: ProgressCallback = no_progress,
) -> ParsedRows:
    """Read every row as pairs of the one shape that the source has; `eval_share` of the prompts are marked as held out.

    A row that holds none (a column that is missing, null or of another type, equal or empty answers, unequal prompts,
    roles that do not alternate, a last turn that is not the assistant's, more text than any model reads) is counted
    under its reason. Raises DataError where no row has a shape that is understood, and RecipeError if a column of
    `extra_columns` is missing.
    """
    options = options or ParseOptions()
    if options.columns:
        read, columns = rows.rows, options.columns
        rows = replace(rows, rows=LazySequence(len(read), lambda index: rename_columns(read[index], columns)))
    is_cached = rows.fingerprint and len(rows.rows) >= arrow_cache.MIN_CACHED_ROWS
    key_parts = (PARSE_VERSION, rows.fingerprint, vars(options), eval_share, sorted(extra_columns))
    key = f"parsed-{arrow_cache.cache_key(*key_parts)}" if is_cached else None
    scan = _load_cached_parse(key)
    if scan is None:
        scan = _scan_rows(rows, extra_columns, options, eval_share, progress)
        _store_parse(key, scan)
    shape, row_P, which_P = scan.format, scan.row_P, scan.pair_index_P

    def make(index: int) -> Pair:
        number, which = row_P[index], which_P[index]
        row = rows.rows[number - 1]
        prompt, chosen, rejected = parse_row(shape, row, options.every_pair)[which]
        extra = {column: _extra_value(row, column, key, rows) for column, key in extra_columns.items()}
        label = row["label"] if shape is PreferenceFormat.UNPAIRED else None
        return Pair(prompt, chosen, rejected, number, extra, label, parse_tools(row))

    held = np.array(scan.is_eval_P, dtype=bool) if eval_share is not None else None
    found = ParsedRows(shape, LazySequence(len(row_P), make), scan.dropped, np.array(row_P), held)
    return _with_mismatched_answers(found, scan.answer_digests) if shape is PreferenceFormat.UNPAIRED else found


@dataclass(frozen=True)
class _Scan:
    """What looking at every row has found: of each pair its row and which of the row's pairs it is, and so on."""

    format: PreferenceFormat
    row_P: "array[int]"
    pair_index_P: "array[int]"
    is_eval_P: "array[int]"
    answer_digests: list[bytes]
    """A digest of each unpaired answer."""
    dropped: dict[str, list[int]]


def _load_cached_parse(key: str | None) -> _Scan | None:
    """The scan of an earlier run, if it is cached."""
    table = arrow_cache.load_table(key)
    if table is None:
        return None
    row_P, which_P = (array("q", table[name].to_numpy().tobytes()) for name in ("row", "pair_index"))
    held_P = array("b", table["is_eval"].drop_null().to_numpy().tobytes())
    answers = table["answer"].drop_null().to_pylist()
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    return _Scan(PreferenceFormat(metadata["format"]), row_P, which_P, held_P, answers, json.loads(metadata["dropped"]))


def _store_parse(key: str | None, scan: _Scan) -> None:
    nothing = [None] * len(scan.row_P)
    columns = {
        "row": pa.array(np.array(scan.row_P, dtype=np.int64)),
        "pair_index": pa.array(np.array(scan.pair_index_P, dtype=np.int64)),
        "is_eval": pa.array(np.array(scan.is_eval_P, dtype=np.int8) if scan.is_eval_P else nothing, pa.int8()),
        "answer": pa.array(scan.answer_digests or nothing, pa.binary(16)),
    }
    table = pa.table(columns, metadata={"format": scan.format.value, "dropped": json.dumps(scan.dropped)})
    arrow_cache.store_table(key, table)


def _scan_rows(
    rows: SourceRows,
    extra_columns: Mapping[str, str],
    options: ParseOptions,
    eval_share: float | None,
    progress: ProgressCallback,
) -> _Scan:
    """Look at every row; raises as `parse_pairs` does."""
    shape = detect_format(rows) if options.format == "auto" else FORMATS_BY_NAME[options.format]
    dropped = dict[str, list[int]]()
    row_P, which_P, held_P, answers = array("q"), array("q"), array("b"), list[bytes]()
    for number, row in enumerate(track_progress(rows.rows, "read", len(rows.rows), progress), 1):
        try:
            some = parse_row(shape, row, options.every_pair)
            parse_tools(row)
            for prompt, chosen, rejected in some:
                _check_pair(prompt, chosen, rejected if shape is not PreferenceFormat.UNPAIRED else None)
        except InvalidRow as unusable:
            dropped.setdefault(str(unusable), []).append(number)
            continue
        for column, key in extra_columns.items():
            _extra_value(row, column, key, rows)
        for which, (prompt, chosen, _) in enumerate(some):
            row_P.append(number)
            which_P.append(which)
            if eval_share is not None:
                held_P.append(in_eval_share(prompt, eval_share))
            if shape is PreferenceFormat.UNPAIRED:
                answers.append(sha256(chosen.encode()).digest()[:16])
    return _Scan(shape, row_P, which_P, held_P, answers, dropped)


def in_eval_share(prompt: tuple[Message, ...], share: float) -> bool:
    """True for `share` of all prompts: it depends on the prompt's text alone."""
    text = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") < share * 2**64


def _with_mismatched_answers(parsed: ParsedRows, answers: Sequence[bytes]) -> ParsedRows:
    """Give each unpaired answer the next one that differs for comparison: KTO estimates by it how far the policy is
    from the reference. `answers` has a digest of each.
    """
    count, pairs = len(answers), parsed.pairs
    if len(set(answers)) < 2:
        dropped = (
            {**parsed.dropped, "no other answer to compare with": parsed.row_P.tolist()} if count else parsed.dropped
        )
        nothing = np.zeros(count, dtype=bool)
        return replace(parsed.select(nothing), dropped=dropped)
    following = array("q", [0]) * count
    for place in range(2 * count - 2, -1, -1):  # twice round, since the last one's next is among the first
        here, after = place % count, (place + 1) % count
        following[here] = after if answers[here] != answers[after] else following[after]
    return replace(
        parsed, pairs=LazySequence(count, lambda index: replace(pairs[index], rejected=pairs[following[index]].chosen))
    )


def _check_pair(prompt: tuple[Message, ...], chosen: str, rejected: str | None) -> None:
    """Raise InvalidRow with the first reason that holds; `rejected` is None if there is one answer only."""
    check_roles(prompt)
    answers = (chosen,) if rejected is None else (chosen, rejected)
    texts = (*answers, *(turn["content"] for turn in prompt))
    if not all(map(_is_encodable, texts)):
        raise InvalidRow("text with half a surrogate pair")
    if any(_is_blank(turn["content"]) for turn in prompt):
        raise InvalidRow("empty turn in the prompt")
    if any(map(_is_blank, answers)):
        raise InvalidRow("empty answer")
    if rejected is not None and chosen.strip() == rejected.strip():
        raise InvalidRow("equal answers")
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise InvalidRow(f"more than {MAX_CHARACTERS:,} characters")


def _is_blank(text: str) -> bool:
    """True if nobody would see anything of `text`: white space, control characters and characters without width."""
    return not any(letter.isprintable() and not letter.isspace() for letter in text)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _extra_value(row: Row, column: str, key: str, rows: SourceRows) -> str:
    if column not in row:
        raise RecipeError(f'{rows.name}: has no column "{column}", which {key} names; it has {list_columns(row)}')
    return "" if row[column] is None else str(row[column])
