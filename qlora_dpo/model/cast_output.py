"""A forward hook for modules whose output has another dtype than their weights."""

from typing import Any

import torch
from torch import Tensor, nn


class CastOutput:
    """Forward hook that converts a module's output to `dtype`.

    It is an object, since `casts_output` has to recognize it, on a copied module too.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: D102
        return output.to(self.dtype)


def casts_output(module: nn.Module) -> bool:
    """True if `module` has a `CastOutput` hook."""
    return any(isinstance(hook, CastOutput) for hook in module._forward_hooks.values())
