"""Attention inside a packed row: every token sees its own sequence and nothing else, by one of three backends.

T tokens of the row, S spans or tiles, H query heads on K key heads, G = H / K queries per key head, D width of a head,
W = H * D or K * D; q and k tokens of a span and of what it sees; Q and K padded queries and keys of all tiles.
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

from qlora_dpo.model.buckets import Buckets, make_buckets, slots_by_token
from qlora_dpo.model.gather import gather_rows, gather_rows_padded, gather_rows_unique
from qlora_dpo.model.span import Span

Backend = Literal["spans", "batched", "varlen"]
UNSUPPORTED_KWARGS = ("softcap", "position_bias", "s_aux")
"""What some models' layers ask of attention and packed rows do not do: capped scores, biases by position, sinks."""
SPAN_TILE = 256
"""Queries whose scores exist at once: what lies above the diagonal is computed for nothing only inside a tile."""
BATCHED_TILE = 128
"""The same where tiles are padded: on HH's lengths 1.8 times the scores needed are computed, with 256 2.0 times."""
ATTENTION_NAME = "qlora_dpo_packed"
"""The name under which transformers' attention interface knows the function of this file."""


@dataclass(frozen=True)
class PackedLayout:
    """The spans of a row, in the row's order and without gaps, and the backend that computes them."""

    spans: tuple[Span, ...]
    backend: Backend
    device: torch.device
    moved: Mapping[str, Tensor] | None = None
    """The `index_tensors` on `device`, where they came along with the batch's."""

    @cached_property
    def max_sequence_tokens(self) -> int:
        """Tokens of the longest sequence in the row."""
        return max(span.num_visible for span in self.spans)

    @cached_property
    def tiles(self) -> tuple[Span, ...]:
        """The spans cut to at most TILE queries: scores of a long sequence are never all there at once."""
        return tuple(tile for span in self.spans for tile in span.tiles(SPAN_TILE))

    @cached_property
    def key_chunks(self) -> list[int]:
        """The lengths of the parts into which keys are cut, so that every tile sees whole parts."""
        cuts = sorted({end for tile in self.tiles for stretch in tile.visible_ranges for end in stretch})
        return [stop - start for start, stop in pairwise(cuts)]

    @cached_property
    def visible_chunks(self) -> list[list[int]]:
        """For each tile, the numbers of the `pieces` it sees."""
        number = {start: index for index, start in enumerate(accumulate(self.key_chunks, initial=0))}
        return [
            [piece for start, stop in tile.visible_ranges for piece in range(number[start], number[stop])]
            for tile in self.tiles
        ]

    def bias(self, tokens: int, sees: int, group: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of `group` heads, (G * q, k): minus infinity at what comes after a token.

        Made once for all layers.
        """
        made: dict[tuple[int, int], Tensor] = self.__dict__.setdefault("_biases", {})
        if (tokens, sees) not in made:
            hidden_qk = torch.ones(tokens, sees, dtype=torch.bool, device=self.device).triu(sees - tokens + 1)
            bias_qk = torch.zeros(tokens, sees, dtype=dtype, device=self.device).masked_fill_(hidden_qk, -torch.inf)
            made[tokens, sees] = bias_qk.repeat(group, 1)
        return made[tokens, sees]

    def bucket_bias(self, bucket: int, group: int, dtype: torch.dtype) -> Tensor:
        """What is added to a bucket's scores, (S, 1, q * G, k): minus infinity at what comes after a token.

        Made once for all layers, as that of `bias`.
        """
        made: dict[int, Tensor] = self.__dict__.setdefault("_bucket_biases", {})
        if bucket not in made:
            tiles, q, k = self.buckets.sizes[bucket]
            earlier_S11 = self.index["earlier"][self.buckets.tile_offset(bucket) :][:tiles, None, None]
            query_q1 = torch.arange(q, device=self.device)[:, None]
            hidden_Sqk = torch.arange(k, device=self.device) > earlier_S11 + query_q1
            bias_Sqk = torch.zeros(tiles, q, k, dtype=dtype, device=self.device).masked_fill_(hidden_Sqk, -torch.inf)
            made[bucket] = bias_Sqk.repeat_interleave(group, 1)[:, None]
        return made[bucket]

    @cached_property
    def index(self) -> Mapping[str, Tensor]:
        """What `index_tensors` gives, on the layout's device."""
        if self.moved is not None:
            return self.moved
        return {name: tensor.to(self.device) for name, tensor in self.index_tensors().items()}

    def index_tensors(self) -> dict[str, Tensor]:
        """The numbers that the backend reads, int64 on the CPU: they go to the device with those of the batch."""
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
        """The spans in tiles, sorted into a few calls of SDPA."""
        return make_buckets([tile for span in self.spans for tile in span.tiles(BATCHED_TILE)])

    def _varlen_tensors(self) -> dict[str, Tensor]:
        """Where each span's queries begin and end, where its keys do, which tokens those keys are, and back again."""
        queries, keys = (
            np.cumsum([0, *lengths])
            for lengths in ([span.tokens for span in self.spans], [span.num_visible for span in self.spans])
        )
        token_K = np.concatenate([span.visible for span in self.spans])
        order_K, counts_T = slots_by_token(token_K, np.arange(len(token_K)))
        arrays = {"queries": queries, "keys": keys, "token": token_K, "order": order_K, "counts": counts_T}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def packing_unsupported_reason(model: Any, longest: int) -> str:
    """Why `model` cannot be given packed rows of sequences up to `longest` tokens; empty if nothing speaks against it.

    A prediction from its class and config; `preference.packing_choice` proves it on real pairs.
    """
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    if not any("Rotary" in type(module).__name__ for module in model.modules()):
        return f"{type(model).__name__} has no rotary positions"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention scores"
    if getattr(config, "attention_dropout", None):
        return "it drops attention scores at random"
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        windows.append(getattr(config, "sliding_window", None))
    shortest = min((window for window in windows if isinstance(window, int)), default=longest)
    if shortest < longest:
        return f"its sliding window of {shortest} tokens is shorter than the longest sequence, {longest}"
    return ""


def enable_packed_attention(model: Any) -> str:
    """Let `model` attend as a layout says wherever it is given one; without one it goes on by transformers' SDPA.

    Returns the name of the attention it had.
    """
    before: str = model.config._attn_implementation
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION_NAME)
    return before


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `layout` says, (1, T, H, D); called by transformers with (1, H, T, D) and (1, K, T, D)."""
    if layout is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    if more := [name for name in UNSUPPORTED_KWARGS if kwargs.get(name) is not None]:
        raise ValueError(f"a layer asks attention for {', '.join(more)}")
    window = kwargs.get("sliding_window")
    if window is not None and window < layout.max_sequence_tokens:
        raise ValueError(
            f"a layer looks back {window} tokens only, and a sequence of the row has {layout.max_sequence_tokens}"
        )
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    # before anything is gathered; autocast does not reach varlen attention, which is no operator that it knows
    place = value.device.type
    dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return attention_function(layout.backend)(query, key, value, layout, scale), None


def attention_function(name: Backend) -> Callable[[Tensor, Tensor, Tensor, PackedLayout, float], Tensor]:
    """The function that computes a row's attention under this name."""
    match name:
        case "spans":
            return spans_attention
        case "batched":
            return batched_attention
        case "varlen":
            return varlen_attention
        case never:
            assert_never(never)


def spans_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """SDPA tile after tile: no padding at all, so the best where calls are cheap and arithmetic is not, on a CPU.

    The G heads that share a key head are laid one below the other, so that keys are never copied for them.
    """
    heads, key_heads, width = query.shape[1], key.shape[1], query.shape[-1]
    group = heads // key_heads
    # split, not slices: the backward pass of a slice fills a whole row with zeros, that of a split joins the parts once
    queries = query.split([tile.tokens for tile in layout.tiles], 2)
    keys, values = key.split(layout.key_chunks, 2), value.split(layout.key_chunks, 2)
    answers = []
    for tile, seen, query_HqD in zip(layout.tiles, layout.visible_chunks, queries, strict=True):
        answer = F.scaled_dot_product_attention(
            query_HqD.reshape(1, key_heads, group * tile.tokens, width),
            torch.cat([keys[piece] for piece in seen], 2),
            torch.cat([values[piece] for piece in seen], 2),
            attn_mask=layout.bias(tile.tokens, tile.num_visible, group, query.dtype),
            scale=scale,
        )
        answers.append(answer.view(1, heads, tile.tokens, width).transpose(1, 2))
    return torch.cat(answers, 1)


def batched_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """A few calls of SDPA, each over tiles of about the same size with padding: for GPUs where a call costs time.

    A T4 has no flash attention and no varlen kernels; its memory-efficient kernel takes the mask.
    """
    heads, key_heads, width = query.shape[1], key.shape[1], query.shape[-1]
    group, index = heads // key_heads, layout.index
    query_QW = gather_rows_padded(_by_token(query), index["query"], index["place"])
    key_KW, value_KW = (
        gather_rows(_by_token(part), index["key"], index["order"], index["counts"]) for part in (key, value)
    )
    sizes = layout.buckets.sizes
    # split, not slices: as in `spans`
    queries = query_QW.split([tiles * q for tiles, q, _ in sizes])
    keys, values = (part.split([tiles * k for tiles, _, k in sizes]) for part in (key_KW, value_KW))
    outputs = []
    for bucket, (tiles, q, k) in enumerate(sizes):
        query_SqKGD = queries[bucket].view(tiles, q, key_heads, group, width)
        key_SkKD, value_SkKD = (part[bucket].view(tiles, k, key_heads, width) for part in (keys, values))
        # the heads that share a key head are queries below each other, so that keys are not repeated for them: with a
        # mask, torch's fused kernels on CUDA take no grouped heads
        output_SKqD = F.scaled_dot_product_attention(
            query_SqKGD.transpose(1, 2).reshape(tiles, key_heads, q * group, width),
            key_SkKD.transpose(1, 2),
            value_SkKD.transpose(1, 2),
            attn_mask=layout.bucket_bias(bucket, group, query.dtype),
            scale=scale,
        )
        output_SqKGD = output_SKqD.view(tiles, key_heads, q, group, width).transpose(1, 2)
        outputs.append(output_SqKGD.reshape(tiles * q, heads * width))
    output_TW = gather_rows_unique(torch.cat(outputs), index["place"])
    return output_TW.view(1, -1, heads, width)


def _by_token(part: Tensor) -> Tensor:
    """(1, H, T, D) as (T, H * D)."""
    return part[0].transpose(0, 1).flatten(1)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """One call of torch's variable-length flash attention for all spans, without padding; capability (8, 0) and up."""
    from torch.nn.attention.varlen import varlen_attn

    index = layout.index
    keys, values = (
        gather_rows(_by_token(part), index["token"], index["order"], index["counts"]).view(-1, *part.shape[1::2])
        for part in (key, value)
    )
    group, grouped = query.shape[1] // key.shape[1], dict[str, Any]()
    if group > 1 and _supports_gqa(varlen_attn):
        grouped = {"enable_gqa": True}
    elif group > 1:
        keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    answer: Any = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        index["queries"].int(),
        index["keys"].int(),
        max(span.tokens for span in layout.spans),
        layout.max_sequence_tokens,
        window_size=(-1, 0),  # causal, with a span's last query at its last key
        scale=scale,
        **grouped,
    )
    seen: Tensor = answer[None]
    return seen


@cache
def _supports_gqa(varlen_attn: Callable[..., Any]) -> bool:
    """True if it takes fewer key heads than query heads, as torch 2.12 and later do; 2.11 has no word for it."""
    return "enable_gqa" in signature(varlen_attn).parameters
