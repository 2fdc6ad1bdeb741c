"""Lean LoRA layers compute what PEFT's compute; what is not plain LoRA stays PEFT's; conversions happen once."""

from functools import partial
from typing import Any

import architectures
import pytest
import tiny_run
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora_dpo.model.activation_memory import measure_activation_bytes
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import adapter_disabled, attach_lora, trainable_parameters
from qlora_dpo.model.quantized import cache_dequantized, dense_weight, dequantized, linear4bit_layers
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import MicroBatch, collate

pytestmark = tiny_run.LIBRARIES_WARN

QUANTIZATIONS = pytest.mark.parametrize("quantization", ["none", "nf4"])
PAIR = tiny_run.pairs(1, seed=3)[0]


def both(quantization: str, place: Any = tiny_run.CPU, targets: Any = "all-linear") -> tuple[Any, Any]:
    """The same model and adapter twice: with PEFT's layers, and with lean ones."""
    table = tiny_run.recipe(lora={"target_modules": targets}).lora
    models = [tiny_run.stirred(attach_lora(tiny_run.base_model(quantization, place), table, 42)) for _ in range(2)]
    fuse_lora(models[1], place.torch_dtype)
    return models[0], models[1]


def logits(model: Any, place: Any = tiny_run.CPU) -> torch.Tensor:
    with place.autocast():
        found: torch.Tensor = model(input_ids=torch.tensor([PAIR.prompt + PAIR.chosen]), use_cache=False).logits
    return found


@QUANTIZATIONS
@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "up_proj"], ["q_proj", "v_proj", "down_proj"]])
def test_outputs_and_gradients_are_those_of_pefts_layers(quantization: str, targets: Any) -> None:
    found = []
    for model in both(quantization, targets=targets):
        out = logits(model)
        out.square().mean().backward()
        found.append((out.detach(), tiny_run.gradients(model)))
    assert tiny_run.apart(found[1][0], found[0][0]) < 1e-6
    assert tiny_run.apart(found[1][1], found[0][1]) < 1e-5


@QUANTIZATIONS
def test_in_bf16_outputs_have_the_dtype_of_pefts_and_differ_by_rounding(quantization: str) -> None:
    place = tiny_run.device.select_device("bf16")
    peft, lean = (logits(model, place).detach() for model in both(quantization, place))
    assert peft.dtype == lean.dtype
    assert tiny_run.apart(lean, peft) < 2e-2


@pytest.mark.parametrize(("layer", "least"), [("o_proj", 0.95), ("q_proj", 0.9)])
def test_an_update_smaller_than_bf16_can_add_is_not_lost(layer: str, least: float) -> None:
    """q_proj has biases, 100 times as large as the update, as some of Qwen2's are; PEFT adds to a rounded W x + b."""
    place = tiny_run.device.select_device("bf16")
    base = tiny_run.base_model("none", place)
    linear = base.get_submodule(f"model.layers.0.self_attn.{layer}")
    generator = torch.Generator().manual_seed(0)
    if linear.bias is not None:
        linear.bias.data = torch.randn(linear.out_features, generator=generator).to(linear.bias.dtype)
    model = tiny_run.stirred(attach_lora(base, tiny_run.recipe().lora, 42))
    adapted = next(module for name, module in model.named_modules() if name.endswith(f"layers.0.self_attn.{layer}"))
    adapted.lora_B["default"].weight.data *= 0.001
    x_TI = torch.randn(512, linear.in_features, generator=generator).bfloat16()
    shares = []
    with torch.no_grad(), place.autocast():
        for fuse in (False, True):
            if fuse:
                fuse_lora(model, torch.bfloat16)
            with adapter_disabled(model):
                off_TO = adapted(x_TI).float()
            update_TO = adapted.scaling["default"] * adapted.lora_B["default"](adapted.lora_A["default"](x_TI)).float()
            shares.append(((adapted(x_TI).float() - off_TO) * update_TO).sum().item() / update_TO.square().sum().item())
    assert shares[0] < 0.7
    assert least < shares[1] < 1.1


@QUANTIZATIONS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_with_the_adapter_off_a_lean_model_is_the_base_bit_for_bit(quantization: str, dtype: Any) -> None:
    place = tiny_run.device.select_device(dtype)
    base = tiny_run.base_model(quantization, place)
    with torch.no_grad():
        before = logits(base, place)
        model = tiny_run.stirred(attach_lora(base, tiny_run.recipe().lora, 42))
        fuse_lora(model, place.torch_dtype)
        assert not torch.equal(logits(model, place), before)
        with adapter_disabled(model):
            assert torch.equal(logits(model, place), before)


@QUANTIZATIONS
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_adapter_of_zeros_changes_no_bit_in_a_pass_with_gradients(quantization: str, dtype: Any) -> None:
    place = tiny_run.device.select_device(dtype)
    base = tiny_run.base_model(quantization, place)
    before = logits(base, place)
    model = attach_lora(base, tiny_run.recipe().lora, 42)
    fuse_lora(model, place.torch_dtype)
    assert torch.equal(logits(model, place), before)


@pytest.mark.parametrize("kind", list(architectures.CONFIGS))
def test_gated_mlps_and_norms_are_found_by_what_they_compute(kind: str) -> None:
    """Gemma's activation is another and its norm adds 1 to the weight: both stay transformers' own."""
    model = get_peft_model(architectures.made(architectures.CONFIGS[kind]), LoraConfig(target_modules="all-linear"))
    fuse_lora(model, torch.float32)
    lean = [name for name, module in model.named_modules() if "forward" in vars(module)]
    mlps, norms = (sum(name.endswith(end) for name in lean) for end in ("mlp", "norm"))
    heads = 4 if kind == "qwen3" else 0  # a norm of queries and one of keys in each of two layers
    assert (mlps, norms) == ((0, 0) if kind == "gemma" else (2, 5 + heads))


@pytest.mark.parametrize("kind", list(architectures.CONFIGS))
def test_a_lean_model_gives_the_gradients_of_pefts(kind: str) -> None:
    found = []
    for lean in (False, True):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear")
        model = tiny_run.stirred(get_peft_model(architectures.made(architectures.CONFIGS[kind]), config))
        if lean:
            fuse_lora(model, torch.float32)
        logits(model).square().mean().backward()
        found.append(tiny_run.gradients(model))
    assert tiny_run.apart(found[1], found[0]) < 1e-5


def test_gradients_of_the_adapter_are_float32_in_bf16() -> None:
    place = tiny_run.device.select_device("bf16")
    model = both("nf4", place)[1]
    logits(model, place).float().sum().backward()
    assert {
        parameter.grad.dtype for parameter in trainable_parameters(model).values() if parameter.grad is not None
    } == {torch.float32}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "lora: 14 of 14 layers are fused"),
        ({"lora_dropout": 0.1}, "lora: 0 of 14 layers are fused, the others are left to PEFT: dropout"),
        ({"use_dora": True}, "lora: 0 of 14 layers are fused, the others are left to PEFT: DoraLinearVariant"),
        (
            {"lora_bias": True, "target_modules": ["q_proj"]},
            "lora: 0 of 2 layers are fused, the others are left to PEFT: lora_bias",
        ),
    ],
)
def test_what_is_not_plain_lora_is_left_to_peft(change: dict[str, Any], says: str) -> None:
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **change}
    model = get_peft_model(tiny_run.base_model(), LoraConfig(**options))
    assert fuse_lora(model, torch.float32) == says


def test_dropout_is_applied_in_training() -> None:
    base = tiny_run.base_model()
    table = tiny_run.recipe(lora={"lora_dropout": 0.5}).lora
    model = tiny_run.stirred(attach_lora(base, table, 42))
    fuse_lora(model, torch.float32)
    evaluated = logits(model).detach()
    assert torch.equal(logits(model).detach(), evaluated)
    assert not torch.equal(logits(model.train()).detach(), evaluated)


def test_kept_dense_weights_are_the_dequantized_ones_and_leave_the_4_bit_ones_alone() -> None:
    fresh, kept = (tiny_run.base_model("nf4") for _ in range(2))
    for layer in linear4bit_layers(fresh).values():
        layer.__dict__.pop("dense_weight", None)
    for name, layer in linear4bit_layers(kept).items():
        other = linear4bit_layers(fresh)[name]
        assert layer.dense_weight.dtype == torch.float32
        assert torch.equal(dense_weight(layer, torch.float32), dequantized(other))
        assert torch.equal(layer.weight.data, other.weight.data)
    assert not [name for name in kept.state_dict() if "dense_weight" in name]


def test_a_weight_that_has_the_compute_dtype_already_is_not_kept_twice() -> None:
    layers = [module for module in tiny_run.base_model().modules() if isinstance(module, nn.Linear)]
    assert not [layer for layer in layers if hasattr(layer, "dense_weight")]
    for layer in layers:
        cache_dequantized(layer, torch.bfloat16)
    assert all(layer.dense_weight.dtype == torch.bfloat16 for layer in layers)


def test_in_16_bits_a_lean_layer_keeps_less_than_pefts() -> None:
    place = tiny_run.device.select_device("bf16")
    batch = collate(tiny_run.pairs(8), tiny_run.PACKED)
    peft, lean = (
        measure_activation_bytes(
            model.get_base_model(), partial(logps_of, model.train(), batch, place), batch.input_ids_BL.numel()
        ).layer
        for model in both("nf4", place)
    )
    assert lean < 0.75 * peft  # 2,459 bytes and 3,358


def logps_of(model: Any, batch: MicroBatch, place: Any) -> torch.Tensor:
    return score_batch(model, batch, place).chosen_logp_P
