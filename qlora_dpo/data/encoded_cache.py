"""The table of encoded pairs: its columns, how a pair becomes a row, and how pairs are found again by their text."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import transformers

from qlora_dpo.data.arrow_cache import TableWriter, arrow_cache_dir, read_batches
from qlora_dpo.data.arrow_columns import (
    TOKEN_IDS,
    binary_array,
    number_array,
    read_binary,
    string_array,
    token_ids_array,
)
from qlora_dpo.data.encoded import EncodedPair, EncodedPairs, digest_ids
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates.chat_format import ChatFormat

TOKEN_CACHE_VERSION = 4
"""Goes up when the same pair would be encoded otherwise, so that no entry of an older version is used."""

ENCODED_SCHEMA = pa.schema(
    [
        ("text", pa.binary(16)),  # SHA-256 of the pair's text, first half; zeros where the prompt was cut
        ("position", pa.int64()),  # among the parsed pairs
        ("row", pa.int64()),
        ("prompt", TOKEN_IDS),
        ("chosen", TOKEN_IDS),
        ("rejected", TOKEN_IDS),
        ("digest", pa.binary(32)),  # of the ids; where there are none, of the reason
        ("reason", pa.string()),  # why there are no ids; null if there are
        ("truncated", pa.string()),  # the pair as JSON, if its prompt was cut
        ("repairs", pa.string()),  # what was done to the pair, as a JSON list; null if nothing
    ]
)

EncodedOrReason = EncodedPair | str
"""A pair's ids, or the reason why it has none."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row of the table: a parsed pair, its text digest, and the ids that it got or the reason why it got none."""

    position: int
    pair: Pair
    """The pair as it is encoded."""
    text: bytes
    result: EncodedOrReason
    is_truncated: bool
    """True if it was longer than allowed and its prompt was to be cut."""
    repairs: tuple[str, ...]


@lru_cache(maxsize=4)
def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Everything that decides how a tokenizer renders and tokenizes a chat, as JSON.

    None for a tokenizer without a fast backend, and for a template that writes the date.
    """
    backend, template = getattr(tokenizer, "backend_tokenizer", None), tokenizer.chat_template
    if backend is None or not isinstance(template, str) or "strftime_now" in template:
        return None
    return json.dumps(
        [TOKEN_CACHE_VERSION, transformers.__version__, template, tokenizer.special_tokens_map, backend.to_str()]
    )


def tokenizer_key(tokenizer: Any, form: ChatFormat) -> str | None:
    """What the names of all files of a tokenizer begin with; None if its results are not to be cached."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    return None if fingerprint is None else hashlib.sha256(f"{fingerprint}{form!r}".encode()).hexdigest()[:16]


def text_digest(pair: Pair) -> bytes:
    """16 bytes that tell the texts of a pair from all others, whatever its row."""
    turns = [text for turn in pair.prompt for text in (turn["role"], turn["content"])]
    texts = [*turns, pair.chosen, pair.rejected, pair.tools]
    return hashlib.sha256(f"{list(map(len, texts))}{''.join(texts)}".encode()).digest()[:16]


class EncodedWriter:
    """Gathers rows and writes them to the table, a record batch at each `flush`."""

    def __init__(self, key: str | None) -> None:
        self._writer, self._rows = TableWriter(key, ENCODED_SCHEMA), list[EncodedRow]()

    def append(self, row: EncodedRow) -> None:
        """Add a row, which is written at the next `flush`."""
        self._rows.append(row)

    def flush(self) -> None:
        """Write the rows that were added since the last time."""
        if self._rows:
            self._writer.write(encode_batch(self._rows))
            self._rows = []

    def finish(self) -> pa.Table:
        """The whole table, memory-mapped."""
        self.flush()
        return self._writer.finish()


def encode_batch(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    """The rows as a record batch of ENCODED_SCHEMA."""
    encoded = [row.result if isinstance(row.result, EncodedPair) else None for row in rows]
    reasons = [row.result if isinstance(row.result, str) else None for row in rows]
    ids = [(pair.prompt, pair.chosen, pair.rejected) if pair else ((), (), ()) for pair in encoded]
    digests = [
        pair.digest if pair else _reason_digest(str(reason)) for pair, reason in zip(encoded, reasons, strict=True)
    ]
    columns = [
        binary_array([bytes(16) if row.is_truncated else row.text for row in rows], 16),
        number_array([row.position for row in rows]),
        number_array([row.pair.row for row in rows]),
        *(token_ids_array(column) for column in zip(*ids, strict=True)),
        binary_array(digests, 32),
        string_array(reasons),
        string_array([json.dumps(asdict(row.pair)) if row.is_truncated else None for row in rows]),
        string_array([json.dumps(row.repairs) if row.repairs else None for row in rows]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=ENCODED_SCHEMA)


def _reason_digest(reason: str) -> bytes:
    return hashlib.sha256(reason.encode()).digest()


class EncodedIndex:
    """Finds pairs that were encoded before with the same tokenizer, in whatever file of the cache they are.

    An interrupted run goes on where it was, and files that were read by themselves are not tokenized again as a whole.
    """

    def __init__(self, key: str | None) -> None:
        paths = sorted(arrow_cache_dir().glob(f"{key}-*")) if key is not None else []
        batches = [batch.select(_INDEXED) for path in paths for batch in read_batches(path) if _has_columns(batch)]
        self._table = pa.Table.from_batches(batches, pa.schema([ENCODED_SCHEMA.field(name) for name in _INDEXED]))
        self._pairs = EncodedPairs(self._table)
        text_N = read_binary(self._table, "text")
        self._order_N = np.argsort(text_N, kind="stable")
        self._text_N = text_N[self._order_N]

    def find(self, pairs: Sequence[Pair], texts: Sequence[bytes]) -> list[EncodedOrReason | None]:
        """For each pair, what became of its text before; None if that is not known or the entry is damaged."""
        if not len(self._text_N):
            return [None] * len(pairs)
        wanted_Q = np.array(texts, dtype="S16")
        place_Q = np.minimum(np.searchsorted(self._text_N, wanted_Q), len(self._text_N) - 1)
        is_known_Q = self._text_N[place_Q] == wanted_Q
        return [
            self._entry(int(self._order_N[place]), pair) if is_known else None
            for pair, place, is_known in zip(pairs, place_Q.tolist(), is_known_Q.tolist(), strict=True)
        ]

    def _entry(self, place: int, pair: Pair) -> EncodedOrReason | None:
        reason: str | None = self._table["reason"][place].as_py()
        entry = self._pairs[place]
        if reason is not None:
            return reason if _reason_digest(reason) == entry.digest else None
        if digest_ids(entry.prompt, entry.chosen, entry.rejected) != entry.digest:
            return None
        return EncodedPair(entry.prompt, entry.chosen, entry.rejected, pair.row, entry.digest)


_INDEXED = ["text", "row", "prompt", "chosen", "rejected", "digest", "reason"]


def _has_columns(batch: pa.RecordBatch) -> bool:
    return bool(batch.schema.equals(ENCODED_SCHEMA))
