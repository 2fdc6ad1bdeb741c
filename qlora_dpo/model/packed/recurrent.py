"""Recurrent layers within a packed row: the state after a prompt, and a convolution's last inputs, branch into answers.

The linear-attention layers of transformers (Gated DeltaNet, Mamba 2, short convolutions) call functions of their own
module with the keyword arguments of the model's forward pass. These functions are replaced by ones that, given the
layout of a packed row, run each shared prefix once; without a layout they call the original.

T tokens of the row, N segments of one depth, L tokens of the longest of them, F tokens near a branch, C channels, K
taps of a convolution.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qlora_dpo.model.packed.attention import PackedLayout
from qlora_dpo.model.packed.span import Span

MAX_SCAN_CHUNK = 64
"""Tokens of a chunk of Mamba 2's scan: most answers are shorter than the 256 of configs, and are padded to chunks."""
MAX_PADDING = 1.5
"""The longest segment of a batch, by its shortest, unless both are short."""
MIN_BATCH_TOKENS = 32
"""Segments of no more tokens share a batch, whatever their lengths."""


@dataclass(frozen=True)
class Branches:
    """The spans of a row, cut where one sequence leaves another: segments, each of which goes on from at most one."""

    spans: tuple[Span, ...]

    @cached_property
    def previous(self) -> NDArray[np.int64]:
        """The row index of each token's predecessor in its sequence (T); -1 for a first token."""
        previous_T = np.arange(-1, self.spans[-1].stop - 1)
        for span in self.spans:
            previous_T[span.start] = span.prefix[-1][1] - 1 if span.prefix else -1
        return previous_T

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """The first token of each segment and the one after its last, in the order of the row."""
        ends = {end for span in self.spans for _, end in (*span.prefix, (span.start, span.stop))}
        return list(pairwise(sorted({0, *ends})))

    @cached_property
    def parents(self) -> list[int | None]:
        """The segment that each segment goes on from."""
        index_of_last = {stop - 1: index for index, (_, stop) in enumerate(self.segments)}
        return [index_of_last.get(int(self.previous[start])) for start, _ in self.segments]

    @cached_property
    def levels(self) -> list[list[int]]:
        """The segments by the number of segments before them in their sequence."""
        depths = list[int]()
        for parent in self.parents:  # which stands before its children in the row
            depths.append(0 if parent is None else depths[parent] + 1)
        return [[s for s, depth in enumerate(depths) if depth == level] for level in range(max(depths) + 1)]

    @cached_property
    def batches(self) -> list[list[int]]:
        """The segments in batches of one level and of similar lengths, after those that they go on from."""
        found = list[list[int]]()
        for level in self.levels:
            batch, longest = list[int](), 0
            for s in sorted(level, key=lambda s: self.segments[s][0] - self.segments[s][1]):
                length = self.segments[s][1] - self.segments[s][0]
                if batch and longest > max(MAX_PADDING * length, MIN_BATCH_TOKENS):
                    found.append(batch)
                    batch = []
                if not batch:
                    longest = length
                batch.append(s)
            found.append(batch)
        return found

    def taps(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens (F) whose `count` - 1 predecessors are not the tokens before them in the row, and the row indices
        (F, K) of those predecessors and of the token itself, -1 before the start of a sequence.
        """
        chain_T = place_T = np.arange(len(self.previous))
        taps = [chain_T]
        for _ in range(count - 1):
            chain_T = np.where(chain_T < 0, -1, self.previous[chain_T])
            taps.append(chain_T)
        taps_TK = np.stack(taps[::-1], 1)
        near_TK = np.maximum(place_T[:, None] - np.arange(count - 1, -1, -1), -1)
        token_F = np.flatnonzero((taps_TK != near_TK).any(1))
        return token_F, taps_TK[token_F]


def branches_of(layout: PackedLayout) -> Branches:
    """The branches of a layout, computed once for all layers."""
    known: dict[str, Any] = layout.__dict__
    if "_branches" not in known:
        known["_branches"] = Branches(layout.spans)
    branches: Branches = known["_branches"]
    return branches


def enable_packed_recurrence(model: nn.Module) -> None:
    """Have the model's recurrent layers, if it has any, take packed rows; without a layout they compute as before."""
    for name in {type(module).__module__ for module in recurrent_layers(model)}:
        modeling = sys.modules[name]
        for function, replacement in REPLACEMENTS.items():
            original = getattr(modeling, function, None)
            if original is not None and not hasattr(original, "of_packed_rows"):
                setattr(modeling, function, _with_layout(original, replacement))


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """The modules with a convolution over the tokens, and with no other recurrence than those that are known here."""
    return [
        module
        for module in model.modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
        and hasattr(sys.modules[type(module).__module__], "causal_conv1d_fn")
        and not any(hasattr(sys.modules[type(module).__module__], name) for name in OTHER_RECURRENCES)
    ]


def _with_layout(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def function(*arguments: Any, **named: Any) -> Any:
        layout = named.get("layout")
        if layout is None:
            return original(*arguments, **named)
        del named["layout"]
        return replacement(branches_of(layout), original, *arguments, **named)

    function.of_packed_rows = True  # type: ignore[attr-defined]
    return function


def packed_convolution(
    branches: Branches,
    original: Callable[..., Tensor],
    hidden_1CT: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    activation: str | None = None,
    **named: Any,
) -> Tensor:
    """The causal depthwise convolution (1, C, T), in which a token sees the tokens before it in its own sequence.

    The row is run as it stands, and the tokens that would see another sequence are computed once more.
    """
    output_1CT = original(hidden_1CT, weight_CK, bias_C, activation=activation, **named)
    token_F, taps_FK = branches.taps(weight_CK.shape[1])
    if not len(token_F):
        return output_1CT
    device = hidden_1CT.device
    index_FK = torch.from_numpy(np.where(taps_FK < 0, hidden_1CT.shape[2], taps_FK)).to(device)
    padded_CT = nn.functional.pad(hidden_1CT[0], (0, 1))
    seen_CFK = padded_CT.index_select(1, index_FK.flatten()).view(-1, *index_FK.shape)
    fixed_CF = (seen_CFK * weight_CK[:, None]).sum(-1)
    if bias_C is not None:
        fixed_CF = fixed_CF + bias_C[:, None]
    if activation is not None:
        fixed_CF = ACT2FN[activation](fixed_CF)
    return output_1CT.index_copy(2, torch.from_numpy(token_F).to(device), fixed_CF[None].to(output_1CT.dtype))


def packed_delta_rule(
    branches: Branches,
    original: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **named: Any,
) -> tuple[Tensor, None]:
    """The gated delta rule (Yang et al. 2024) of query, key and value (1, T, heads, D) and g and beta (1, T, heads).

    A key of 0 with a decay of exp(0) leaves the state as it is, so shorter segments are padded with zeros.
    """
    _refuse_states(initial_state, output_final_state)

    def run(parts: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key, value, g, beta = parts
        return original(query, key, value, g=g, beta=beta, initial_state=state, output_final_state=True, **named)

    return _run_levels(branches, (query, key, value, g, beta), run), None


def packed_scan(
    branches: Branches,
    original: Callable[..., tuple[Tensor, Tensor]],
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **named: Any,
) -> Tensor:
    """Mamba 2's scan (Dao and Gu 2024); `hidden_states`, `B` and `C` are (1, T, heads, D), `dt` is (1, T, heads).

    A time step of 0 leaves the state as it is, so shorter segments are padded with zeros. A layer's lower limit of time
    steps would forbid that, so they are made here, as the original makes them.
    """
    _refuse_states(initial_states, return_final_states)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    step = (nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    def run(parts: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden_states, step, B, C = parts
        return original(
            hidden_states,
            step,
            A,
            B,
            C,
            chunk_size=min(chunk_size, MAX_SCAN_CHUNK),
            D=D,
            initial_states=state,
            return_final_states=True,
            **named,
        )

    return _run_levels(branches, (hidden_states, step, B, C), run)


def no_fused_layer(branches: Branches, original: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Leave the layer to the functions above: a fused kernel for all of it knows no branches."""


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": packed_convolution,
    "torch_chunk_gated_delta_rule": packed_delta_rule,
    "mamba2_chunk_scan": packed_scan,
    "mamba2_split_conv1d_scan_combined": no_fused_layer,
}
"""Functions of transformers' modeling files, by name."""


OTHER_RECURRENCES = ("mamba_selective_scan", "chunk_kimi_delta_attention")
"""Functions of modeling files whose recurrence is not known here: Mamba's first version, and Kimi's delta attention."""


def _refuse_states(initial: Tensor | None, wants_final: bool) -> None:
    if initial is not None or wants_final:
        raise ValueError("a packed row goes on from no cache")


def _run_levels(
    branches: Branches,
    inputs: Sequence[Tensor],
    run: Callable[[Sequence[Tensor], Tensor | None], tuple[Tensor, Tensor]],
) -> Tensor:
    """Run the segments in batches of one depth, from their parents' last states; the outputs (1, T, ...) of all.

    `inputs` are (1, T, ...); shorter segments are padded with zeros at their end, which must leave a state as it is.
    `run` takes the padded inputs (N, L, ...) and the states, and returns outputs and last states (N, ...).
    """
    tokens, device = inputs[0].shape[1], inputs[0].device
    padded = [torch.cat([part[0], part.new_zeros(1, *part.shape[2:])]) for part in inputs]
    states: dict[int, Tensor] = {}
    outputs, places = list[Tensor](), list[NDArray[np.int64]]()
    for batch in branches.batches:
        bounds = [branches.segments[s] for s in batch]
        longest = max(stop - start for start, stop in bounds)
        index_NL = np.full((len(batch), longest), tokens)
        for row_L, (start, stop) in zip(index_NL, bounds, strict=True):
            row_L[: stop - start] = np.arange(start, stop)
        index = torch.from_numpy(index_NL.ravel()).to(device)
        parts = [part.index_select(0, index).view(*index_NL.shape, *part.shape[1:]) for part in padded]
        before = [states[parent] for s in batch if (parent := branches.parents[s]) is not None]
        output, last = run(parts, torch.stack(before) if before else None)
        states |= dict(zip(batch, last, strict=True))
        kept = np.flatnonzero(index_NL.ravel() < tokens)
        outputs.append(output.flatten(0, 1).index_select(0, torch.from_numpy(kept).to(device)))
        places.append(index_NL.ravel()[kept])
    order = torch.from_numpy(np.argsort(np.concatenate(places))).to(device)
    return torch.cat(outputs).index_select(0, order)[None]
