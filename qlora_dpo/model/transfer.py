"""Copies many small tensors to a GPU at once, and lets the host go on meanwhile."""

from collections.abc import Mapping

import torch
from torch import Tensor


def copy_batched(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors on `device`: of each dtype one copy, from pinned memory, for which the host does not wait.

    A micro-batch has about twenty index tensors. Copied one by one, each would make the host wait until the GPU has
    done all that was queued before.
    """
    if device.type == "cpu":
        return dict(tensors)
    moved: dict[str, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        names = [name for name, tensor in tensors.items() if tensor.dtype == dtype]
        flat = torch.cat([tensors[name].flatten() for name in names]).pin_memory().to(device, non_blocking=True)
        parts = flat.split([tensors[name].numel() for name in names])
        moved |= {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
    return moved
