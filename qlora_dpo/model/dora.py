"""Computes DoRA's weight norms in float32 for any dtype of activations, so that an untrained adapter changes no bit.

PEFT 0.21 computes them from a weight rounded to the dtype of the activations, fp16 or bf16 under CUDA's autocast. The
magnitude was initialized from a different rounding, so the ratio of magnitude and norm would not be exactly 1, and the
model with an untrained adapter would differ from its base.

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
    """Make every linear DoRA layer of `model` compute its norms in float32."""
    for _, _, dora in _dora_layers(model):
        dora.forward = partial(_forward, dora)


@torch.no_grad()
def reset_magnitudes(model: nn.Module) -> None:
    """Set each magnitude to the norm by which the forward pass divides it, as PEFT does for a new adapter."""
    for name, layer, dora in _dora_layers(model):
        norm_O = _weight_norm(dora, layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name], layer.scaling[name])
        dora.weight.data = norm_O.to(dora.weight.device)


def _dora_layers(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Adapter name, LoRA layer and DoRA module of every linear layer with DoRA."""
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
    """What DoRA adds (T, O) to the base layer's output, in its dtype (Liu et al. 2024, eq. 5, norms detached).

    `base_result` is the base layer's output, or None with dropout, where the base is computed on the dropped-out input.
    """
    norm_O = _weight_norm(dora, base_layer, lora_A, lora_B, scaling)
    scale_O = dora.weight / norm_O
    base_output_TO = base_layer(x) if base_result is None else base_result
    base_TO = base_output_TO if base_layer.bias is None else base_output_TO - base_layer.bias
    delta_TO: Tensor = (scale_O - 1) * base_TO + scale_O * lora_B(lora_A(x)) * scaling
    return delta_TO.to(base_output_TO.dtype)


@torch.no_grad()
def _weight_norm(dora: Any, base_layer: Any, lora_A: Any, lora_B: Any, scaling: float) -> Tensor:
    """The L2 norm (O,) of each row of W + scaling * B A, in float32."""
    quantized = quantization_of(base_layer) != "none"
    weight_OI = dequantized(base_layer) if quantized else base_layer.weight.to(torch.float32, copy=True)
    if dora.fan_in_fan_out:  # GPT-2's Conv1D stores (I, O)
        weight_OI = weight_OI.T
    # in place, since autocast leaves in-place operations in float32
    weight_OI.addmm_(lora_B.weight.float(), lora_A.weight.float(), alpha=scaling)
    norm_O: Tensor = torch.linalg.vector_norm(weight_OI, dim=1)
    return norm_O
