"""Which pairs of a step, an evaluation or a reference pass this process takes, and what all of them have found."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.encoded import EncodedPair, pair_digests, pair_lengths
from qlora_dpo.model.distributed import processes
from qlora_dpo.preference.objective import Logps, LossColumns

GroupT = TypeVar("GroupT")


def pad_group_count(groups: Sequence[GroupT]) -> list[GroupT | None]:
    """`groups`, and None for each one that another process has more, if all must go through the model together: then
    something is computed that does not count.
    """
    if not processes.is_sharded():
        return list(groups)
    return [*groups, *[None] * (processes.all_reduce_max(len(groups)) - len(groups))]


def rank_indices(pairs: Sequence[EncodedPair]) -> list[int]:
    """The pairs that this process takes, as indices: about as many tokens as any other takes, and each pair once.

    Prompts with a common beginning stay together, since a row computes it once.
    """
    if processes.world_size() == 1:
        return list(range(len(pairs)))
    order = sorted(range(len(pairs)), key=lambda i: (pairs[i].prompt, i))
    tokens = [len(pairs[i].prompt) + len(pairs[i].chosen) + len(pairs[i].rejected) for i in order]
    return [order[place] for place in processes.partition_by_cost(tokens)]


def distinct_rank_indices(pairs: Sequence[EncodedPair]) -> NDArray[np.int64]:
    """The same of pairs that may be too many to look at, of equal ones the first, as ascending indices."""
    _, first = np.unique(pair_digests(pairs), return_index=True)
    distinct = np.sort(first)
    stretch = processes.partition_by_cost(pair_lengths(pairs)[distinct].sum(axis=1).tolist())
    return distinct[stretch.start : stretch.stop]


def all_gather_logps(logps: Logps) -> Logps:
    """What is known of the pairs of all processes, one process after another, without gradients."""
    if processes.world_size() == 1:
        return logps
    columns = {name: value for name, value in vars(logps.columns or LossColumns()).items() if value is not None}
    found = processes.all_gather(logps.items() | {f"columns.{name}": value for name, value in columns.items()})
    beside = LossColumns(**{name: found.pop(f"columns.{name}") for name in columns})
    return Logps(**found, columns=None if logps.columns is None else beside)
