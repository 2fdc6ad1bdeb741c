"""Makes quantized linear layers compute with their dequantized weights, in training, evaluation and chat alike.

bitsandbytes' own layers do not. On a GPU, a 4-bit layer with few tokens (up to 64 on a T4, 32 on an H200) uses a fused
kernel that rounds differently from dequantizing and multiplying. An 8-bit layer also rounds its inputs to 8 bits (on a
CPU in evaluation only), and an outlier in one row changes the rounding of all other rows. Reference, policy and merged
model would then be different models, and the completions in a packed row would influence each other.
"""

import copy
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlora_dpo.errors import ModelError
from qlora_dpo.recipe.model import Quantization


def compute_with_dequantized_weights(model: nn.Module) -> None:
    """Replace the forward of every quantized layer by a product with its dequantized weight.

    Under autocast, the layer computes in autocast's dtype and returns it, as a dense layer does. Without autocast, it
    computes in its own compute dtype and returns its input's dtype, as bitsandbytes does.

    bitsandbytes would change a 4-bit layer in its first forward pass. On CPUs with AVX512-BF16 it repacks the weight,
    after which dequantizing, merging and gradients silently read garbage. On every device it casts the bias to the
    compute dtype, which is done here instead.
    """
    for layer in quantized_layers(model).values():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            if layer.weight.CB is not None:
                layer.init_8bit_state()
        else:
            layer.support_avx512bf16_for_cpu = False
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(layer.compute_dtype)
        layer.forward = partial(_forward, layer)


def _forward(layer: Any, inputs: Tensor) -> Tensor:
    device_type = inputs.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else getattr(layer, "compute_dtype", None) or inputs.dtype
    output: Tensor = _DequantizedLinear.apply(inputs.to(dtype), layer)  # type: ignore[no-untyped-call]
    return output if autocast else output.to(inputs.dtype)


class _DequantizedLinear(torch.autograd.Function):
    """W x + b with W frozen; saves neither x nor the dequantized W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            return nn.functional.linear(inputs, dense_weight(layer, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ dense_weight(ctx.layer, gradient.dtype), None


def linear4bit_layers(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    """The 4-bit layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The 4-bit and 8-bit layers of `model` by name."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def stacked_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all experts of a layer in one tensor (E, in, out), by name, which bitsandbytes leaves alone."""
    return {
        f"{name}.{key}": weight
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for key, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and weight.is_floating_point() and min(weight.shape) > 1
    }


def quantization_of(model: nn.Module) -> Quantization:
    """The quantization of the linear layers of `model`."""
    layer: Any = next(iter(quantized_layers(model).values()), None)
    if layer is None:
        return "none"
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return "int8"
    return "fp4" if layer.weight.quant_type == "fp4" else "nf4"


def cache_dequantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Cache every linear weight in `dtype` beside its stored form, so that it is converted only once."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype != dtype:
            layer.dense_weight = dense_weight(layer, dtype)


def cache_at_first_use(model: nn.Module) -> None:
    """Have every 4-bit and 8-bit layer cache its weight in the compute dtype when it is first multiplied with."""
    for layer in quantized_layers(model).values():
        layer.caches_dense_weight = True


@torch.no_grad()
def dense_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The layer's weight (out, in) in `dtype`, with the values that bitsandbytes or autocast would multiply with.

    A 4-bit weight is dequantized straight into `dtype`; by way of float32, 10.5 instead of 2.5 bytes per element would
    be moved, for the same values.
    """
    cached: Tensor | None = getattr(layer, "dense_weight", None)
    if cached is not None and cached.dtype == dtype:
        return cached
    if isinstance(layer, bnb.nn.Linear4bit):
        weight = _dequantized_4bit(layer, dtype)
    else:
        weight = (_dequantized_8bit(layer) if isinstance(layer, bnb.nn.Linear8bitLt) else layer.weight).to(dtype)
    if getattr(layer, "caches_dense_weight", False):
        layer.dense_weight = weight
    return weight


def dequantized(layer: nn.Linear) -> Tensor:
    """The dequantized weight (out, in) in float32; raises ModelError if bitsandbytes has repacked it."""
    return _dequantized_8bit(layer) if isinstance(layer, bnb.nn.Linear8bitLt) else _dequantized_4bit(layer)


def _dequantized_4bit(layer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    # a weight that was gathered from its shards has lost its own quant_state
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError("a 4-bit weight was repacked for this CPU and cannot be read back; load the base again")
    state = copy.copy(state)
    state.dtype = dtype
    weight: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, state)
    return weight


def _dequantized_8bit(layer: Any) -> Tensor:
    """The 8-bit integers of each row, times the row's largest magnitude divided by 127."""
    state = layer.state
    weight: Tensor = state.CB.float().mul_((state.SCB.float() / 127)[:, None])
    return weight
