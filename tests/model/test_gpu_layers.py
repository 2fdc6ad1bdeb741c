"""Quantized layers and lean LoRA layers against float64, bitsandbytes' own layers and PEFT's."""

from typing import Any

import kernel_devices
import pytest
import tiny
import tiny_run
import torch
from kernel_devices import ONE_PRODUCT, PLACES, Where, apart
from torch import Tensor

from qlora_dpo.model.base import load_base
from qlora_dpo.model.device import Device
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import adapter_disabled, attach_lora, trainable_parameters
from qlora_dpo.model.quantized import dense_weight, dequantized, linear4bit_layers, quantized_layers
from qlora_dpo.preference.start_checks import probe_logits
from qlora_dpo.recipe.model import ModelTable

pytestmark = tiny_run.LIBRARIES_WARN

QUANTIZED = pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
FOUR_BIT = pytest.mark.parametrize("quantization", ["nf4", "fp4"])
TOKENS = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 320, 511, 512, 513, 600)
"""Of one product: bitsandbytes' rule for its fused kernel changes at several of them, on a T4 and on an H200."""
GRADIENT = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 5e-2}
"""Relative L2 distance of a small model's adapter gradients from those in float64; on a GPU layers add up in bf16."""


def base_of(quantization: Any, place: Device) -> Any:
    """The tiny model, loaded as a run loads it, no dense weight kept."""
    return load_base(tiny_run.source(), ModelTable(name=tiny_run.source().name, quantization=quantization), place)


@PLACES
@QUANTIZED
def test_a_dense_weight_is_the_float32_one_rounded_once(where: Where, dtype: str, quantization: str) -> None:
    place = kernel_devices.chosen(where, dtype)
    layers = quantized_layers(base_of(quantization, place))
    assert len(layers) == 14
    for layer in layers.values():
        assert torch.equal(dense_weight(layer, place.torch_dtype), dequantized(layer).to(place.torch_dtype))
        assert torch.equal(dense_weight(layer, torch.float16), dequantized(layer).to(torch.float16))


@PLACES
@FOUR_BIT
@torch.no_grad()
def test_a_4_bit_layer_gives_what_bitsandbytes_own_gives_for_any_number_of_tokens(
    where: Where, dtype: str, quantization: str
) -> None:
    place = kernel_devices.chosen(where, dtype)
    layers = linear4bit_layers(base_of(quantization, place))
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        for tokens in TOKENS if where == "cuda" else TOKENS[::11]:
            x_MK = torch.randn(1, tokens, layer.in_features, generator=generator).to(place.torch_dtype)
            on_device = x_MK.to(place.torch_device)
            with place.autocast():
                ours, theirs = layer(on_device), type(layer).forward(layer, on_device)
            exact = x_MK.double() @ dequantized(layer).cpu().double().T
            if layer.bias is not None:
                exact += layer.bias.cpu().double()
            assert apart(ours, exact) < ONE_PRODUCT[dtype], f"{name}, {tokens} tokens"
            assert apart(ours, theirs) < ONE_PRODUCT[dtype], f"{name}, {tokens} tokens"


@PLACES
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("tokens", [2, 28, 64, 300])
def test_with_the_adapter_off_a_pair_of_any_length_has_the_bases_bits(
    where: Where, dtype: str, quantization: str, tokens: int
) -> None:
    place = kernel_devices.chosen(where, dtype)
    (pair,) = tiny_run.pairs(1, longest_prompt=2, longest_answer=1)
    pair = type(pair)(tuple(range(3, 2 + tokens)), (5,), (6,), 1, b"")
    base = base_of(quantization, place)
    before_LV = probe_logits(base, pair, place)
    assert before_LV.shape[0] == tokens
    model = attach_lora(base, tiny_run.recipe().lora, 42)
    fuse_lora(model, place.torch_dtype)
    assert torch.equal(probe_logits(model, pair, place), before_LV)
    kernel_devices.moved(tiny_run.stirred(model), place)
    assert not torch.equal(probe_logits(model, pair, place), before_LV)
    with adapter_disabled(model):
        assert torch.equal(probe_logits(model, pair, place), before_LV)


@PLACES
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_lean_layers_give_outputs_and_gradients_of_pefts_in_float64(
    where: Where, dtype: str, quantization: str
) -> None:
    place = kernel_devices.chosen(where, dtype)
    lean = kernel_devices.moved(
        tiny_run.stirred(attach_lora(base_of(quantization, place), tiny_run.recipe().lora, 42)), place
    )
    exact = attach_lora(tiny.qwen2().double().requires_grad_(False), tiny_run.recipe().lora, 42)
    copy_weights(lean, exact)
    fuse_lora(lean, place.torch_dtype)
    ids = torch.arange(3, 90)[None]
    with place.autocast():
        found = lean(input_ids=ids.to(place.torch_device), use_cache=False).logits
    expected = exact(input_ids=ids, use_cache=False).logits
    assert apart(found, expected) < 2 * ONE_PRODUCT[dtype]
    # the same slopes for both, or the rounding of the outputs would be squared
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    found.backward(slope.to(found.device, found.dtype))
    expected.backward(slope.double())
    assert apart(gradients(lean), gradients(exact)) < GRADIENT[dtype]


def copy_weights(source: Any, target: Any) -> None:
    """Give the float64 model the weights of the other, its quantized ones dequantized."""
    quantized = quantized_layers(source)
    known = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        layer = quantized.get(name.removesuffix(".weight"))
        weight = known[name] if layer is None else dequantized(layer)
        parameter.data = weight.detach().cpu().double()


def gradients(model: Any) -> Tensor:
    """All gradients of the adapter in one vector, in the order of their names."""
    named = trainable_parameters(model)
    slopes = [named[name].grad for name in sorted(named)]
    return torch.cat([slope.flatten().cpu().double() for slope in slopes if slope is not None])
