"""The token ids of a pair: what the model reads and which of it is scored."""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qlora_dpo.data.arrow_columns import read_binary, read_numbers, token_id_chunks
from qlora_dpo.data.lazy_sequence import LazySequence

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of a pair. `prompt + chosen` and `prompt + rejected` are what the model reads.

    They are the ids that the chat template gives for the prompt with the generation prompt, and for the whole chat
    up to the end token; every answer ends with that token.
    """

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds
    """Empty where the chosen answer alone goes through the model."""
    row: int
    """Row number in the source, from 1."""
    digest: bytes
    """SHA-256 of the three lists, each as its length and its ids in 32 bits, little-endian."""


def without_rejected(pair: EncodedPair) -> EncodedPair:
    """The pair without its rejected answer; its digest stays, since it is the same row of the data."""
    return replace(pair, rejected=())


def pairs_without_rejected(pairs: Sequence[EncodedPair]) -> LazySequence[EncodedPair]:
    """The pairs without their rejected answers."""
    columns = {
        "row": lambda: pair_rows(pairs),
        "digest": lambda: pair_digests(pairs),
        "lengths": lambda: pair_lengths(pairs) * np.array([1, 1, 0], np.int32),
    }
    return LazySequence(len(pairs), lambda index: without_rejected(pairs[index]), columns)


def pair_digests(pairs: Sequence[EncodedPair]) -> NDArray[np.bytes_]:
    """The digest of each pair (P), 32 bytes each; the ids of pairs on disk are not read."""
    column = _known_column(pairs, "digest")
    return np.array([pair.digest for pair in pairs], dtype="S32") if column is None else column


def data_fingerprint(pairs: Sequence[EncodedPair]) -> str:
    """SHA-256 over the token ids of all pairs in their order."""
    return sha256(pair_digests(pairs).tobytes()).hexdigest()


def pair_rows(pairs: Sequence[EncodedPair]) -> NDArray[np.int64]:
    """The row number of each pair (P); the ids of pairs on disk are not read."""
    column = _known_column(pairs, "row")
    return np.array([pair.row for pair in pairs], dtype=np.int64) if column is None else column


def have_rejected(pairs: Sequence[EncodedPair]) -> bool:
    """False if one of the pairs, as a supervised row, has no rejected answer."""
    return bool(pair_lengths(pairs)[:, 2].all())


def pair_lengths(pairs: Sequence[EncodedPair]) -> NDArray[np.int32]:
    """Tokens of prompt, chosen and rejected of each pair (P, 3); the ids of pairs on disk are not read."""
    column = _known_column(pairs, "lengths")
    if column is not None:
        return column
    counts = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return np.array(counts, dtype=np.int32).reshape(-1, 3)


def sequence_lengths(pairs: Sequence[EncodedPair]) -> NDArray[np.int32]:
    """Tokens of the prompt with the longer answer, for each pair (P)."""
    lengths_P3 = pair_lengths(pairs)
    longest_P: NDArray[np.int32] = lengths_P3[:, 0] + lengths_P3[:, 1:].max(axis=1)
    return longest_P


def _known_column(pairs: Sequence[EncodedPair], name: str) -> NDArray[Any] | None:
    return pairs.columns[name]() if isinstance(pairs, LazySequence) and name in pairs.columns else None


def digest_ids(*lists: TokenIds) -> bytes:
    """SHA-256 of token id lists, each as its length and its ids in 32 bits, little-endian."""
    numbers = array("I")
    for ids in lists:
        numbers.append(len(ids))
        numbers.extend(ids)
    return sha256(np.frombuffer(numbers, dtype=np.uint32).astype("<u4").tobytes()).digest()


class EncodedPairs:
    """The encoded pairs of a memory-mapped Arrow table, or those at `index_U` in it; their ids stay on disk.

    The table has the columns row, prompt, chosen, rejected (lists of int32) and digest, in any number of chunks.
    """

    def __init__(self, table: pa.Table, index_U: NDArray[np.int64] | None = None) -> None:
        self._columns = [_ListColumn(table[name]) for name in ("prompt", "chosen", "rejected")]
        self._row_N = read_numbers(table, "row")
        self._digest_N = read_binary(table, "digest")
        self._index_U = np.arange(table.num_rows) if index_U is None else index_U

    def __len__(self) -> int:
        return len(self._index_U)

    def __getitem__(self, index: int) -> EncodedPair:
        place = int(self._index_U[index])
        prompt, chosen, rejected = (column.ids(place) for column in self._columns)
        # numpy drops the zeros at the end of a digest
        digest = bytes(self._digest_N[place]).ljust(32, b"\0")
        return EncodedPair(prompt, chosen, rejected, int(self._row_N[place]), digest)

    def row_numbers(self) -> NDArray[np.int64]:
        """The row number of each pair (P)."""
        row_P: NDArray[np.int64] = self._row_N[self._index_U]
        return row_P

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of prompt, chosen and rejected of each pair (P, 3)."""
        return np.stack([column.length_N for column in self._columns], axis=1)[self._index_U]

    def digests(self) -> NDArray[np.bytes_]:
        """The digest of each pair (P), 32 bytes each."""
        return self._digest_N[self._index_U]

    def pairs(self) -> LazySequence[EncodedPair]:
        """The pairs as a sequence that can be selected from and concatenated."""
        return LazySequence(
            len(self), self.__getitem__, {"row": self.row_numbers, "digest": self.digests, "lengths": self.lengths}
        )


class _ListColumn:
    """Token id lists of a chunked Arrow column, read without a copy of the whole."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = token_id_chunks(column)
        self._starts = [0, *accumulate(len(offsets) - 1 for offsets, _ in self._chunks)]
        self.length_N: NDArray[np.int32] = np.concatenate(
            [np.zeros(0, np.int32), *(np.diff(offsets) for offsets, _ in self._chunks)]
        )

    def ids(self, place: int) -> TokenIds:
        """The list at `place`."""
        number = bisect_right(self._starts, place) - 1
        offsets, values = self._chunks[number]
        first = place - self._starts[number]
        return tuple(values[offsets[first] : offsets[first + 1]].tolist())
