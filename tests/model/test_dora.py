"""DoRA in every arithmetic: an untrained adapter changes no bit, a trained one is what PEFT computes in float32."""

from typing import Any

import pytest
import tiny_run
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from qlora_dpo.model.device import select_device
from qlora_dpo.model.lora import adapter_disabled, attach_lora, trainable_parameters
from qlora_dpo.model.quantized import compute_with_dequantized_weights
from qlora_dpo.recipe.model import LoraTable

pytestmark = tiny_run.LIBRARIES_WARN

IDS = torch.arange(3, 40)[None]


def with_dora(quantization: str, dtype: Any) -> tuple[Any, Any]:
    place = select_device(dtype)
    model = attach_lora(tiny_run.base_model(quantization, place), LoraTable(r=4, lora_alpha=8, use_dora=True), 0).eval()
    return model, place


def logits(model: Any, dtype: torch.dtype | None) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_an_untrained_adapter_changes_no_bit(quantization: str, dtype: torch.dtype | None) -> None:
    model, _ = with_dora(quantization, "fp32")
    on = logits(model, dtype)
    with adapter_disabled(model):
        assert torch.equal(on, logits(model, dtype))


def test_what_it_adds_has_the_dtype_of_the_base_layers_output() -> None:
    """On a CPU PEFT converts a layer's output itself, on a GPU under autocast it does not."""
    model, place = with_dora("nf4", "bf16")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    base, (a, b, dora) = (
        layer.get_base_layer(),
        (each["default"] for each in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)),
    )
    with place.autocast():
        inputs = torch.randn(5, layer.in_features)
        output = base(inputs)
        added = dora(inputs, lora_A=a, lora_B=b, scaling=2.0, base_layer=base, base_result=output)
    assert added.dtype == output.dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_outputs_and_gradients_are_pefts_in_float32(quantization: str) -> None:
    ours, _ = with_dora(quantization, "fp32")
    base = tiny_run.base_model(quantization)
    compute_with_dequantized_weights(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, use_dora=True, target_modules="all-linear")
    theirs = tiny_run.stirred(get_peft_model(base, config)).eval()
    with torch.no_grad():
        for name, parameter in trainable_parameters(ours).items():
            parameter.copy_(trainable_parameters(theirs)[name])
    for model in (ours, theirs):
        model(IDS).logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(logits(ours, None), logits(theirs, None), atol=1e-5, rtol=1e-5)
    for name, parameter in trainable_parameters(ours).items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, trainable_parameters(theirs)[name].grad, atol=1e-4, rtol=1e-4)
