"""The merged weight of each layer: the base weight it was trained against, plus what the adapters add."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.model.quantized import dequantized, quantization_of, quantized_layers


def changed_layers(model: Any) -> dict[str, nn.Module]:
    """Layers whose weight differs from the base's files, by name in the base: adapted, quantized or both."""
    base = unwrap_peft(model)
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    quantized = {name.removesuffix(".base_layer"): layer for name, layer in quantized_layers(base).items()}
    return quantized | adapted


def modules_to_save_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of fully trained modules (PEFT's modules_to_save), by name in the base."""
    return {
        f"{name}.{parameter_name}": tensor.detach()
        for name, module in unwrap_peft(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for parameter_name, tensor in module.modules_to_save[module.active_adapters[0]].named_parameters()
    }


@torch.no_grad()
def base_layer_weight(layer: nn.Module) -> Tensor:
    """A copy of the weight (out, in) that the adapter was trained against, in float32."""
    base_layer: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if quantization_of(base_layer) != "none":
        return dequantized(base_layer)
    weight: Tensor = base_layer.weight.detach().to(torch.float32, copy=True)
    return weight


@torch.no_grad()
def add_delta_weight(layer: Any, weight: Tensor) -> Tensor:
    """Add the active adapters' scaling * B A to `weight`, (out, in) in float32, in place.

    DoRA (Liu et al. 2024, eq. 5) then scales each row of the sum to its trained magnitude. In place, since the largest
    layer of a large model takes a gigabyte.
    """
    if not isinstance(layer, LoraLayer):
        return weight
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = (m[name].weight.detach().float().to(weight.device) for m in (layer.lora_A, layer.lora_B))
            weight.addmm_(b, a, alpha=layer.scaling[name])
            if is_dora(layer):
                magnitude = layer.lora_magnitude_vector[name].weight.detach().float().to(weight.device)
                weight.mul_((magnitude / weight.norm(dim=1))[:, None])
    return weight


def is_dora(layer: Any) -> bool:
    """True if the layer's adapter is a DoRA adapter."""
    return isinstance(layer, LoraLayer) and any(layer.use_dora.values())
