"""Groups the tiles of a packed row into a few padded batches (buckets), with the index tensors to gather and scatter.

A bucket has S tiles, padded to q queries and k keys. T tokens of the row; Q and K padded queries and keys of all
buckets; N keys of all buckets without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_dpo.model.packed.span import Span

Array = NDArray[np.int64]

CALL_COST = 2**15
"""Cost of one SDPA call, in attention scores. A T4 at 15 TFLOP/s computes that many with the 0.5B's 14 heads in 8
microseconds; estimated, not measured."""
QUERY_ROUNDING, KEY_ROUNDING = 16, 32
"""Tile sizes are rounded up to multiples of these before buckets are chosen, so that few sizes differ."""
KEY_ALIGNMENT = 8
"""A bucket's keys are padded to a multiple of this; CUDA's memory-efficient kernel would pad and copy other masks."""


@dataclass(frozen=True)
class Buckets:
    """The tiles of a row by bucket. Padding reads token 0, and its results are dropped."""

    tiles: tuple[tuple[Span, ...], ...]

    @cached_property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Number of tiles, padded queries and padded keys of each bucket."""
        return [
            (
                len(group),
                max(tile.tokens for tile in group),
                _round_up(max(tile.num_visible for tile in group), KEY_ALIGNMENT),
            )
            for group in self.tiles
        ]

    def tile_offset(self, bucket: int) -> int:
        """Number of tiles in the buckets before this one."""
        return sum(map(len, self.tiles[:bucket]))

    def index_tensors(self) -> dict[str, Tensor]:
        """Index tensors that gather queries and keys into buckets, and scatter the results back.

        `query` (Q,) and `key` (K,): the token in each slot. `place` (T,): the query slot of each token. `order` (N,)
        and `counts` (T,): the key slots of each token, token after token, and their number. `earlier`: for each tile,
        the number of visible tokens before its own.
        """
        place_T = np.empty(sum(tile.tokens for group in self.tiles for tile in group), dtype=np.int64)
        query, key, key_tokens, key_slots = list[Array](), list[Array](), list[Array](), list[Array]()
        query_offset = key_offset = 0
        for group, (tiles, q, k) in zip(self.tiles, self.sizes, strict=True):
            query_Sq, key_Sk = np.zeros((tiles, q), dtype=np.int64), np.zeros((tiles, k), dtype=np.int64)
            for s, tile in enumerate(group):
                query_Sq[s, : tile.tokens] = np.arange(tile.start, tile.stop)
                key_Sk[s, : tile.num_visible] = tile.visible
                place_T[tile.start : tile.stop] = query_offset + s * q + np.arange(tile.tokens)
                key_tokens.append(tile.visible)
                key_slots.append(key_offset + s * k + np.arange(tile.num_visible))
            query.append(query_Sq.ravel())
            key.append(key_Sk.ravel())
            query_offset, key_offset = query_offset + query_Sq.size, key_offset + key_Sk.size
        order_N, counts_T = slots_by_token(np.concatenate(key_tokens), np.concatenate(key_slots))
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
    """`slot_N` sorted by the token in each slot, and the number of slots per token (T,)."""
    return slot_N[np.argsort(token_N, kind="stable")], np.bincount(token_N)


def make_buckets(tiles: Sequence[Span]) -> Buckets:
    """Sort tiles by queries (within a factor of two) and keys, and cut the sequence into the cheapest buckets.

    A bucket costs its scores, padding included, plus `CALL_COST`. With pairs as long as HH's, a row of 2,048 tokens
    takes 6 calls per layer and 1.8 times the scores that are needed, a row of 16,384 tokens 18 calls and 1.6 times.
    """
    tiles_by_size: dict[tuple[int, int], list[Span]] = {}
    for tile in tiles:
        tiles_by_size.setdefault(
            (_round_up(tile.tokens, QUERY_ROUNDING), _round_up(tile.num_visible, KEY_ROUNDING)), []
        ).append(tile)
    sizes = sorted(tiles_by_size, key=lambda size: (size[0].bit_length(), size[1], size[0]))
    # min_cost[j] is the cost of the first j sizes, last_start[j] the start of their last bucket
    min_cost, last_start = [0.0] + [float("inf")] * len(sizes), [0] * (len(sizes) + 1)
    for end in range(1, len(sizes) + 1):
        count = queries = keys = 0
        for start in range(end - 1, -1, -1):
            queries, keys = max(queries, sizes[start][0]), max(keys, sizes[start][1])
            count += len(tiles_by_size[sizes[start]])
            if (cost := min_cost[start] + CALL_COST + count * queries * keys) < min_cost[end]:
                min_cost[end], last_start[end] = cost, start
    groups, end = list[tuple[Span, ...]](), len(sizes)
    while end:
        groups.append(tuple(tile for size in sizes[last_start[end] : end] for tile in tiles_by_size[size]))
        end = last_start[end]
    return Buckets(tuple(reversed(groups)))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
