"""Cuts the pairs of an optimizer step into micro-batches within a token budget, and lays one out as tensors.

P pairs, S = 2P sequences (all chosen, then all rejected), L padded length, R rows that predict an answer token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_dpo.data.encode import EncodedPair


@dataclass(frozen=True)
class MicroBatch:
    """Some pairs of one step as tensors: everything a forward pass needs, and where the answers stand in it."""

    input_ids_SL: Tensor
    attention_mask_SL: Tensor
    row_R: Tensor  # index into the S * L positions; the hidden state there predicts target_R
    target_R: Tensor
    sequence_R: Tensor  # which of the S sequences the row belongs to
    pairs: int
    tokens: int  # without padding

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return MicroBatch(**{**vars(self), **moved})


def micro_batches(pairs: Sequence[EncodedPair], token_budget: int) -> list[list[int]]:
    """Split `pairs` into groups of similar length whose padded size stays within `token_budget` tokens.

    Returns indices into `pairs`. A pair that is larger than the budget makes a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(pairs)), key=lambda i: (-longest(pairs[i]), i)):
        # sorted from the longest down, so the first pair of a group decides its padded length
        if groups and 2 * (len(groups[-1]) + 1) * padded(pairs[groups[-1][0]]) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def longest(pair: EncodedPair) -> int:
    """Tokens of the prompt with the longer of the two answers."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def padded(pair: EncodedPair) -> int:
    """Columns that a batch with `pair` as its longest has.

    There is always one column of padding: without any, transformers drops the mask and attention takes another
    kernel, whose rounding differs; this way a pair has the same log-probability in every batch.
    """
    return longest(pair) + 1


def collate(pairs: Sequence[EncodedPair], pad_token_id: int) -> MicroBatch:
    """Lay out `pairs` as one right-padded batch: S = 2P sequences, the chosen ones first."""
    columns = max(padded(pair) for pair in pairs)
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    prompts = [pair.prompt for pair in pairs] * 2
    input_ids_SL = torch.full((len(answers), columns), pad_token_id)
    attention_mask_SL = torch.zeros_like(input_ids_SL)
    rows, targets, sequences = [], [], []
    for s, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor(prompt + answer)
        input_ids_SL[s, : len(ids)] = ids
        attention_mask_SL[s, : len(ids)] = 1
        rows.append(torch.arange(len(prompt) - 1, len(ids) - 1) + s * columns)
        targets.append(ids[len(prompt) :])
        sequences.append(torch.full((len(answer),), s))
    return MicroBatch(
        input_ids_SL=input_ids_SL,
        attention_mask_SL=attention_mask_SL,
        row_R=torch.cat(rows),
        target_R=torch.cat(targets),
        sequence_R=torch.cat(sequences),
        pairs=len(pairs),
        tokens=int(attention_mask_SL.sum()),
    )
