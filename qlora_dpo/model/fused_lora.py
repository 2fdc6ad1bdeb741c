"""Makes a LoRA model lean: plain LoRA layers, the MLPs made of them and the norms keep and copy less, as PEFT computes.

T tokens, I inputs, O outputs of a layer, D width.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import Linear, Linear4bit, Linear8bitLt, LoraLayer
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qlora_dpo.model import fused_lora_ops
from qlora_dpo.model.fused_lora_ops import LoraGroup

SHARED_INPUT_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that read the same tensor, in the order in which they are called."""


def fuse_lora(model: nn.Module, dtype: torch.dtype) -> str:
    """Let every plain LoRA layer compute in one autograd function; says how many do, and why others do not.

    PEFT's layer makes a copy of its output and, in 16 bits, of its input, and keeps more for the backward pass than
    the input. What is not plain LoRA on a dense or quantized linear layer (DoRA, dropout, other tuners) stays PEFT's.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    reasons = {id(layer): _unfusable_reason(layer) for layer in layers}
    plain = [layer for layer in layers if not reasons[id(layer)]]
    for group in _groups(model, plain, dtype):
        for layer in group.layers:
            layer.forward = partial(_linear, layer, group)
    for module in model.modules():
        if _is_fusable_mlp(module, plain):
            into, down = LoraGroup((module.gate_proj, module.up_proj), dtype), LoraGroup((module.down_proj,), dtype)
            module.forward = partial(_mlp, module.forward, into, down)
        elif _computes_as(module, LlamaRMSNorm):
            module.forward = partial(_norm, module, module.forward)
    others = ", ".join(sorted(set(filter(None, reasons.values()))))
    words = f"lora: {len(plain)} of {len(layers)} layers in one function"
    return f"{words}, the others by PEFT: {others}" if others else words


def _unfusable_reason(layer: Any) -> str:
    """Why a LoRA layer is left to PEFT; empty if it is plain LoRA on a linear layer."""
    linear = (nn.Linear, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    if type(layer) not in (Linear, Linear4bit, Linear8bitLt) or type(layer.get_base_layer()) not in linear:
        return type(layer).__name__
    if list(layer.lora_A) != ["default"]:
        return "several adapters"
    if layer.lora_variant:
        return type(layer.lora_variant["default"]).__name__
    if not isinstance(layer.lora_dropout["default"], nn.Identity):
        return "dropout"
    return "lora_bias" if layer.lora_bias["default"] else ""


def _groups(model: nn.Module, plain: list[Any], dtype: torch.dtype) -> Iterator[LoraGroup]:
    """The plain layers, those that read the same tensor together."""
    left = {id(layer): layer for layer in plain}
    for module in model.modules():
        children = dict(module.named_children())
        for names in SHARED_INPUT_LAYERS:
            group = [children[name] for name in names if id(children.get(name)) in left]
            if len(group) > 1:
                yield LoraGroup(tuple(left.pop(id(layer)) for layer in group), dtype)
    yield from (LoraGroup((layer,), dtype) for layer in left.values())


def _is_fusable_mlp(module: Any, plain: list[Any]) -> bool:
    """True for down(silu(gate(x)) * up(x)) of three plain LoRA layers."""
    return (
        _computes_as(module, LlamaMLP)
        and isinstance(module.act_fn, nn.SiLU | SiLUActivation)
        and {id(module.gate_proj), id(module.up_proj), id(module.down_proj)} <= set(map(id, plain))
    )


def _computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """True if the module's class has the very instructions of `known`, as many models of transformers repeat them."""
    own, code = getattr(type(module).forward, "__code__", None), known.forward.__code__
    return own is not None and (own.co_code, own.co_names, own.co_consts) == (
        code.co_code,
        code.co_names,
        code.co_consts,
    )


def _linear(layer: Any, group: LoraGroup, input_TI: Tensor) -> Tensor:
    """The output of `layer`; the first of a group to be called computes the others' as well.

    They wait at the tensor they were made from, so a layer that reads another tensor after all computes its own.
    """
    if layer.merged:
        peft: Tensor = type(layer).forward(layer, input_TI)
        return peft
    if layer.disable_adapters:
        return fused_lora_ops.base_output(layer.get_base_layer(), group.dtype, input_TI.to(group.dtype))
    version, waiting = getattr(input_TI, "_fused_outputs", (-1, {}))
    if id(layer) not in waiting or version != input_TI._version:
        waiting = dict(zip(map(id, group.layers), fused_lora_ops.fused_linear(input_TI, group), strict=True))
    output: Tensor = waiting.pop(id(layer))
    if waiting:
        input_TI._fused_outputs = input_TI._version, waiting  # type: ignore[attr-defined]
    elif hasattr(input_TI, "_fused_outputs"):
        del input_TI._fused_outputs
    return output


def _mlp(own: Callable[[Tensor], Tensor], into: LoraGroup, down: LoraGroup, input_TI: Tensor) -> Tensor:
    """The output of a gated MLP; layer by layer where no gradient is asked, which keeps nothing anyway."""
    if not torch.is_grad_enabled() or any(
        layer.merged or layer.disable_adapters for layer in into.layers + down.layers
    ):
        return own(input_TI)
    return fused_lora_ops.fused_gated_mlp(input_TI, into, down)


def _norm(norm: Any, own: Callable[[Tensor], Tensor], input_TD: Tensor) -> Tensor:
    if not input_TD.requires_grad or norm.weight.requires_grad:
        return own(input_TD)
    return fused_lora_ops.fused_rms_norm(input_TD, own, norm.weight, norm.variance_epsilon)
