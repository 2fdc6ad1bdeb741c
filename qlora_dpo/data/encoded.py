"""The token ids of a pair: what the model reads and what of it is scored."""

from array import array
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.lazily import Lazily
from qlora_dpo.data.spool import Spool

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of a pair. `prompt + chosen` and `prompt + rejected` are what the model reads.

    They are the ids that the chat template gives for the prompt with the generation prompt, and for the whole chat
    up to the end token; every answer ends with that token.
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids
    """Empty where the chosen answer alone goes through the model."""
    row: int
    """Row number in the source, from 1."""
    digest: bytes
    """SHA-256 of the three lists, each as its length and its ids in 32 bits, little-endian."""


def chosen_only(pair: EncodedPair) -> EncodedPair:
    """The pair without its rejected answer; it keeps its digest, since it is the same row of the data."""
    return replace(pair, rejected=())


def digest(*lists: Ids) -> bytes:
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

    def add(self, pair: EncodedPair) -> None:
        """Take in a pair."""
        self._starts.append(self._ids.bytes)
        self._ids.add(np.array(pair.prompt + pair.chosen + pair.rejected, dtype=np.int32).tobytes())
        self._lengths.extend((len(pair.prompt), len(pair.chosen), len(pair.rejected)))
        self._rows.append(pair.row)
        self._digests += pair.digest

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> NDArray[np.int64]:
        """The row number of each pair (P)."""
        return np.array(self._rows, dtype=np.int64)

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of prompt, chosen and rejected of each pair (P, 3)."""
        return np.array(self._lengths, dtype=np.int32).reshape(-1, 3)

    def pairs(self) -> Lazily[EncodedPair]:
        """The pairs in the order in which they were added."""
        return Lazily(len(self), self._pair)

    def _pair(self, index: int) -> EncodedPair:
        start, lengths = self._starts[index], self._lengths[3 * index : 3 * index + 3]
        ids = np.frombuffer(self._ids.read(start, start + 4 * sum(lengths)), dtype=np.int32).tolist()
        answer, other = lengths[0], lengths[0] + lengths[1]
        parts = tuple(ids[:answer]), tuple(ids[answer:other]), tuple(ids[other:])
        return EncodedPair(*parts, self._rows[index], bytes(self._digests[32 * index : 32 * index + 32]))
