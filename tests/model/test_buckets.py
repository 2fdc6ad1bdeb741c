"""Buckets hold every query and key of a row once, and cost less than the padding of one call."""

import random
from collections import Counter

import pytest
import torch

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.packed.attention import BATCHED_TILE
from qlora_dpo.model.packed.buckets import KEY_ALIGNMENT, Buckets, make_buckets
from qlora_dpo.model.packed.gather import gather_rows, gather_rows_padded, gather_rows_unique
from qlora_dpo.model.packed.span import Span
from qlora_dpo.preference.pack import Packing, collate, micro_batches


def pairs_as_long_as_hhs(count: int) -> list[EncodedPair]:
    """Random ids with HH's lengths in Qwen2 tokens: medians of 102 for prompts and 37 for answers, at most 512."""
    draw = random.Random(0)

    def ids(length: float) -> tuple[int, ...]:
        return tuple(draw.randrange(6, 500) for _ in range(max(1, int(length))))

    made = []
    for row in range(count):
        prompt = tuple(range(600, 620)) + ids(min(256, draw.lognormvariate(4.6, 0.8)))
        room = 512 - len(prompt)
        made.append(
            EncodedPair(prompt, *(ids(min(room, draw.lognormvariate(3.6, 0.8))) for _ in range(2)), row=row, digest=b"")
        )
    return made


def rows_of_tiles(tokens: int) -> list[list[Span]]:
    pairs, packing = pairs_as_long_as_hhs(256), Packing(tokens, 0, "batched")
    layouts = [collate([pairs[i] for i in group], packing).layout for group in micro_batches(pairs, packing)]
    return [[tile for span in layout.spans for tile in span.tiles(BATCHED_TILE)] for layout in layouts if layout]


def needed(tiles: list[Span]) -> int:
    """Scores of each query with the keys that it sees."""
    return sum((tile.num_visible - tile.tokens) * tile.tokens + tile.tokens * (tile.tokens + 1) // 2 for tile in tiles)


def computed(buckets: Buckets) -> int:
    return sum(tiles * q * k for tiles, q, k in buckets.sizes)


@pytest.mark.parametrize(("tokens", "times", "calls"), [(2048, 1.9, 7), (16384, 1.75, 20)])
def test_on_hhs_lengths_less_than_twice_the_scores_needed_are_computed(tokens: int, times: float, calls: int) -> None:
    rows = rows_of_tiles(tokens)
    found = [make_buckets(tiles) for tiles in rows]
    assert sum(map(computed, found)) < times * sum(map(needed, rows))
    assert sum(len(each.tiles) for each in found) <= calls * len(found)


def test_every_token_is_queried_once_and_read_as_often_as_it_is_seen() -> None:
    tiles = rows_of_tiles(2048)[0]
    buckets = make_buckets(tiles)
    assert Counter(tile for group in buckets.tiles for tile in group) == Counter(tiles)
    assert all(k % KEY_ALIGNMENT == 0 for _, _, k in buckets.sizes)
    index = buckets.index_tensors()
    count = sum(tile.tokens for tile in tiles)
    assert index["query"][index["place"]].tolist() == list(range(count))
    assert len(set(index["place"].tolist())) == count
    seen = Counter(token for tile in tiles for token in tile.visible.tolist())
    assert index["counts"].tolist() == [seen[token] for token in range(count)]
    assert index["key"][index["order"]].tolist() == [token for token in range(count) for _ in range(seen[token])]


def test_gradients_of_what_is_read_are_those_of_indexing() -> None:
    tiles = rows_of_tiles(2048)[1]
    index = make_buckets(tiles).index_tensors()
    x = torch.randn(sum(tile.tokens for tile in tiles), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(index["key"]), 3, dtype=torch.float64)
    real = torch.zeros(len(weight), dtype=torch.bool)
    real[index["order"]] = True  # padding has no gradient where attention hides it
    weight[~real] = 0
    (ours,) = torch.autograd.grad((gather_rows(x, index["key"], index["order"], index["counts"]) * weight).sum(), x)
    (plain,) = torch.autograd.grad((x[index["key"]] * weight).sum(), x)
    torch.testing.assert_close(ours, plain)
    once = gather_rows_padded(x, index["query"], index["place"])
    assert torch.equal(gather_rows_unique(once, index["place"]), x)
    (back,) = torch.autograd.grad((gather_rows_unique(once * 2, index["place"]) * x.detach()).sum(), x)
    torch.testing.assert_close(back, 2 * x.detach())


def test_the_gradient_of_a_token_that_many_read_is_summed_in_float32() -> None:
    many = 4096
    x = torch.zeros(1, 1, dtype=torch.float16, requires_grad=True)
    read = gather_rows(x, torch.zeros(many, dtype=torch.long), torch.arange(many), torch.tensor([many]))
    (gradient,) = torch.autograd.grad(read.float().sum() * 0.7, x)
    assert gradient.item() == pytest.approx(many * 0.7, rel=1e-3)
