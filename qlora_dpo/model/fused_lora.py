"""Replaces PEFT's LoRA, gated-MLP and RMSNorm forwards with fused autograd functions that save fewer activations.

Results equal PEFT's.

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
"""Layers of one module that read the same input tensor, in the order in which they are called."""


def fuse_lora(model: nn.Module, dtype: torch.dtype) -> str:
    """Compute every plain LoRA layer in one autograd function; returns a sentence that says how many, and why not all.

    PEFT's layer copies its output and, in 16 bits, its input, and saves more than the input for the backward pass.
    Anything but plain LoRA on a dense or quantized linear layer (DoRA, dropout, other tuners) is left to PEFT.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    reasons = {id(layer): _unfusable_reason(layer) for layer in layers}
    plain = [layer for layer in layers if not reasons[id(layer)]]
    for group in _groups(model, plain, dtype):
        for layer in group.layers:
            layer.forward = partial(_linear, layer, group)
    for module in model.modules():
        if _is_fusable_mlp(module, plain):
            gate_up, down = LoraGroup((module.gate_proj, module.up_proj), dtype), LoraGroup((module.down_proj,), dtype)
            module.forward = partial(_mlp, module.forward, gate_up, down)
        elif _has_forward_of(module, LlamaRMSNorm):
            module.forward = partial(_norm, module, module.forward)
    others = ", ".join(sorted(set(filter(None, reasons.values()))))
    summary = f"lora: {len(plain)} of {len(layers)} layers are fused"
    return f"{summary}, the others are left to PEFT: {others}" if others else summary


def _unfusable_reason(layer: Any) -> str:
    """Why a LoRA layer cannot be fused; empty if it is plain LoRA on a linear layer."""
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
    """The plain layers, grouped by input tensor."""
    ungrouped = {id(layer): layer for layer in plain}
    for module in model.modules():
        children = dict(module.named_children())
        for names in SHARED_INPUT_LAYERS:
            group = [children[name] for name in names if id(children.get(name)) in ungrouped]
            if len(group) > 1:
                yield LoraGroup(tuple(ungrouped.pop(id(layer)) for layer in group), dtype)
    yield from (LoraGroup((layer,), dtype) for layer in ungrouped.values())


def _is_fusable_mlp(module: Any, plain: list[Any]) -> bool:
    """True for down(silu(gate(x)) * up(x)) of three plain LoRA layers."""
    return (
        _has_forward_of(module, LlamaMLP)
        and isinstance(module.act_fn, nn.SiLU | SiLUActivation)
        and {id(module.gate_proj), id(module.up_proj), id(module.down_proj)} <= set(map(id, plain))
    )


def _has_forward_of(module: nn.Module, known: type[nn.Module]) -> bool:
    """True if the module's forward has the bytecode of `known`; many transformers models copy it verbatim."""
    code, known_code = getattr(type(module).forward, "__code__", None), known.forward.__code__
    return code is not None and (code.co_code, code.co_names, code.co_consts) == (
        known_code.co_code,
        known_code.co_names,
        known_code.co_consts,
    )


def _linear(layer: Any, group: LoraGroup, input_TI: Tensor) -> Tensor:
    """The output of `layer`; the first layer of a group to be called also computes the outputs of the others.

    Sibling outputs are stored on the input tensor; a layer called with a different input computes its own.
    """
    if layer.merged:
        merged_output: Tensor = type(layer).forward(layer, input_TI)
        return merged_output
    if layer.disable_adapters:
        return fused_lora_ops.base_output(layer.get_base_layer(), group.dtype, input_TI.to(group.dtype))
    version, sibling_outputs = getattr(input_TI, "_fused_outputs", (-1, {}))
    if id(layer) not in sibling_outputs or version != input_TI._version:
        outputs = fused_lora_ops.fused_linear(input_TI, group)
        sibling_outputs = dict(zip(map(id, group.layers), outputs, strict=True))
    output: Tensor = sibling_outputs.pop(id(layer))
    if sibling_outputs:
        input_TI._fused_outputs = input_TI._version, sibling_outputs  # type: ignore[attr-defined]
    elif hasattr(input_TI, "_fused_outputs"):
        del input_TI._fused_outputs
    return output


def _mlp(forward: Callable[[Tensor], Tensor], gate_up: LoraGroup, down: LoraGroup, input_TI: Tensor) -> Tensor:
    """The output of a gated MLP; by the module's own `forward` without gradients, which saves no activations anyway."""
    if not torch.is_grad_enabled() or any(
        layer.merged or layer.disable_adapters for layer in gate_up.layers + down.layers
    ):
        return forward(input_TI)
    return fused_lora_ops.fused_gated_mlp(input_TI, gate_up, down)


def _norm(norm: Any, forward: Callable[[Tensor], Tensor], input_TD: Tensor) -> Tensor:
    """The output of an RMSNorm; by its own `forward` if the input needs no gradient, or the weight does."""
    if not input_TD.requires_grad or norm.weight.requires_grad:
        return forward(input_TD)
    return fused_lora_ops.fused_rms_norm(input_TD, forward, norm.weight, norm.variance_epsilon)
