"""A forward hook for a module whose output has another dtype than its weights."""

from typing import Any

import torch
from torch import Tensor, nn


class CastOutput:
    """Converts a module's output to `dtype`; an object and no closure, so that a copied module brings it along."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: D102
        return output.to(self.dtype)


def casts_output(module: nn.Module) -> bool:
    """True if `module` has such a hook."""
    return any(isinstance(hook, CastOutput) for hook in module._forward_hooks.values())
