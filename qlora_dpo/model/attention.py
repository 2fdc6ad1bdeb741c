"""Attention inside a packed row: every token sees its own sequence and nothing else, by one of three backends.

T tokens of the row, S spans, H query heads on K key heads, G = H / K queries per key head, D width of a head; q and k
tokens of a span and of what it sees.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any, Literal, assert_never

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Backend = Literal["spans", "batched", "varlen"]
BEYOND = ("softcap", "position_bias", "s_aux")
"""What some models' layers ask of attention and packed rows do not do: capped scores, biases by position, sinks."""
TILE = 256
"""Queries whose scores exist at once: what lies above the diagonal is computed for nothing only inside a tile."""
NAME = "qlora_dpo_packed"
"""The name under which transformers' attention interface knows the function of this file."""


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of a row, which stand one after another in their sequence.

    `before` are the stretches of the row that come before them in that sequence, in order.
    """

    start: int
    stop: int
    before: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the span itself."""
        return self.stop - self.start

    @cached_property
    def stretches(self) -> tuple[tuple[int, int], ...]:
        """The stretches of the row that its last token sees, itself included; neighbours are joined."""
        joined: list[tuple[int, int]] = []
        for start, stop in (*self.before, (self.start, self.stop)):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        return tuple(joined)

    @cached_property
    def sees(self) -> int:
        """Tokens that its last token sees, itself included."""
        return sum(stop - start for start, stop in self.stretches)

    def tiles(self, tokens: int) -> Iterator["Span"]:
        """The span cut into stretches of at most so many tokens, each of which sees those before it."""
        for start in range(self.start, self.stop, tokens):
            own = ((self.start, start),) if start > self.start else ()
            yield Span(start, min(start + tokens, self.stop), (*self.before, *own))


@dataclass(frozen=True)
class Layout:
    """The spans of a row, in the row's order and without gaps, and the backend that computes them."""

    spans: tuple[Span, ...]
    backend: Backend
    device: torch.device

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence in the row."""
        return max(span.sees for span in self.spans)

    @cached_property
    def tiles(self) -> tuple[Span, ...]:
        """The spans cut to at most TILE queries: scores of a long sequence are never all there at once."""
        return tuple(tile for span in self.spans for tile in span.tiles(TILE))

    @cached_property
    def pieces(self) -> list[int]:
        """The lengths of the parts into which keys are cut, so that every tile sees whole parts."""
        cuts = sorted({end for tile in self.tiles for stretch in tile.stretches for end in stretch})
        return [stop - start for start, stop in pairwise(cuts)]

    @cached_property
    def seen(self) -> list[list[int]]:
        """For each tile, the numbers of the `pieces` it sees."""
        number = {start: index for index, start in enumerate(accumulate(self.pieces, initial=0))}
        return [
            [piece for start, stop in tile.stretches for piece in range(number[start], number[stop])]
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

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each span's queries begin, where its keys do, and which tokens of the row those keys are."""
        queries, keys = (
            list(accumulate(lengths, initial=0))
            for lengths in ((span.tokens for span in self.spans), (span.sees for span in self.spans))
        )
        query_S, key_S = (torch.tensor(ends, dtype=torch.int32, device=self.device) for ends in (queries, keys))
        return query_S, key_S, torch.cat([_numbers(span.stretches) for span in self.spans]).to(self.device)

    @cached_property
    def buckets(self) -> tuple["Bucket", ...]:
        """The spans in groups of about the same length (within a factor of two), each padded to its longest."""
        groups: dict[int, list[Span]] = {}
        for span in self.spans:
            groups.setdefault(span.tokens.bit_length(), []).append(span)
        return tuple(_bucket(group).to(self.device) for group in groups.values())

    @cached_property
    def unbucketed(self) -> Tensor:
        """For each token of the row, where it stands among all tokens of the buckets in turn."""
        order_T = torch.cat([bucket.query_Sq.flatten()[bucket.valid_T] for bucket in self.buckets])
        return order_T.argsort()


@dataclass(frozen=True)
class Bucket:
    """S spans padded to q queries and k keys: which tokens of the row these are, and who sees what."""

    query_Sq: Tensor
    valid_T: Tensor  # which of the S * q are no padding, as numbers: a mask would have the GPU wait in every layer
    key_Sk: Tensor
    seen_S1qk: Tensor

    def to(self, device: torch.device) -> "Bucket":
        """The same on another device."""
        return Bucket(*(part.to(device) for part in vars(self).values()))


def _bucket(group: Sequence[Span]) -> Bucket:
    """Pad `group`; padding stands for token 0, and a query that is padding sees one key, so that nothing is NaN."""
    queries, keys = max(span.tokens for span in group), max(span.sees for span in group)
    query_Sq, key_Sk = (
        torch.zeros(len(group), queries, dtype=torch.long),
        torch.zeros(len(group), keys, dtype=torch.long),
    )
    valid_Sq = torch.zeros(len(group), queries, dtype=torch.bool)
    seen_Sqk = torch.zeros(len(group), queries, keys, dtype=torch.bool)
    seen_Sqk[:, :, 0] = True
    for s, span in enumerate(group):
        query_Sq[s, : span.tokens] = torch.arange(span.start, span.stop)
        valid_Sq[s, : span.tokens] = True
        key_Sk[s, : span.sees] = _numbers(span.stretches)
        seen_Sqk[s, : span.tokens, : span.sees] = (
            torch.ones(span.tokens, span.sees).tril(span.sees - span.tokens).bool()
        )
    return Bucket(query_Sq, valid_Sq.flatten().nonzero()[:, 0], key_Sk, seen_Sqk[:, None])


def _numbers(stretches: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in stretches])


def why_not(model: Any, longest: int) -> str:
    """Why `model` cannot be given packed rows of sequences up to `longest` tokens; empty if nothing speaks against it.

    A prediction from its class and config; `preference.layout` proves it on real pairs.
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


def use(model: Any) -> str:
    """Let `model` attend as a layout says wherever it is given one; without one it goes on by transformers' SDPA.

    Returns the name of the attention it had.
    """
    before: str = model.config._attn_implementation
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return before


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `layout` says, (1, T, H, D); called by transformers with (1, H, T, D) and (1, K, T, D)."""
    if layout is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    if more := [name for name in BEYOND if kwargs.get(name) is not None]:
        raise ValueError(f"a layer asks attention for {', '.join(more)}")
    window = kwargs.get("sliding_window")
    if window is not None and window < layout.longest:
        raise ValueError(f"a layer looks back {window} tokens only, and a sequence of the row has {layout.longest}")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    query, key = query.to(value.dtype), key.to(value.dtype)
    return backend_of(layout.backend)(query, key, value, layout, scale), None


def backend_of(name: Backend) -> Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]:
    """The function that computes a row's attention under this name."""
    match name:
        case "spans":
            return spans
        case "batched":
            return batched
        case "varlen":
            return varlen
        case never:
            assert_never(never)


def spans(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """SDPA tile after tile: no padding at all, so the best where calls are cheap and arithmetic is not, on a CPU.

    The G heads that share a key head are laid one below the other, so that keys are never copied for them.
    """
    heads, key_heads, width = query.shape[1], key.shape[1], query.shape[-1]
    group = heads // key_heads
    # split, not slices: the backward pass of a slice fills a whole row with zeros, that of a split joins the parts once
    queries = query.split([tile.tokens for tile in layout.tiles], 2)
    keys, values = key.split(layout.pieces, 2), value.split(layout.pieces, 2)
    answers = []
    for tile, seen, query_HqD in zip(layout.tiles, layout.seen, queries, strict=True):
        answer = F.scaled_dot_product_attention(
            query_HqD.reshape(1, key_heads, group * tile.tokens, width),
            torch.cat([keys[piece] for piece in seen], 2),
            torch.cat([values[piece] for piece in seen], 2),
            attn_mask=layout.bias(tile.tokens, tile.sees, group, query.dtype),
            scale=scale,
        )
        answers.append(answer.view(1, heads, tile.tokens, width).transpose(1, 2))
    return torch.cat(answers, 1)


def batched(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """A few calls of SDPA, each over spans of about the same length with padding: for GPUs where a call costs time.

    A T4 has no flash attention and no varlen kernels; its memory-efficient kernel takes the mask.
    """
    group = query.shape[1] // key.shape[1]
    parts = []
    for bucket in layout.buckets:
        # (H, S, q, D) of S spans, padded; keys are copied for the heads that share them: with a mask, torch's fused
        # kernels on CUDA take no grouped heads
        query_SHqD = query[0][:, bucket.query_Sq].transpose(0, 1)
        key_SHkD, value_SHkD = (
            part[0][:, bucket.key_Sk].repeat_interleave(group, 0).transpose(0, 1) for part in (key, value)
        )
        answer_SHqD = F.scaled_dot_product_attention(
            query_SHqD, key_SHkD, value_SHkD, attn_mask=bucket.seen_S1qk, scale=scale
        )
        parts.append(answer_SHqD.transpose(1, 2).flatten(0, 1)[bucket.valid_T])
    answer: Tensor = torch.cat(parts)[layout.unbucketed][None]
    return answer


def varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """One call of torch's variable-length flash attention for all spans, without padding; capability (8, 0) and up."""
    from torch.nn.attention.varlen import varlen_attn

    query_S, key_S, key_K = layout.varlen
    keys, values = (part[0].transpose(0, 1)[key_K] for part in (key, value))
    group, grouped = query.shape[1] // key.shape[1], dict[str, Any]()
    if group > 1 and _takes_groups(varlen_attn):
        grouped = {"enable_gqa": True}
    elif group > 1:
        keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    answer: Any = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        keys,
        values,
        query_S,
        key_S,
        max(span.tokens for span in layout.spans),
        layout.longest,
        window_size=(-1, 0),  # causal, with a span's last query at its last key
        scale=scale,
        **grouped,
    )
    seen: Tensor = answer[None]
    return seen


@cache
def _takes_groups(varlen_attn: Callable[..., Any]) -> bool:
    """True if it takes fewer key heads than query heads, as torch 2.12 and later do; 2.11 has no word for it."""
    return "enable_gqa" in signature(varlen_attn).parameters
