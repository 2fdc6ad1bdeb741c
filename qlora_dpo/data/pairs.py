"""Parses rows into pairs: detects the format of the data, checks every row, and records why rows are dropped."""

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
from qlora_dpo.data.arrow_columns import binary_array, number_array, read_numbers
from qlora_dpo.data.dialogue import InvalidRow, Message, check_roles, is_blank, sanitize_text
from qlora_dpo.data.files import Row, log_once
from qlora_dpo.data.formats import ONE_ANSWER, PreferenceFormat
from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.progress import ProgressCallback, no_progress, track_progress
from qlora_dpo.data.rows.reader import ParseOptions, RowReader, list_columns, make_reader, rename_columns
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.errors import RecipeError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

PARSE_VERSION = 3
"""Incremented when the same row would become another pair, so that older cache entries are not used."""
MAX_CHARACTERS = 1_000_000
"""The longest prompt with answers; more is not a conversation, and would take seconds to tokenize."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt (optional system turn, then alternating user and assistant turns, user last) and its two answers.

    Tool turns may follow an assistant turn, and be the last ones of the prompt.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    """Empty for a supervised row, which has one answer."""
    row: int
    """Row number in the source, from 1; several pairs of one row of ranked answers, or of one chat, share it."""
    extra: Mapping[str, str]
    """Values of the extra columns as text; null becomes the empty string."""
    label: bool | None = None
    """For unpaired data: is `chosen` desirable? `rejected` is then a mismatched answer for KTO's KL estimate."""
    tools: str = ""
    """The tools passed to the chat template, as a JSON list of their schemas; empty if there are none."""
    repairs: tuple[str, ...] = ()
    """What was read otherwise than it is written in the row, in the words of the audit table."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers to the prompt: two, or the only one of an unpaired or a supervised row."""
        return (self.chosen, self.rejected) if self.label is None and self.rejected else (self.chosen,)


@dataclass(frozen=True)
class ParsedRows:
    """The parsed rows of a source: well-formed pairs in order, and the numbers of all other rows by reason.

    Pairs are made from their rows when they are read; `row_P` holds the row number of each.
    """

    format: PreferenceFormat
    pairs: Sequence[Pair]
    dropped: dict[str, list[int]]
    row_P: IntArray
    is_eval_P: BoolArray | None = None
    """A mask of the held-out pairs, if a share of the prompts is held out."""
    repeated_keys: Mapping[int, str] = field(default_factory=dict)
    """A key that stands twice in one object of a row, by row number; its last value was read."""

    def select(self, keep_P: BoolArray) -> "ParsedRows":
        """The same rows with only the pairs of a mask."""
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
    """Parse every row in the one format of the source; pairs of `eval_share` of the prompts are marked as held out.

    A row without a pair is listed under its reason: a column that is missing, null or of another type, equal or empty
    answers, unequal prompts, roles that do not alternate, a last turn that is not the assistant's, or more text than
    any model reads. Raises DataError if no row has a supported format, and RecipeError if a column of `extra_columns`
    is missing.
    """
    options = options or ParseOptions()
    if options.columns:
        rows = replace(rows, rows=rename_columns(rows, options.columns))
    is_cached = rows.fingerprint and len(rows.rows) >= arrow_cache.MIN_CACHED_ROWS
    key_parts = (PARSE_VERSION, rows.fingerprint, options.key_parts(), eval_share, sorted(extra_columns))
    key = f"parsed-{arrow_cache.cache_key(*key_parts)}" if is_cached else None
    scan = _load_cached_parse(key)
    reader = make_reader(rows, options, scan.format if scan is not None else None)
    if scan is None:
        scan = _scan_rows(rows, reader, extra_columns, eval_share, progress)
        _store_parse(key, scan)
    _log_repeated_keys(rows, scan.repeated_keys)
    format, row_P, pair_index_P = scan.format, scan.row_P, scan.pair_index_P

    def make(index: int) -> Pair:
        number = row_P[index]
        row = rows.rows[number - 1]
        read = reader.read(row)
        prompt, chosen, rejected = read.pairs[pair_index_P[index]]
        extra = {column: _extra_value(row, column, key, rows) for column, key in extra_columns.items()}
        return Pair(prompt, chosen, rejected, number, extra, read.label, read.tools, read.repairs)

    is_eval_P = np.array(scan.is_eval_P, dtype=bool) if eval_share is not None else None
    pairs = LazySequence(len(row_P), make)
    parsed = ParsedRows(format, pairs, scan.dropped, np.array(row_P), is_eval_P, scan.repeated_keys)
    return _with_mismatched_answers(parsed, scan.answer_digests) if format is PreferenceFormat.UNPAIRED else parsed


@dataclass(frozen=True)
class _Scan:
    """The result of checking every row: the row of each pair, its index among the pairs of that row, and so on."""

    format: PreferenceFormat
    row_P: "array[int]"
    pair_index_P: "array[int]"
    is_eval_P: "array[int]"
    answer_digests: list[bytes]
    """A digest of each unpaired answer."""
    dropped: dict[str, list[int]]
    repeated_keys: Mapping[int, str]


def _load_cached_parse(key: str | None) -> _Scan | None:
    """The scan of an earlier run, if it is cached."""
    table = arrow_cache.load_table(key)
    if table is None:
        return None
    row_P, pair_index_P = (array("q", read_numbers(table, name).tobytes()) for name in ("row", "pair_index"))
    is_eval_P = array("b", read_numbers(table, "is_eval").tobytes()) if "is_eval" in table.column_names else array("b")
    answers = table["answer"].to_pylist() if "answer" in table.column_names else []
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    repeated = {int(row): key for row, key in json.loads(metadata["repeated_keys"]).items()}
    format, dropped = PreferenceFormat(metadata["format"]), json.loads(metadata["dropped"])
    return _Scan(format, row_P, pair_index_P, is_eval_P, answers, dropped, repeated)


def _store_parse(key: str | None, scan: _Scan) -> None:
    columns = {"row": number_array(scan.row_P), "pair_index": number_array(scan.pair_index_P)}
    if scan.is_eval_P:
        columns["is_eval"] = number_array(scan.is_eval_P, np.int8)
    if scan.answer_digests:
        columns["answer"] = binary_array(scan.answer_digests, 16)
    metadata = {
        "format": scan.format.value,
        "dropped": json.dumps(scan.dropped),
        "repeated_keys": json.dumps(dict(scan.repeated_keys)),
    }
    fields = [pa.field(name, column.type) for name, column in columns.items()]
    table = pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata))
    arrow_cache.store_table(key, table)


def _scan_rows(
    rows: SourceRows,
    reader: RowReader,
    extra_columns: Mapping[str, str],
    eval_share: float | None,
    progress: ProgressCallback,
) -> _Scan:
    """Check every row; raises what `parse_pairs` raises."""
    format = reader.format
    dropped = dict[str, list[int]]()
    row_P, pair_index_P, is_eval_P, answers = array("q"), array("q"), array("b"), list[bytes]()
    for number, row in enumerate(track_progress(rows.rows, "read", len(rows.rows), progress), 1):
        try:
            pairs = reader.read(row).pairs
            for prompt, chosen, rejected in pairs:
                _check_pair(prompt, chosen, None if format in ONE_ANSWER else rejected)
        except InvalidRow as unusable:
            dropped.setdefault(str(unusable), []).append(number)
            continue
        for column, key in extra_columns.items():
            _extra_value(row, column, key, rows)
        for pair_index, (prompt, chosen, _) in enumerate(pairs):
            row_P.append(number)
            pair_index_P.append(pair_index)
            if eval_share is not None:
                question = first_question(prompt) if format is PreferenceFormat.SUPERVISED else prompt
                is_eval_P.append(in_eval_share(question, eval_share))
            if format is PreferenceFormat.UNPAIRED:
                answers.append(sha256(chosen.encode()).digest()[:16])
    return _Scan(format, row_P, pair_index_P, is_eval_P, answers, dropped, rows.repeated_keys())


def _log_repeated_keys(rows: SourceRows, repeated_keys: Mapping[int, str]) -> None:
    """Say which rows have a key twice, since only the last of its values is read."""
    if repeated_keys:
        first = min(repeated_keys)
        which = f'row has a key twice ("{sanitize_text(repeated_keys[first])}" in {rows.location(first)})'
        if len(repeated_keys) > 1:
            which = which.replace("row has a key twice (", "rows have a key twice (first ", 1)
        log_once(f"{rows.name}: {len(repeated_keys):,} {which}; the last value is read")


def in_eval_share(prompt: tuple[Message, ...], share: float) -> bool:
    """True for a share of all prompts, decided by a hash of the prompt's text alone."""
    text = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") < share * 2**64


def first_question(prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns up to the first one of the user's, by which all answers of a chat are held out, or none."""
    count = next((number for number, turn in enumerate(prompt, 1) if turn["role"] == "user"), len(prompt))
    return prompt[:count]


def _with_mismatched_answers(parsed: ParsedRows, answers: Sequence[bytes]) -> ParsedRows:
    """Give each unpaired answer the next different answer as `rejected`: the mismatched pair of KTO's KL estimate.

    `answers` holds a digest of each.
    """
    count, pairs = len(answers), parsed.pairs
    if len(set(answers)) < 2:
        dropped = (
            {**parsed.dropped, "no other answer to compare with": parsed.row_P.tolist()} if count else parsed.dropped
        )
        return replace(parsed.select(np.zeros(count, dtype=bool)), dropped=dropped)
    following = array("q", [0]) * count
    for place in range(2 * count - 2, -1, -1):  # two rounds, since the next one of the last is among the first
        current, successor = place % count, (place + 1) % count
        following[current] = successor if answers[current] != answers[successor] else following[successor]
    return replace(
        parsed, pairs=LazySequence(count, lambda index: replace(pairs[index], rejected=pairs[following[index]].chosen))
    )


def _check_pair(prompt: tuple[Message, ...], chosen: str, rejected: str | None) -> None:
    """Raise InvalidRow with the first reason that applies; `rejected` is None for an unpaired answer."""
    check_roles(prompt)
    answers = (chosen,) if rejected is None else (chosen, rejected)
    texts = (*answers, *(turn["content"] for turn in prompt))
    if not all(map(_is_encodable, texts)):
        raise InvalidRow("text with half a surrogate pair")
    if any(is_blank(turn["content"]) for turn in prompt):
        raise InvalidRow("empty turn in the prompt")
    if any(map(is_blank, answers)):
        raise InvalidRow("empty answer")
    if rejected is not None and chosen.strip() == rejected.strip():
        raise InvalidRow("equal answers")
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise InvalidRow(f"more than {MAX_CHARACTERS:,} characters")


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
