"""Splits the pairs of a step, an evaluation or a reference pass over the ranks, and gathers their results."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.encoded import EncodedPair, pair_digests, pair_lengths
from qlora_dpo.model.distributed import processes
from qlora_dpo.preference.objective import Logps, LossColumns

GroupT = TypeVar("GroupT")


def pad_group_count(groups: Sequence[GroupT]) -> list[GroupT | None]:
    """Pads `groups` with None to the largest count over all ranks if the model is sharded, so that forward passes stay
    in lockstep. For a None group the caller runs a dummy batch and discards its result.
    """
    if not processes.is_sharded():
        return list(groups)
    return [*groups, *[None] * (processes.all_reduce_max(len(groups)) - len(groups))]


def rank_indices(pairs: Sequence[EncodedPair]) -> list[int]:
    """The indices of this rank's pairs: every pair is on one rank, and all ranks have about the same number of tokens.

    Prompts with a common prefix stay together, since a row computes the prefix once.
    """
    if processes.world_size() == 1:
        return list(range(len(pairs)))
    order = sorted(range(len(pairs)), key=lambda i: (pairs[i].prompt, i))
    tokens = [len(pairs[i].prompt) + len(pairs[i].chosen) + len(pairs[i].rejected) for i in order]
    return [order[place] for place in processes.partition_by_cost(tokens)]


def distinct_rank_indices(pairs: Sequence[EncodedPair]) -> NDArray[np.int64]:
    """The distinct pairs of this rank (the first of equal ones), as ascending indices.

    Reads digests and lengths only, so millions of pairs stay on disk.
    """
    _, first = np.unique(pair_digests(pairs), return_index=True)
    distinct = np.sort(first)
    places = processes.partition_by_cost(pair_lengths(pairs)[distinct].sum(axis=1).tolist())
    return distinct[places.start : places.stop]


def all_gather_logps(logps: Logps) -> Logps:
    """The log-probabilities of all ranks' pairs, in the order of the ranks, without gradients."""
    if processes.world_size() == 1:
        return logps
    columns = {name: value for name, value in vars(logps.columns or LossColumns()).items() if value is not None}
    gathered = processes.all_gather(logps.items() | {f"columns.{name}": value for name, value in columns.items()})
    all_columns = LossColumns(**{name: gathered.pop(f"columns.{name}") for name in columns})
    return Logps(**gathered, columns=None if logps.columns is None else all_columns)
