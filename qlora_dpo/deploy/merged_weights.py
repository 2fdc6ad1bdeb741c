"""The weights of an adapter model as one matrix a layer: what it was trained against, and what the adapters add."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.model.quantized import dequantized, quantization_of, quantized_layers


def changed_layers(model: Any) -> dict[str, nn.Module]:
    """Layers whose weight is not the one in the base's files, by name in the base: adapted, quantized or both."""
    base = unwrap_peft(model)
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    quantized = {name.removesuffix(".base_layer"): layer for name, layer in quantized_layers(base).items()}
    return quantized | adapted


def modules_to_save_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of modules that were trained whole (PEFT's modules_to_save), by their name in the base."""
    return {
        f"{name}.{own}": tensor.detach()
        for name, module in unwrap_peft(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for own, tensor in module.modules_to_save[module.active_adapters[0]].named_parameters()
    }


@torch.no_grad()
def base_layer_weight(layer: nn.Module) -> Tensor:
    """The weight (out, in) that the adapter was trained against, in float32 and the caller's own."""
    inner: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if quantization_of(inner) != "none":
        return dequantized(inner)
    weight: Tensor = inner.weight.detach().to(torch.float32, copy=True)
    return weight


@torch.no_grad()
def add_delta_weight(layer: Any, whole: Tensor) -> Tensor:
    """Add to `whole`, (out, in) in float32, in place, what the active adapters change: the sum of scaling * B A.

    DoRA (Liu et al. 2024, eq. 5) brings each row of the sum to a length of its own. In place, since the largest layer
    of a large model is a gigabyte.
    """
    if not isinstance(layer, LoraLayer):
        return whole
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = (each[name].weight.detach().float().to(whole.device) for each in (layer.lora_A, layer.lora_B))
            whole.addmm_(b, a, alpha=layer.scaling[name])
            if is_dora(layer):
                length = layer.lora_magnitude_vector[name].weight.detach().float().to(whole.device)
                whole.mul_((length / whole.norm(dim=1))[:, None])
    return whole


def is_dora(layer: Any) -> bool:
    """True if the layer's adapter has a length of its own for each row."""
    return isinstance(layer, LoraLayer) and any(layer.use_dora.values())
