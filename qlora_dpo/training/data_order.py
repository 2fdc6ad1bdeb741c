"""Which pairs each optimizer step sees: a new shuffle every epoch, drawn from the seed and the epoch alone."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_dpo.recipe.train import TrainTable


@dataclass(frozen=True)
class DataOrder:
    """The order of all pairs over a run. Steps are counted from 1, epochs from 0."""

    num_pairs: int
    batch_size: int
    seed: int
    total_steps: int
    chat_starts: tuple[int, ...] | None = None
    """The first pair of each chat whose answers stay together, since they share their first turns; None: no chats."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that pass over all pairs once; the last of them may be smaller."""
        return math.ceil(self.num_pairs / self.batch_size)

    def batch_indices(self, step: int) -> list[int]:
        """The pairs of optimizer step `step`, as indices into the training pairs."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self.chat_starts is None:
            order_P = _permutation(self.num_pairs, self.seed, epoch)
        else:
            order_P = _chat_permutation((*self.chat_starts, self.num_pairs), self.seed, epoch)
        indices: list[int] = order_P[position * self.batch_size : (position + 1) * self.batch_size].tolist()
        return indices

    def epoch(self, step: int) -> float:
        """How many epochs are done after `step`."""
        return step / self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """True if `step` is the last of its epoch."""
        return step % self.steps_per_epoch == 0

    def evaluates_after(self, step: int, eval_steps: int | None) -> bool:
        """True if the run evaluates after `step`: every `eval_steps`, else at the end of each epoch, and at the end."""
        return step == self.total_steps or is_due(step, eval_steps, self.ends_epoch(step))

    @property
    def flat_indices(self) -> list[int]:
        """The pairs of all steps, one after another."""
        return [index for step in range(1, self.total_steps + 1) for index in self.batch_indices(step)]

    @property
    def seen_indices(self) -> NDArray[np.int64]:
        """The pairs of all steps, each once, in ascending order."""
        if self.total_steps >= self.steps_per_epoch:
            return np.arange(self.num_pairs)
        return np.unique(np.array(self.flat_indices, dtype=np.int64))


def is_due(step: int, every: int | None, otherwise: bool) -> bool:
    """True every so many steps, or `otherwise` where the recipe does not say."""
    return otherwise if every is None else step % every == 0


def make_data_order(pairs: int, table: TrainTable, chat_starts: tuple[int, ...] | None = None) -> DataOrder:
    """The order of `pairs` training pairs over the epochs or steps of the recipe."""
    all_epochs = math.ceil(pairs / table.batch_size) * table.num_train_epochs
    total = all_epochs if table.max_steps is None else min(table.max_steps, all_epochs)
    return DataOrder(pairs, table.batch_size, table.seed, total, chat_starts)


def epoch_permutation(pairs: int, seed: int, epoch: int) -> list[int]:
    """A shuffle of `pairs` indices that is the same on every machine for one seed and epoch."""
    order: list[int] = _permutation(pairs, seed, epoch).tolist()
    return order


@lru_cache(maxsize=1)  # 10 million pairs take half a second to shuffle, and every step of an epoch needs it
def _permutation(pairs: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(pairs, generator=generator)


@lru_cache(maxsize=1)
def _chat_permutation(bounds: tuple[int, ...], seed: int, epoch: int) -> Tensor:
    """A shuffle of chats, each of which is the pairs from one of `bounds` to the next, in their order."""
    chats = _permutation(len(bounds) - 1, seed, epoch).tolist()
    return torch.cat([torch.arange(bounds[chat], bounds[chat + 1]) for chat in chats])
