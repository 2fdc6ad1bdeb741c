"""Estimates what a merge needs before it starts: bytes of memory and disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.deploy.shards import base_tensors, largest_layer_bytes, plan_shards
from qlora_dpo.errors import DoesNotFitError
from qlora_dpo.files import check_disk_space
from qlora_dpo.model.memory import free_bytes

CHECK_ACTIVATION_BYTES = 2**29
"""Activations and logits of the check: 2,048 tokens at a time, four sets of 64 MiB of logits."""


@dataclass(frozen=True)
class MergeMemory:
    """What a merge takes, in bytes."""

    model_bytes: int
    """The model as trained, which is loaded already."""
    shard_bytes: int
    """The largest shard."""
    layer_bytes: int
    """The largest merged layer in float32."""
    check_bytes: int
    """The written model, loaded for the check; the trained one is freed before."""
    disk_bytes: int

    def lines(self) -> list[str]:
        """The estimate in sentences."""
        return [
            f"memory: the model as trained has {_format_bytes(self.model_bytes)}; writing takes at most "
            f"{_format_bytes(self.writing_bytes)} more (a shard and the largest layer); then it is let go, and what "
            f"was written is loaded: {_format_bytes(self.check_bytes)}",
            f"disk: {_format_bytes(self.disk_bytes)}",
        ]

    @property
    def writing_bytes(self) -> int:
        """Bytes beside the loaded model while shards are written."""
        return self.shard_bytes + self.layer_bytes

    @property
    def additional_bytes(self) -> int:
        """Peak bytes beyond what is loaded already."""
        return max(self.writing_bytes, self.check_bytes + CHECK_ACTIVATION_BYTES - self.model_bytes)


def estimate_merge_memory(opened: OpenedModel, dtype: torch.dtype, candidates: int) -> MergeMemory:
    """Estimate writing and checking `candidates` models in `dtype`; the trained one is loaded already."""
    model_bytes = sum(tensor.nbytes for tensor in (*opened.model.parameters(), *opened.model.buffers()))
    stored = base_tensors(opened)
    if stored is None:  # the whole model is loaded a second time, and summed in float32
        elements = sum(_elements(parameter) for parameter in opened.model.parameters())
        second_model = elements * (4 if candidates > 1 else dtype.itemsize)
        loaded = elements * (opened.device.weight_dtype.itemsize + dtype.itemsize)
        return MergeMemory(model_bytes, second_model, 0, loaded, candidates * elements * dtype.itemsize)
    shard_bytes = [
        sum(stored[name].bytes_in(dtype) for name in names)
        for names in plan_shards(stored, dtype).filename_to_tensors.values()
    ]
    # The file is mapped while it is loaded
    weight_bytes = sum(tensor.bytes_in(opened.device.weight_dtype) for tensor in stored.values())
    return MergeMemory(
        model_bytes,
        max(shard_bytes),
        largest_layer_bytes(opened, stored),
        weight_bytes + sum(shard_bytes),
        candidates * sum(shard_bytes),
    )


def check_merge_memory(needed: MergeMemory, opened: OpenedModel, output: Path) -> None:
    """Raise DoesNotFitError if memory is too small for the merge, SourceError if the disk is."""
    check_disk_space(output, needed.disk_bytes)
    free = free_bytes(opened.device)
    if needed.additional_bytes > free:
        raise DoesNotFitError(
            f"merging takes {_format_bytes(needed.additional_bytes)} more memory and {_format_bytes(free)} are free; "
            "close other programs, or merge on a larger machine"
        )


def _elements(parameter: Any) -> int:
    """Number of elements of a parameter, also if it is quantized."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
