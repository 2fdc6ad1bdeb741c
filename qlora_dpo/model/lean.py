"""Makes plain LoRA layers lean: one autograd function for all layers that read the same tensor, without PEFT's copies.

T tokens, I inputs, O outputs of a layer, r rank, R the ranks of a group's layers together.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import Linear, Linear4bit, LoraLayer
from torch import Tensor, nn

from qlora_dpo.model.base import dense_weight

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that read the same tensor, in the order in which they are called."""


def make_lean(model: nn.Module, dtype: torch.dtype) -> str:
    """Let every plain LoRA layer compute in one autograd function; says how many do, and why others do not.

    PEFT's layer makes a copy of its output and, in 16 bits, of its input, and keeps more for the backward pass than
    the input. What is not plain LoRA on a dense or 4-bit linear layer (DoRA, dropout, other tuners) stays PEFT's.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    reasons = {id(layer): _not_plain(layer) for layer in layers}
    plain = [layer for layer in layers if not reasons[id(layer)]]
    for group in _groups(model, plain):
        for layer in group:
            layer.forward = partial(_forward, layer, group, dtype)
    for module in model.modules():
        # beside an adapter on some layers only; without a kept weight bitsandbytes' own function keeps less
        if isinstance(module, bnb.nn.Linear4bit) and hasattr(module, "dense_weight"):
            module.forward = partial(_base, module, dtype)
    others = ", ".join(sorted(set(filter(None, reasons.values()))))
    words = f"lora: {len(plain)} of {len(layers)} layers in one function"
    return f"{words}, the others by PEFT: {others}" if others else words


def _not_plain(layer: Any) -> str:
    """Why a LoRA layer is left to PEFT; empty if it is plain LoRA on a linear layer."""
    if type(layer) not in (Linear, Linear4bit) or type(layer.get_base_layer()) not in (nn.Linear, bnb.nn.Linear4bit):
        return type(layer).__name__
    if list(layer.lora_A) != ["default"]:
        return "several adapters"
    if layer.lora_variant:
        return type(layer.lora_variant["default"]).__name__
    if not isinstance(layer.lora_dropout["default"], nn.Identity):
        return "dropout"
    return "lora_bias" if layer.lora_bias["default"] else ""


def _groups(model: nn.Module, plain: list[Any]) -> Iterator[list[Any]]:
    """The plain layers, those that read the same tensor together."""
    left = {id(layer): layer for layer in plain}
    for module in model.modules():
        children = dict(module.named_children())
        for names in GROUPS:
            group = [children[name] for name in names if id(children.get(name)) in left]
            if len(group) > 1:
                yield [left.pop(id(layer)) for layer in group]
    yield from ([layer] for layer in left.values())


def _forward(layer: Any, group: list[Any], dtype: torch.dtype, input_TI: Tensor) -> Tensor:
    """The output of `layer`; the first of a group to be called computes the others' as well.

    They wait at the tensor they were made from, so a layer that reads another tensor after all computes its own.
    """
    if layer.merged:
        peft: Tensor = type(layer).forward(layer, input_TI)
        return peft
    if layer.disable_adapters:
        return _base(layer.get_base_layer(), dtype, input_TI)
    version, waiting = getattr(input_TI, "_lean_outputs", (-1, {}))
    if id(layer) not in waiting or version != input_TI._version:
        waiting = dict(zip(map(id, group), _computed(group, input_TI, dtype), strict=True))
    output: Tensor = waiting.pop(id(layer))
    if waiting:
        input_TI._lean_outputs = input_TI._version, waiting  # type: ignore[attr-defined]
    elif hasattr(input_TI, "_lean_outputs"):
        del input_TI._lean_outputs
    return output


def _computed(group: list[Any], input_TI: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    weights = [layer.lora_A["default"].weight for layer in group] + [layer.lora_B["default"].weight for layer in group]
    return _Lean.apply(input_TI, group, dtype, *weights)  # type: ignore[no-any-return, no-untyped-call]


def _base(base: Any, dtype: torch.dtype, input_TI: Tensor) -> Tensor:
    plain_TO = nn.functional.linear(input_TI.to(dtype), dense_weight(base, dtype), _bias(base, dtype))
    return plain_TO.to(_output_dtype(base, input_TI, dtype))


def _output_dtype(base: Any, input_TI: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the layer would give without us, so that the base stays the same to the last bit.

    bitsandbytes gives back the dtype it was given, a dense layer under autocast that of the product.
    """
    return input_TI.dtype if isinstance(base, bnb.nn.Linear4bit) else dtype


def _bias(base: Any, dtype: torch.dtype) -> Tensor | None:
    return None if base.bias is None else base.bias.to(dtype)


class _Lean(torch.autograd.Function):
    """y = W x + b + scaling * B A x for each layer of a group, W frozen; keeps x and A x, and adds in place.

    The input is converted to the compute dtype once, all A are one product, and the input's gradient is one sum.
    """

    @staticmethod
    def forward(
        ctx: Any, input_TI: Tensor, group: list[Any], dtype: torch.dtype, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        shape = input_TI.shape
        x_TI = input_TI.detach().reshape(-1, shape[-1]).to(dtype)
        ranks = [len(a_rI) for a_rI in weights[: len(group)]]
        a_RI = torch.cat(weights[: len(group)]).to(dtype)
        b_Or = [weight.to(dtype) for weight in weights[len(group) :]]
        outputs = []
        with torch.autocast(x_TI.device.type, enabled=False):
            low_TR = x_TI @ a_RI.T
            for layer, own_Or, low_Tr in zip(group, b_Or, low_TR.split(ranks, 1), strict=True):
                base = layer.get_base_layer()
                output_TO = nn.functional.linear(x_TI, dense_weight(base, dtype), _bias(base, dtype))
                output_TO.addmm_(low_Tr, own_Or.T, alpha=layer.scaling["default"])
                outputs.append(output_TO.view(*shape[:-1], -1).to(_output_dtype(base, input_TI, dtype)))
        ctx.save_for_backward(x_TI, low_TR, a_RI, *b_Or)
        ctx.group, ctx.ranks, ctx.input = group, ranks, (shape, input_TI.dtype)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, low_TR, a_RI, *b_Or = ctx.saved_tensors
        shape, dtype = ctx.input
        slopes_TO = [slope.reshape(-1, slope.shape[-1]).to(x_TI.dtype) for slope in slopes]
        slopes_Tr, slopes_Or = [], []
        with torch.autocast(x_TI.device.type, enabled=False):
            for layer, own_Or, low_Tr, slope_TO in zip(
                ctx.group, b_Or, low_TR.split(ctx.ranks, 1), slopes_TO, strict=True
            ):
                slopes_Tr.append((slope_TO @ own_Or).mul_(layer.scaling["default"]))
                slopes_Or.append((slope_TO.T @ low_Tr).mul_(layer.scaling["default"]).float())
            slope_TR = torch.cat(slopes_Tr, 1)
            slope_RI = slope_TR.T @ x_TI
            slope_TI = slope_TR @ a_RI
            for layer, slope_TO in zip(ctx.group, slopes_TO, strict=True):
                slope_TI.addmm_(slope_TO, dense_weight(layer.get_base_layer(), x_TI.dtype))
        return slope_TI.view(shape).to(dtype), None, None, *slope_RI.float().split(ctx.ranks), *slopes_Or
