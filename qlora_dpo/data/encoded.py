"""The token ids of a pair: what the model reads and what of it is scored."""

import struct
from dataclasses import dataclass, replace
from hashlib import sha256

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
    return sha256(b"".join(struct.pack(f"<{len(ids) + 1}I", len(ids), *ids) for ids in lists)).digest()
