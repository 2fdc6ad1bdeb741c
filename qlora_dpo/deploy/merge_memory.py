"""What a merge needs: bytes of memory and disk, known before it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.deploy.shards import base_tensors, largest_layer_bytes, plan_shards
from qlora_dpo.errors import DoesNotFitError
from qlora_dpo.files import check_disk_space
from qlora_dpo.model.memory import free_bytes

COMPARING = 2**29
"""Bytes for the activations and logits of a comparison: 2,048 tokens at a time, four sets of 64 MiB of logits."""


@dataclass(frozen=True)
class MergeMemory:
    """Bytes that a merge takes."""

    opened: int
    """The model as it was trained, which is loaded already."""
    shard: int
    layer: int
    check: int
    """The written model as it is loaded to be compared; the trained one is let go before."""
    disk: int

    def lines(self) -> list[str]:
        """The figures in words."""
        return [
            f"memory: the model as trained has {_size(self.opened)}; writing takes at most {_size(self.writing)} more "
            f"(a shard and the largest layer); then it is let go, and what was written is loaded: {_size(self.check)}",
            f"disk: {_size(self.disk)}",
        ]

    @property
    def writing(self) -> int:
        """Bytes beside the opened model while shards are written."""
        return self.shard + self.layer

    @property
    def more(self) -> int:
        """Bytes that are needed beyond what is loaded, at the worst moment."""
        return max(self.writing, self.check + COMPARING - self.opened)


def estimate_merge_memory(opened: OpenedModel, dtype: torch.dtype, candidates: int) -> MergeMemory:
    """What writing and checking `candidates` models of `dtype` takes; the trained one is loaded already."""
    held = sum(each.nbytes for each in (*opened.model.parameters(), *opened.model.buffers()))
    stored = base_tensors(opened)
    if stored is None:  # the whole model is loaded a second time, and its sums in float32
        elements = sum(_elements(each) for each in opened.model.parameters())
        whole = elements * (4 if candidates > 1 else dtype.itemsize)
        loaded = elements * (opened.device.weight_dtype.itemsize + dtype.itemsize)
        return MergeMemory(held, whole, 0, loaded, candidates * elements * dtype.itemsize)
    sizes = [
        sum(stored[name].bytes_in(dtype) for name in names)
        for names in plan_shards(stored, dtype).filename_to_tensors.values()
    ]
    # the file is mapped while it is loaded
    loaded = sum(each.bytes_in(opened.device.weight_dtype) for each in stored.values()) + sum(sizes)
    return MergeMemory(held, max(sizes), largest_layer_bytes(opened, stored), loaded, candidates * sum(sizes))


def check_merge_memory(room: MergeMemory, opened: OpenedModel, output: Path) -> None:
    """Raise DoesNotFitError if memory is too small for the merge, SourceError if the disk is."""
    check_disk_space(output, room.disk)
    free = free_bytes(opened.device)
    if room.more > free:
        raise DoesNotFitError(
            f"merging takes {_size(room.more)} more memory and {_size(free)} are free; close other programs, or merge "
            "on a larger machine"
        )


def _elements(parameter: Any) -> int:
    """Numbers in a parameter, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
