"""Rounds merged weights to 16 bits without losing updates that are smaller than half a unit in the last place.

A base that is stored in bf16 lies on bf16's grid. Rounded to the nearest, base + update falls back to the base wherever
the update is less than half a unit, about 0.2 % of a weight: at a learning rate that is usual for DPO, 99 % of it is
lost (benchmarks/README.md). Rounded up or down at random in proportion, the mean of every weight is exact, and sums
over the hundreds of inputs of a layer hardly differ from it.
"""

from hashlib import sha256

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Elements at once, so that the largest layer needs no copies of itself."""


@torch.no_grad()
def is_on_grid(tensor: Tensor, dtype: torch.dtype) -> bool:
    """True if `dtype` represents every element of a float32 tensor exactly."""
    return all(torch.equal(part, part.to(dtype).to(part.dtype)) for part in tensor.flatten().split(CHUNK_ELEMENTS))


@torch.no_grad()
def stochastic_round(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A float32 tensor in bf16 or fp16 on the CPU, each element rounded up or down with the odds of its distance.

    The draws are those of `name`, so the same tensor is always rounded in the same way. Elements that `dtype`
    represents stay as they are.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:8]) % 2**63)
    parts = [_round_part(part.cpu(), dtype, generator) for part in tensor.flatten().split(CHUNK_ELEMENTS)]
    return torch.cat(parts).view(tensor.shape) if parts else tensor.to(dtype)


def _round_part(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    nearest = exact.to(dtype)
    value = nearest.float()
    # both formats are a sign and a magnitude, so the next number away from zero has the next bits
    outward = torch.where(exact.abs() > value.abs(), 1, -1).to(torch.int16)
    other = (nearest.view(torch.int16) + outward).view(dtype)
    odds = (exact - value).abs() / (other.float() - value).abs()
    takes_other = (torch.rand(exact.shape, generator=generator) < odds) & (exact != value) & other.isfinite()
    return torch.where(takes_other, other, nearest)
