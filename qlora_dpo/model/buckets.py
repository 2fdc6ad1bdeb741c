"""Sorts the spans of a packed row into a few padded batches, and says as index tensors how to fill and to empty them.

A bucket holds S tiles, padded to q queries and k keys; T tokens of the row, Q and K padded queries and keys of all
buckets, N keys of all buckets that are no padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_dpo.model.span import Span

Array = NDArray[np.int64]

CALL_COST = 2**15
"""Scores that cost as much as one more call. With the 0.5B's 14 heads a T4 that reaches 15 TFLOP/s computes them in 8
microseconds; estimated, not measured."""
QUERY_ROUNDING, KEY_ROUNDING = 16, 32
"""Tiles whose queries and keys agree after rounding up to these are not told apart when buckets are chosen."""
KEY_ALIGNMENT = 8
"""Keys of a bucket are a multiple of this many: the memory-efficient kernel of CUDA would pad and copy other masks."""


@dataclass(frozen=True)
class Buckets:
    """The tiles of a row by bucket; what is padding stands for token 0, and nothing of it comes back."""

    tiles: tuple[tuple[Span, ...], ...]

    @cached_property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Tiles, padded queries and padded keys of each bucket."""
        return [
            (
                len(group),
                max(tile.tokens for tile in group),
                _rounded(max(tile.num_visible for tile in group), KEY_ALIGNMENT),
            )
            for group in self.tiles
        ]

    def tile_offset(self, bucket: int) -> int:
        """How many tiles stand in the buckets before this one."""
        return sum(map(len, self.tiles[:bucket]))

    def index_tensors(self) -> dict[str, Tensor]:
        """What to read where, and how to come back.

        `query` (Q,) and `key` (K,): the token in each place. `place` (T,): where each token's query stands. `order`
        (N,) and `counts` (T,): where each token stands as a key, token after token, and how often. `earlier`: how many
        tokens each tile sees before its own.
        """
        place_T = np.empty(sum(tile.tokens for group in self.tiles for tile in group), dtype=np.int64)
        query, key, tokens, places = list[Array](), list[Array](), list[Array](), list[Array]()
        queries = keys = 0
        for group, (tiles, q, k) in zip(self.tiles, self.sizes, strict=True):
            query_Sq, key_Sk = np.zeros((tiles, q), dtype=np.int64), np.zeros((tiles, k), dtype=np.int64)
            for s, tile in enumerate(group):
                query_Sq[s, : tile.tokens] = np.arange(tile.start, tile.stop)
                key_Sk[s, : tile.num_visible] = tile.visible
                place_T[tile.start : tile.stop] = queries + s * q + np.arange(tile.tokens)
                tokens.append(tile.visible)
                places.append(keys + s * k + np.arange(tile.num_visible))
            query.append(query_Sq.ravel())
            key.append(key_Sk.ravel())
            queries, keys = queries + query_Sq.size, keys + key_Sk.size
        order_N, counts_T = slots_by_token(np.concatenate(tokens), np.concatenate(places))
        arrays = {
            "query": np.concatenate(query),
            "key": np.concatenate(key),
            "place": place_T,
            "order": order_N,
            "counts": counts_T,
            "earlier": np.array(
                [tile.num_visible - tile.tokens for group in self.tiles for tile in group], dtype=np.int64
            ),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def slots_by_token(token_N: Array, slot_N: Array) -> tuple[Array, Array]:
    """The places `slot_N` sorted by the token that stands there, and how often each token does."""
    return slot_N[np.argsort(token_N, kind="stable")], np.bincount(token_N)


def make_buckets(tiles: Sequence[Span]) -> Buckets:
    """The cheapest buckets of neighbours, where tiles are in order of their queries (within a factor of two) and keys.

    A bucket costs its scores, padding included, and a call. With pairs as long as HH's, a row of 2,048 tokens takes 6
    calls a layer and 1.8 times the scores that are needed, one of 16,384 tokens 18 calls and 1.6 times.
    """
    alike: dict[tuple[int, int], list[Span]] = {}
    for tile in tiles:
        alike.setdefault((_rounded(tile.tokens, QUERY_ROUNDING), _rounded(tile.num_visible, KEY_ROUNDING)), []).append(
            tile
        )
    sizes = sorted(alike, key=lambda size: (size[0].bit_length(), size[1], size[0]))
    # least[j] is the cost of the first j sizes, begun[j] where their last bucket begins
    least, begun = [0.0] + [float("inf")] * len(sizes), [0] * (len(sizes) + 1)
    for end in range(1, len(sizes) + 1):
        count = queries = keys = 0
        for start in range(end - 1, -1, -1):
            queries, keys = max(queries, sizes[start][0]), max(keys, sizes[start][1])
            count += len(alike[sizes[start]])
            if (cost := least[start] + CALL_COST + count * queries * keys) < least[end]:
                least[end], begun[end] = cost, start
    groups, end = list[tuple[Span, ...]](), len(sizes)
    while end:
        groups.append(tuple(tile for size in sizes[begun[end] : end] for tile in alike[size]))
        end = begun[end]
    return Buckets(tuple(reversed(groups)))


def _rounded(number: int, to: int) -> int:
    return -(-number // to) * to
