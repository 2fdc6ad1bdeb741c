"""The 4-bit base: what is read back is what is computed with, before and after any forward pass."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from saved_adapters import save_base
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_dpo.errors import ModelError
from qlora_dpo.model import device
from qlora_dpo.model.base import load_base
from qlora_dpo.model.quantized import dense_weight, dequantized, linear4bit_layers
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.recipe.model import ModelTable

IDS = torch.arange(3, 43)[None]


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return ModelSource("base", save_base(tmp_path / "base"))


def loaded(source: ModelSource, **changed: Any) -> PreTrainedModel:
    return load_base(source, ModelTable(name=str(source.folder), **changed), device.select_device("fp32"))


def test_nf4_takes_the_linear_layers_and_leaves_head_embeddings_and_norms(source: ModelSource) -> None:
    model = loaded(source)
    assert len(linear4bit_layers(model)) == 14
    assert type(model.lm_head) is nn.Linear
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_unquantized_weights_are_those_of_the_files(source: ModelSource) -> None:
    from transformers import AutoModelForCausalLM

    wanted = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    found = loaded(source, quantization="none")
    assert linear4bit_layers(found) == {}
    for name, parameter in wanted.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_dequantized_weight_is_the_one_the_layer_computes_with(source: ModelSource, double_quant: bool) -> None:
    for name, layer in linear4bit_layers(loaded(source, double_quant=double_quant)).items():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = nn.functional.linear(x, dequantized(layer), layer.bias)
            torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=1e-6, msg=name)


def test_every_block_of_64_has_at_most_16_values_scaled_by_its_largest(source: ModelSource) -> None:
    from safetensors.torch import load_file

    original = load_file(source.folder / "model.safetensors")
    for name, layer in linear4bit_layers(loaded(source, double_quant=False)).items():
        weight, before = dequantized(layer), original[f"{name}.weight"].float()
        assert weight.dtype == torch.float32
        assert all(len(block.unique()) <= 16 for block in weight.reshape(-1, 64))
        largest = before.reshape(-1, 64).abs().amax(1)
        torch.testing.assert_close(weight.reshape(-1, 64).abs().amax(1), largest, atol=0, rtol=1e-6)
        # the widest gap between two NF4 levels is 0.304 of the block's scale
        assert ((weight - before).reshape(-1, 64).abs().amax(1) <= 0.153 * largest).all()


def state_of(layer: bnb.nn.Linear4bit) -> Any:
    return layer.weight.quant_state


def test_no_forward_pass_changes_or_repacks_a_4_bit_weight(source: ModelSource) -> None:
    model = loaded(source)
    before = {name: dequantized(layer) for name, layer in linear4bit_layers(model).items()}
    with torch.no_grad():
        model(IDS)
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS)
    model.train()(IDS)
    for name, layer in linear4bit_layers(model).items():
        assert not getattr(state_of(layer), "packing_format_for_cpu", False), name
        assert torch.equal(dequantized(layer), before[name]), name


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="only a CPU with AVX512-BF16 repacks 4-bit weights")
def test_without_the_guard_this_cpu_repacks_a_weight_and_reading_it_back_is_refused(source: ModelSource) -> None:
    model = loaded(source)
    layer = next(iter(linear4bit_layers(model).values()))
    layer.support_avx512bf16_for_cpu = True  # what compute_with_dequantized_weights switched off
    del layer.forward  # bitsandbytes' own
    with torch.no_grad():
        model(IDS)
    assert state_of(layer).packing_format_for_cpu
    with pytest.raises(ModelError) as raised:
        dequantized(layer)
    assert str(raised.value) == "a 4-bit weight was repacked for this CPU and cannot be read back; load the base again"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantizing_into_16_bits_rounds_the_float32_weight_once(source: ModelSource, dtype: torch.dtype) -> None:
    for layer in linear4bit_layers(loaded(source)).values():
        assert torch.equal(dense_weight(layer, dtype), dequantized(layer).to(dtype))


def test_a_4_bit_layer_never_computes_by_bitsandbytes_own_product(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(source)
    expected = model(IDS).logits
    monkeypatch.setattr(bnb, "matmul_4bit", None)
    for layer in linear4bit_layers(model).values():
        inputs = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        dense = torch.nn.functional.linear(inputs, dequantized(layer), layer.bias)
        assert torch.equal(layer(inputs), dense)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(inputs).dtype == torch.bfloat16
        layer.compute_dtype = torch.bfloat16
        narrow = (each.bfloat16() for each in (inputs, dequantized(layer), layer.bias) if each is not None)
        assert torch.equal(layer(inputs), torch.nn.functional.linear(*narrow).float())
        layer.compute_dtype = torch.float32
    assert torch.equal(model(IDS).logits, expected)


def test_reading_back_leaves_the_layer_as_it_was(source: ModelSource) -> None:
    layer = next(iter(linear4bit_layers(loaded(source)).values()))
    kept: Tensor = layer.weight.data.clone()
    state = state_of(layer).dtype
    dequantized(layer)
    assert torch.equal(layer.weight.data, kept)
    assert state_of(layer).dtype == state


def test_weights_that_are_no_causal_language_model_are_refused_in_one_sentence(source: ModelSource) -> None:
    (source.folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(ModelError) as raised:
        loaded(source)
    assert str(raised.value).startswith("base: cannot be loaded as a causal language model: ")
    assert "\n" not in str(raised.value)
