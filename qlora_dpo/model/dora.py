"""DoRA's weight norms in float32, whatever the activations are: an untrained adapter then changes no bit.

PEFT 0.21 computes them from a weight rounded to the dtype of the activations. Under CUDA's autocast that is fp16 or
bf16, and the magnitude, which was set from another rounding, is then not 1 times the norm: the model with its untrained
adapter would differ from its base.

T tokens, I inputs, O outputs of a layer.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from qlora_dpo.model.quantized import dequantized, quantization_of


def use_exact_norms(model: nn.Module) -> None:
    """Let every linear DoRA layer of `model` compute its norms in float32."""
    for _, _, dora in _dora_layers(model):
        dora.forward = partial(_forward, dora)


@torch.no_grad()
def reset_magnitudes(model: nn.Module) -> None:
    """Set each magnitude to the norm that a forward pass divides it by, as PEFT does for a new adapter."""
    for name, layer, dora in _dora_layers(model):
        norm_O = _weight_norm(layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name], layer.scaling[name])
        dora.weight.data = norm_O.to(dora.weight.device)


def _dora_layers(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Name of the adapter, LoRA layer and DoRA module of every linear layer with DoRA."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, dora in layer.lora_magnitude_vector.items():
                if type(dora) is DoraLinearLayer:
                    yield name, layer, dora


def _forward(
    dora: Any,
    x: Tensor,
    *,
    lora_A: nn.Module,
    lora_B: nn.Module,
    scaling: float,
    base_layer: Any,
    base_result: Tensor | None = None,
    adapter_name: str = "default",
) -> Tensor:
    """What DoRA adds to the output (T, O) of the base layer, in its dtype (Liu et al. 2024, eq. 5; norms detached).

    `base_result` is that output; None if dropout changes the input of the adapter, and with it that of the base.
    """
    norm_O = _weight_norm(base_layer, lora_A, lora_B, scaling)
    scale_O = dora.weight / norm_O
    whole_TO = base_layer(x) if base_result is None else base_result
    base_TO = whole_TO if base_layer.bias is None else whole_TO - base_layer.bias
    added_TO: Tensor = (scale_O - 1) * base_TO + scale_O * lora_B(lora_A(x)) * scaling
    return added_TO.to(whole_TO.dtype)


@torch.no_grad()
def _weight_norm(base_layer: Any, lora_A: Any, lora_B: Any, scaling: float) -> Tensor:
    """The length (O,) of each row of W + scaling * B A, in float32."""
    quantized = quantization_of(base_layer) != "none"
    weight_OI = dequantized(base_layer) if quantized else base_layer.weight.to(torch.float32, copy=True)
    # in place, which autocast leaves in float32
    weight_OI.addmm_(lora_B.weight.float(), lora_A.weight.float(), alpha=scaling)
    norm_O: Tensor = torch.linalg.vector_norm(weight_OI, dim=1)
    return norm_O
