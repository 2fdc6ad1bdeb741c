"""Attention within a packed row, where every token attends to its own sequence only, by one of three backends.

T tokens of the row, S spans or tiles, H query heads, K key heads, G = H / K, D width of a head (that of values may be
another), W = H * D or K * D; q tokens of a span and k tokens that it attends to; Q and K padded queries and keys of all
tiles.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any, Literal, assert_never

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_dpo.model.packed.buckets import Buckets, make_buckets, slots_by_token
from qlora_dpo.model.packed.gather import gather_rows, gather_rows_padded, gather_rows_unique
from qlora_dpo.model.packed.span import Span

Backend = Literal["spans", "batched", "varlen"]
UNSUPPORTED_KWARGS = ("softcap", "position_bias", "s_aux")
"""Attention arguments of some models that packed rows do not support: capped scores, position biases, sinks."""
SPAN_TILE = 256
"""Queries per tile of the backend "spans": only within a tile are scores above the diagonal computed in vain."""
BATCHED_TILE = 128
"""Queries per tile of the backend "batched": with HH's lengths 1.8 times the needed scores, 2.0 times with 256."""
ATTENTION_NAME = "qlora_dpo_packed"
"""Name of `packed_attention` in transformers' attention interface."""


@dataclass(frozen=True)
class PackedLayout:
    """The spans of a row, in order and without gaps, and the backend that computes their attention."""

    spans: tuple[Span, ...]
    backend: Backend
    device: torch.device
    moved: Mapping[str, Tensor] | None = None
    """The `index_tensors` on `device`, if they were copied together with the batch."""

    @cached_property
    def max_sequence_tokens(self) -> int:
        """Number of tokens of the longest sequence in the row."""
        return max(span.num_visible for span in self.spans)

    @cached_property
    def tiles(self) -> tuple[Span, ...]:
        """The spans cut to at most SPAN_TILE queries, so that the scores of a long sequence never exist all at once."""
        return tuple(tile for span in self.spans for tile in span.tiles(SPAN_TILE))

    @cached_property
    def key_chunks(self) -> list[int]:
        """Lengths of the chunks into which keys are split, so that every tile attends to whole chunks."""
        cuts = sorted({end for tile in self.tiles for visible_range in tile.visible_ranges for end in visible_range})
        return [stop - start for start, stop in pairwise(cuts)]

    @cached_property
    def visible_chunks(self) -> list[list[int]]:
        """For each tile, the indices of the `key_chunks` that it attends to."""
        index_of = {start: index for index, start in enumerate(accumulate(self.key_chunks, initial=0))}
        return [
            [index for start, stop in tile.visible_ranges for index in range(index_of[start], index_of[stop])]
            for tile in self.tiles
        ]

    def bias(self, queries: int, keys: int, group: int, dtype: torch.dtype, window: int | None) -> Tensor:
        """The causal bias of `group` heads (G * q, k): 0 for the last `window` keys up to the query, else -infinity.

        A key's place is its position in the sequence. Cached, since layers of one window use the same.
        """
        cache: dict[tuple[int, int, int | None], Tensor] = self.__dict__.setdefault("_biases", {})
        if (queries, keys, window) not in cache:
            hidden_qk = torch.ones(queries, keys, dtype=torch.bool, device=self.device).triu(keys - queries + 1)
            if window is not None:
                hidden_qk |= torch.ones_like(hidden_qk).tril(keys - queries - window)
            bias_qk = torch.zeros(queries, keys, dtype=dtype, device=self.device).masked_fill_(hidden_qk, -torch.inf)
            cache[queries, keys, window] = bias_qk.repeat(group, 1)
        return cache[queries, keys, window]

    def bucket_bias(self, bucket: int, group: int, dtype: torch.dtype, window: int | None) -> Tensor:
        """The bias of a bucket (S, 1, q * G, k), as `bias` is that of a tile; cached."""
        cache: dict[tuple[int, int | None], Tensor] = self.__dict__.setdefault("_bucket_biases", {})
        if (bucket, window) not in cache:
            tiles, q, k = self.buckets.sizes[bucket]
            earlier_S11 = self.index["earlier"][self.buckets.tile_offset(bucket) :][:tiles, None, None]
            query_q1 = torch.arange(q, device=self.device)[:, None]
            key_k, last_Sq1 = torch.arange(k, device=self.device), earlier_S11 + query_q1
            hidden_Sqk = key_k > last_Sq1
            if window is not None:
                hidden_Sqk |= key_k <= last_Sq1 - window
            bias_Sqk = torch.zeros(tiles, q, k, dtype=dtype, device=self.device).masked_fill_(hidden_Sqk, -torch.inf)
            cache[bucket, window] = bias_Sqk.repeat_interleave(group, 1)[:, None]
        return cache[bucket, window]

    @cached_property
    def index(self) -> Mapping[str, Tensor]:
        """The `index_tensors` on the layout's device."""
        if self.moved is not None:
            return self.moved
        return {name: tensor.to(self.device) for name, tensor in self.index_tensors().items()}

    def index_tensors(self) -> dict[str, Tensor]:
        """The index tensors of the backend, int64 on the CPU; they are copied to the device together with the batch."""
        match self.backend:
            case "spans":
                return {}
            case "batched":
                return self.buckets.index_tensors()
            case "varlen":
                return self._varlen_tensors()
            case never:
                assert_never(never)

    @cached_property
    def buckets(self) -> Buckets:
        """The spans as tiles of at most BATCHED_TILE queries, grouped into a few calls of SDPA."""
        return make_buckets([tile for span in self.spans for tile in span.tiles(BATCHED_TILE)])

    def _varlen_tensors(self) -> dict[str, Tensor]:
        """Cumulative lengths of queries and keys, the token of each key, and the key slots of each token."""
        queries, keys = (
            np.cumsum([0, *lengths])
            for lengths in ([span.tokens for span in self.spans], [span.num_visible for span in self.spans])
        )
        token_K = np.concatenate([span.visible for span in self.spans])
        order_K, counts_T = slots_by_token(token_K, np.arange(len(token_K)))
        arrays = {"queries": queries, "keys": keys, "token": token_K, "order": order_K, "counts": counts_T}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def shortest_window(model: Any) -> int | None:
    """Tokens of the shortest sliding window of a layer, itself included; None if every layer looks back all the way."""
    config = model.config.get_text_config()
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        windows.append(getattr(config, "sliding_window", None))
    return min((window for window in windows if isinstance(window, int)), default=None)


def enable_packed_attention(model: Any) -> str:
    """Set `packed_attention` as the model's attention; without a layout it computes transformers' SDPA.

    Returns the name of the previous attention implementation.
    """
    previous: str = model.config._attn_implementation
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION_NAME)
    return previous


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within the spans of `layout`, (1, T, H, D); transformers passes (1, H, T, D) and (1, K, T, D)."""
    if layout is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    if unsupported := [name for name in UNSUPPORTED_KWARGS if kwargs.get(name) is not None]:
        raise ValueError(f"a layer asks attention for {', '.join(unsupported)}")
    window = kwargs.get("sliding_window")
    if window is not None and window >= layout.max_sequence_tokens:
        window = None
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    # cast before gathering, which moves fewer bytes; and autocast does not cover varlen attention
    device_type = value.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return attention_function(layout.backend)(query, key, value, layout, scale, window), None


AttentionFunction = Callable[[Tensor, Tensor, Tensor, PackedLayout, float, int | None], Tensor]


def attention_function(name: Backend) -> AttentionFunction:
    """The attention function of a backend. Its last argument is the tokens that a query sees, itself included."""
    match name:
        case "spans":
            return spans_attention
        case "batched":
            return batched_attention
        case "varlen":
            return varlen_attention
        case never:
            assert_never(never)


def spans_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None
) -> Tensor:
    """One SDPA call per tile, without padding: fastest on a CPU, where calls are cheap and arithmetic is not.

    The G query heads of a key head are stacked along the query dimension, so that keys are never repeated.
    """
    heads, key_heads, width = query.shape[1], key.shape[1], value.shape[-1]
    group = heads // key_heads
    # split instead of slices: the gradient of each slice would be a row of zeros, that of a split is one concatenation
    queries = query.split([tile.tokens for tile in layout.tiles], 2)
    keys, values = key.split(layout.key_chunks, 2), value.split(layout.key_chunks, 2)
    outputs = []
    for tile, chunks, query_HqD in zip(layout.tiles, layout.visible_chunks, queries, strict=True):
        output = F.scaled_dot_product_attention(
            query_HqD.reshape(1, key_heads, group * tile.tokens, -1),
            torch.cat([keys[chunk] for chunk in chunks], 2),
            torch.cat([values[chunk] for chunk in chunks], 2),
            attn_mask=layout.bias(tile.tokens, tile.num_visible, group, query.dtype, window),
            scale=scale,
        )
        outputs.append(output.view(1, heads, tile.tokens, width).transpose(1, 2))
    return torch.cat(outputs, 1)


def batched_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None
) -> Tensor:
    """A few SDPA calls, each over padded tiles of similar size: for GPUs, where every call costs time.

    A T4 has neither flash attention nor varlen kernels; its memory-efficient kernel accepts a mask.
    """
    heads, key_heads, width = query.shape[1], key.shape[1], value.shape[-1]
    group, index = heads // key_heads, layout.index
    query_QW = gather_rows_padded(_by_token(query), index["query"], index["place"])
    key_KW, value_KW = (
        gather_rows(_by_token(part), index["key"], index["order"], index["counts"]) for part in (key, value)
    )
    sizes = layout.buckets.sizes
    # split instead of slices, as in `spans_attention`
    queries = query_QW.split([tiles * q for tiles, q, _ in sizes])
    keys, values = (part.split([tiles * k for tiles, _, k in sizes]) for part in (key_KW, value_KW))
    outputs = []
    for bucket, (tiles, q, k) in enumerate(sizes):
        query_SqKGD = queries[bucket].view(tiles, q, key_heads, group, -1)
        key_SkKD, value_SkKD = (part[bucket].view(tiles, k, key_heads, -1) for part in (keys, values))
        # the query heads of a key head are stacked along the query dimension, so that keys are not repeated: with a
        # mask, torch's fused CUDA kernels do not support grouped-query attention
        output_SKqD = F.scaled_dot_product_attention(
            query_SqKGD.transpose(1, 2).reshape(tiles, key_heads, q * group, -1),
            key_SkKD.transpose(1, 2),
            value_SkKD.transpose(1, 2),
            attn_mask=layout.bucket_bias(bucket, group, query.dtype, window),
            scale=scale,
        )
        output_SqKGD = output_SKqD.view(tiles, key_heads, q, group, width).transpose(1, 2)
        outputs.append(output_SqKGD.reshape(tiles * q, heads * width))
    output_TW = gather_rows_unique(torch.cat(outputs), index["place"])
    return output_TW.view(1, -1, heads, width)


def _by_token(part: Tensor) -> Tensor:
    """(1, H, T, D) as (T, H * D)."""
    return part[0].transpose(0, 1).flatten(1)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None
) -> Tensor:
    """One call of torch's variable-length flash attention for all spans, without padding; needs capability (8, 0)."""
    from torch.nn.attention.varlen import varlen_attn

    index = layout.index
    keys, values = (
        gather_rows(_by_token(part), index["token"], index["order"], index["counts"]).view(-1, *part.shape[1::2])
        for part in (key, value)
    )
    group, gqa_arguments = query.shape[1] // key.shape[1], dict[str, Any]()
    if group > 1 and _supports_gqa(varlen_attn):
        gqa_arguments = {"enable_gqa": True}
    elif group > 1:
        keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    output_THD: Any = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        index["queries"].int(),
        index["keys"].int(),
        max(span.tokens for span in layout.spans),
        layout.max_sequence_tokens,
        # causal, with a span's last query aligned to its last key
        window_size=(-1 if window is None else window - 1, 0),
        scale=scale,
        **gqa_arguments,
    )
    output: Tensor = output_THD[None]
    return output


@cache
def _supports_gqa(varlen_attn: Callable[..., Any]) -> bool:
    """True if varlen_attn supports fewer key heads than query heads, as since torch 2.12."""
    return "enable_gqa" in signature(varlen_attn).parameters
