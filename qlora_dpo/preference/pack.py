"""Packs pairs into rows in which a common prefix of several sequences stands once, or into padded batches.

P pairs, S = 2P sequences (all chosen, then all rejected; one without a completion has no tokens), B x L tokens as they
go through the model, R hidden states that predict a completion token, N scored tokens (a state with one of the tokens
it predicts), M completion tokens of all sequences. In a packed row B is 1 and L the number of its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair, TokenIds
from qlora_dpo.model.packed.attention import Backend, PackedLayout
from qlora_dpo.model.packed.span import Span
from qlora_dpo.model.transfer import copy_batched
from qlora_dpo.preference.token_weights import TokenWeighting


@dataclass(frozen=True)
class Packing:
    """How pairs are laid out for the model: packed rows with an attention `backend`, or padded batches without one."""

    token_budget: int
    pad_token_id: int
    backend: Backend | None
    token_weighting: TokenWeighting | None = None
    """The weights of completion tokens; None if all count 1."""


STATES_PER_CHUNK = 256
"""States whose logits exist at once: with a vocabulary of 152k, 8 pairs of 512 tokens would take 4.6 GiB in float32."""


@dataclass(frozen=True)
class MicroBatch:
    """P pairs as tensors: the inputs of a forward pass, and the positions and tokens of the completions."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    attention_mask_BL: Tensor | None  # of a padded batch
    layout: PackedLayout | None  # of a packed row
    state_R: Tensor  # index into the B * L positions, ascending
    row_N: Tensor  # which of the R states predicts the token, ascending
    tokens_R: Tensor  # how many of the N tokens each state predicts
    target_N: Tensor
    scored_M: Tensor  # index into the N scored tokens, sequence after sequence
    tokens_S: Tensor  # completion tokens of each sequence
    weight_M: Tensor | None  # weight of each completion token; None if all count 1
    pairs: int
    tokens: int  # of all sequences without padding, as TRL counts them: the prompt once for each completion
    completion_tokens: tuple[int, int]  # of all chosen and of all rejected completions
    chunks: tuple[
        tuple[slice, slice], ...
    ]  # up to STATES_PER_CHUNK of the R states, and their scored tokens among the N

    def to(self, device: torch.device) -> "MicroBatch":
        """The batch on another device, with the index tensors of its layout, in one batched copy."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        index = {} if self.layout is None else self.layout.index_tensors()
        moved = copy_batched(tensors | {f"layout {name}": tensor for name, tensor in index.items()}, device)
        layout = self.layout and replace(
            self.layout, device=device, moved={name: moved.pop(f"layout {name}") for name in index}
        )
        return MicroBatch(**{**vars(self), **moved, "layout": layout})


def micro_batches(pairs: Sequence[EncodedPair], packing: Packing) -> list[list[int]]:
    """Split `pairs` into micro-batches within the token budget.

    Returns indices into `pairs`. A pair larger than the budget gets a micro-batch of its own.
    """
    return (
        _padded_groups(pairs, packing.token_budget)
        if packing.backend is None
        else _packed_groups(pairs, packing.token_budget)
    )


def _packed_groups(pairs: Sequence[EncodedPair], token_budget: int) -> list[list[int]]:
    """Fill rows with pairs in the order of their prompts, so that common prefixes meet in one row."""
    groups: list[list[int]] = []
    remaining = 0
    for index in sorted(range(len(pairs)), key=lambda i: (pairs[i].prompt, i)):
        pair = pairs[index]
        pair_tokens = row_tokens(pair)
        shared = _shared_length(pairs[groups[-1][-1]], pair) if groups else 0
        if groups and pair_tokens - shared <= remaining:
            groups[-1].append(index)
            remaining -= pair_tokens - shared
        else:
            groups.append([index])
            remaining = token_budget - pair_tokens
    return groups


def _shared_length(before: EncodedPair, pair: EncodedPair) -> int:
    """Tokens of the prompt of `pair` that stand in a row that ends with `before`: those of the same chat for one."""
    earlier = before.prompt if before.rejected else before.prompt + before.chosen
    return _common_prefix_length(earlier, pair.prompt)


def _padded_groups(pairs: Sequence[EncodedPair], token_budget: int) -> list[list[int]]:
    """Group pairs of similar length, from the longest down."""
    groups: list[list[int]] = []
    for index in sorted(range(len(pairs)), key=lambda i: (-max_sequence_tokens(pairs[i]), i)):
        # sorted from the longest down, so the first pair of a group decides its padded length
        num_sequences = 2 if pairs[index].rejected else 1
        if groups and num_sequences * (len(groups[-1]) + 1) * padded_length(pairs[groups[-1][0]]) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def max_sequence_tokens(pair: EncodedPair) -> int:
    """Tokens of the prompt with the longer completion."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def row_tokens(pair: EncodedPair) -> int:
    """Tokens of `pair` alone in a packed row: its prompt once, and the common prefix of its completions once."""
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected) - _common_prefix_length(pair.chosen, pair.rejected)


def padded_length(pair: EncodedPair) -> int:
    """Columns of a padded batch whose longest pair is `pair`.

    One column is always padding: without any, transformers drops the mask and attention uses another kernel with
    another rounding; with it, a pair has the same log-probability in every batch.
    """
    return max_sequence_tokens(pair) + 1


def collate(pairs: Sequence[EncodedPair], packing: Packing) -> MicroBatch:
    """Lay out `pairs` as one packed row, or as one right-padded batch of S sequences."""
    places = _pad_batch(pairs, packing.pad_token_id) if packing.backend is None else _pack_row(pairs, packing.backend)
    completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    # the prompt's last state predicts a completion's first token; in a packed row both completions share it
    scored = [
        (position, token)
        for position_l, completion in zip(places.position_SL, completions, strict=True)
        for position, token in zip(position_l[-len(completion) - 1 : -1], completion, strict=True)
    ]
    distinct = sorted(set(scored))
    scored_index = {token: index for index, token in enumerate(distinct)}
    states = sorted({position for position, _ in distinct})
    row = {position: index for index, position in enumerate(states)}
    row_N = np.array([row[position] for position, _ in distinct], dtype=np.int64)
    tokens_S = [len(completion) for completion in completions]
    weights = [packing.token_weighting.weights(pair) for pair in pairs] if packing.token_weighting else []
    return MicroBatch(
        input_ids_BL=places.input_ids_BL,
        position_ids_BL=places.position_ids_BL,
        attention_mask_BL=places.attention_mask_BL,
        layout=places.layout,
        state_R=torch.tensor(states),
        row_N=torch.from_numpy(row_N),
        tokens_R=torch.from_numpy(np.bincount(row_N)),
        target_N=torch.tensor([token for _, token in distinct]),
        scored_M=torch.tensor([scored_index[token] for token in scored]),
        tokens_S=torch.tensor(tokens_S),
        weight_M=torch.tensor([weight for side in (0, 1) for pair_weights in weights for weight in pair_weights[side]])
        if weights
        else None,
        pairs=len(pairs),
        tokens=sum(map(len, places.position_SL)),
        completion_tokens=(sum(tokens_S[: len(pairs)]), sum(tokens_S[len(pairs) :])),
        chunks=_chunks(row_N, len(states)),
    )


def _chunks(row_N: NDArray[np.int64], states: int) -> tuple[tuple[slice, slice], ...]:
    """Slices of the states, each with the slice of the scored tokens that they predict."""
    ends = [*range(0, states, STATES_PER_CHUNK), states]
    firsts = np.searchsorted(row_N, ends).tolist()
    return tuple(
        (slice(*chunk), slice(*tokens)) for chunk, tokens in zip(pairwise(ends), pairwise(firsts), strict=True)
    )


@dataclass(frozen=True)
class _Placement:
    """The model's inputs, and which of the B * L positions each sequence has."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    position_SL: list[list[int]]
    attention_mask_BL: Tensor | None = None
    layout: PackedLayout | None = None


def _pack_row(pairs: Sequence[EncodedPair], backend: Backend) -> _Placement:
    """One row: the sequences in lexicographic order, each without the prefix it shares with the one before.

    In that order sequences with a common prefix are neighbours, so each prefix stands in the row once: a system prompt
    of all pairs, a prompt of several pairs, an earlier turn, the same first tokens of both completions.
    """
    sequences = _sequences(pairs)
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    position_SL: list[list[int]] = [[] for _ in sequences]
    before: TokenIds = ()
    where: list[int] = []
    for s in sorted(filter(sequences.__getitem__, range(len(sequences))), key=lambda s: sequences[s]):
        sequence = sequences[s]
        shared = _common_prefix_length(before, sequence)
        where = [*where[:shared], *range(len(ids), len(ids) + len(sequence) - shared)]
        if shared < len(sequence):
            spans.append(Span(len(ids), len(ids) + len(sequence) - shared, _contiguous_ranges(where[:shared])))
        ids.extend(sequence[shared:])
        positions.extend(range(shared, len(sequence)))
        position_SL[s], before = where, sequence
    return _Placement(
        input_ids_BL=torch.tensor([ids]),
        position_ids_BL=torch.tensor([positions]),
        position_SL=position_SL,
        layout=PackedLayout(tuple(spans), backend, torch.device("cpu")),
    )


def _pad_batch(pairs: Sequence[EncodedPair], pad_token_id: int) -> _Placement:
    """One right-padded batch of the sequences that have tokens, the chosen ones first."""
    columns = max(padded_length(pair) for pair in pairs)
    sequences = _sequences(pairs)
    rows = [s for s, sequence in enumerate(sequences) if sequence]
    ids = torch.full((len(rows), columns), pad_token_id)
    mask = torch.zeros_like(ids)
    position_SL: list[list[int]] = [[] for _ in sequences]
    for row, s in enumerate(rows):
        length = len(sequences[s])
        ids[row, :length] = torch.tensor(sequences[s])
        mask[row, :length] = 1
        position_SL[s] = list(range(row * columns, row * columns + length))
    return _Placement(
        input_ids_BL=ids,
        position_ids_BL=torch.arange(columns).expand(len(rows), -1),
        position_SL=position_SL,
        attention_mask_BL=mask,
    )


def _sequences(pairs: Sequence[EncodedPair]) -> list[TokenIds]:
    """Each prompt with its chosen completion, then each with its rejected one; empty if there is no completion."""
    completions = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    return [prompt + completion if completion else () for prompt, completion in completions]


def _common_prefix_length(one: TokenIds, other: TokenIds) -> int:
    """The number of tokens in the common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # a comparison of slices runs in C, so bisecting beats comparing token by token
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _contiguous_ranges(where: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending positions as ranges (start, stop) without gaps."""
    breaks = [i for i in range(1, len(where)) if where[i] != where[i - 1] + 1]
    ends = [0, *breaks, len(where)] if where else []
    return tuple((where[i], where[j - 1] + 1) for i, j in pairwise(ends))
