"""Linear layers with 8-bit weights that compute with their dequantized weights, in training as in evaluation.

bitsandbytes' own layer rounds its inputs to 8 bits too, on a CPU in evaluation only, and lets an outlier in one row
decide how every other row is rounded: reference, policy and merged model would be three models, and answers in one row
would not be independent of each other.
"""

from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn


def compute_with_dequantized_weights(model: nn.Module) -> None:
    """Let every 8-bit layer multiply with its dequantized weight, in the dtype of autocast or of its input."""
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            if layer.weight.CB is not None:
                layer.init_8bit_state()
            layer.forward = partial(_forward, layer)


def dense(layer: Any) -> Tensor:
    """The weight (out, in) in float32: each row's 8-bit numbers times the row's largest magnitude over 127."""
    state = layer.state
    weight: Tensor = state.CB.float().mul_((state.SCB.float() / 127)[:, None])
    return weight


def _forward(layer: Any, inputs: Tensor) -> Tensor:
    place = inputs.device.type
    dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else inputs.dtype
    output: Tensor = _Product.apply(inputs.to(dtype), layer)  # type: ignore[no-untyped-call]
    return output.to(inputs.dtype)


class _Product(torch.autograd.Function):
    """W x + b, which keeps neither x nor the dequantized W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            return nn.functional.linear(inputs, _weight(layer, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(slope.device.type, enabled=False):
            return slope @ _weight(ctx.layer, slope.dtype), None


def _weight(layer: Any, dtype: torch.dtype) -> Tensor:
    kept: Tensor | None = getattr(layer, "dense_weight", None)
    return kept if kept is not None and kept.dtype == dtype else dense(layer).to(dtype)
