"""The token ids of a pair: what the model reads and what of it is scored."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.scan_cache import CachedScan
from qlora_dpo.data.spool import Spool

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
    """The pair without its rejected answer; it keeps its digest, since it is the same row of the data."""
    return replace(pair, rejected=())


def pairs_without_rejected(pairs: Sequence[EncodedPair]) -> LazySequence[EncodedPair]:
    """The pairs without their rejected answers."""
    columns = {
        "digest": lambda: pair_digests(pairs),
        "lengths": lambda: pair_lengths(pairs) * np.array([1, 1, 0], np.int32),
    }
    return LazySequence(len(pairs), lambda index: without_rejected(pairs[index]), columns)


def pair_digests(pairs: Sequence[EncodedPair]) -> NDArray[np.bytes_]:
    """The digest of each pair (P), 32 bytes each; pairs that are on disk stay there."""
    known = _known_column(pairs, "digest")
    return np.array([pair.digest for pair in pairs], dtype="S32") if known is None else known


def pair_lengths(pairs: Sequence[EncodedPair]) -> NDArray[np.int32]:
    """Tokens of prompt, chosen and rejected of each pair (P, 3); pairs that are on disk stay there."""
    known = _known_column(pairs, "lengths")
    if known is not None:
        return known
    counts = [(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs]
    return np.array(counts, dtype=np.int32).reshape(-1, 3)


def sequence_lengths(pairs: Sequence[EncodedPair]) -> NDArray[np.int32]:
    """Tokens of the prompt with the longer of the two answers, of each pair (P)."""
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
    """Gathers encoded pairs as 32-bit numbers, many of them on disk, where as Python numbers they would take ten times
    the memory.
    """

    def __init__(self) -> None:
        self._ids, self._digests = Spool(), bytearray()
        self._starts, self._rows = array("q"), array("q")
        self._lengths = array("i")

    @classmethod
    def from_cache(cls, cached: CachedScan) -> "EncodedPairs":
        """The pairs of an earlier run; their ids stay in the file."""
        own, columns = cls(), cached.columns
        own._ids, own._digests = cached.ids, bytearray(columns["digest"].tobytes())
        own._rows = array("q", columns["row"].tobytes())
        own._lengths = array("i", columns["lengths"].tobytes())
        ends_P = cached.ids_offset + 4 * np.cumsum(columns["lengths"].sum(axis=1, dtype=np.int64))
        own._starts = array("q", np.concatenate([[cached.ids_offset], ends_P[:-1]]).astype(np.int64).tobytes())
        return own

    def columns(self) -> dict[str, NDArray[Any]]:
        """What `from_cache` needs beside the ids."""
        digest_P32 = np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, 32)
        return {"row": self.row_numbers(), "lengths": self.lengths(), "digest": digest_P32}

    @property
    def ids(self) -> Spool:
        """All token ids, pair after pair, in 32 bits each."""
        return self._ids

    def add(self, pair: EncodedPair) -> None:
        """Take in a pair."""
        self._starts.append(self._ids.num_bytes)
        self._ids.append(np.array(pair.prompt + pair.chosen + pair.rejected, dtype=np.int32).tobytes())
        self._lengths.extend((len(pair.prompt), len(pair.chosen), len(pair.rejected)))
        self._rows.append(pair.row)
        self._digests += pair.digest

    def __len__(self) -> int:
        return len(self._rows)

    def row_numbers(self) -> NDArray[np.int64]:
        """The row number of each pair (P)."""
        return np.array(self._rows, dtype=np.int64)

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of prompt, chosen and rejected of each pair (P, 3)."""
        return np.array(self._lengths, dtype=np.int32).reshape(-1, 3)

    def digests(self) -> NDArray[np.bytes_]:
        """The digest of each pair (P), 32 bytes each."""
        return np.frombuffer(bytes(self._digests), dtype="S32")

    def pairs(self) -> LazySequence[EncodedPair]:
        """The pairs in the order in which they were added."""
        return LazySequence(len(self), self._pair, {"digest": self.digests, "lengths": self.lengths})

    def _pair(self, index: int) -> EncodedPair:
        start, lengths = self._starts[index], self._lengths[3 * index : 3 * index + 3]
        ids = np.frombuffer(self._ids.read(start, start + 4 * sum(lengths)), dtype=np.int32).tolist()
        answer, other = lengths[0], lengths[0] + lengths[1]
        parts = tuple(ids[:answer]), tuple(ids[answer:other]), tuple(ids[other:])
        return EncodedPair(*parts, self._rows[index], bytes(self._digests[32 * index : 32 * index + 32]))
