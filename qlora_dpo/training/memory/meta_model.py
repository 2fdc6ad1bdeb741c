"""The base on the meta device, and what its weights, its head and the optimizer will take."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, assert_never

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_dpo.errors import ModelError
from qlora_dpo.model.base import disable_dropout, store_embeddings
from qlora_dpo.model.device import Device
from qlora_dpo.model.quantized import stacked_weights
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference.logps import VOCAB_TILE
from qlora_dpo.preference.pack import STATES_PER_CHUNK
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.train import TrainTable


def build_on_meta(source: ModelSource, device: Device) -> Any:
    """The base of the source's config on the meta device: shapes and dtypes, no weights."""
    config = base_config(source)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=device.weight_dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unknown_config_error(source) from error
    store_embeddings(model, device)
    disable_dropout(model)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def base_config(source: ModelSource) -> Any:
    """The config of a base; raises ModelError if it is not that of a causal language model."""
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unknown_config_error(source) from error


def _unknown_config_error(source: ModelSource) -> ModelError:
    return ModelError(f"{source.name}: its config is not that of a known causal language model")


def base_weight_bytes(base: Any, table: ModelTable, device: Device) -> dict[str, int]:
    """Bytes of the base's weights as they are loaded: quantized layers, and the rest."""
    everything = sum(parameter.numel() * parameter.dtype.itemsize for parameter in base.parameters())
    names = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    stored = names[device.weight_dtype]
    if device.embedding_dtype != device.weight_dtype:
        stored += f", embeddings {names[device.embedding_dtype]}"
    if table.quantization == "none":
        return {f"weights, {stored}": everything}
    linear = linear_layers(base)
    dense = sum(layer.weight.numel() for layer in linear) * device.weight_dtype.itemsize
    biases = sum(layer.bias.numel() for layer in linear if layer.bias is not None)
    # a 4-bit layer keeps its bias in the compute dtype, an 8-bit one as it was
    saved = 0 if table.quantization == "int8" else device.weight_dtype.itemsize - device.torch_dtype.itemsize
    if table.quantization == "int8":
        bits, quantized = 8, sum(layer.weight.numel() + 4 * layer.out_features for layer in linear)
    else:
        bits, quantized = 4, sum(four_bit_bytes(layer.weight.numel(), table.double_quant) for layer in linear)
    experts = sum(weight.numel() * weight.dtype.itemsize for weight in stacked_weights(base).values())
    return {
        f"{bits}-bit weights of {len(linear):,} layers": quantized,
        **({f"weights of experts, not quantized, {names[device.weight_dtype]}": experts} if experts else {}),
        f"embeddings and what else is not quantized, {stored}": everything - dense - biases * saved - experts,
    }


def four_bit_bytes(elements: int, double_quant: bool) -> int:
    """Bytes of a weight in NF4 or FP4: half a byte per element and a scale per 64 elements (Dettmers et al. 2023).

    A scale is a float32; double-quantized, it is one byte, with a float32 per 256 scales and an offset. Each layer also
    has tables of 16 and 256 float32 values that the codes index.
    """
    scales = math.ceil(elements / 64)
    codes = math.ceil(elements / 2) + 16 * 4
    return codes + (scales + math.ceil(scales / 256) * 4 + 256 * 4 + 4 if double_quant else scales * 4)


def optimizer_bytes(parameters: Mapping[str, nn.Parameter], table: TrainTable) -> int:
    """Bytes of the optimizer's state beside `parameters`."""
    elements = sum(parameter.numel() for parameter in parameters.values())
    match table.optim:
        case "adamw_torch" | "schedule_free_adamw" | "paged_adamw_32bit":
            return elements * 8
        case "adamw_8bit" | "paged_adamw_8bit":
            return elements * 2
        case "adafactor":
            return sum(
                4 * (sum(weight.shape[:2]) if weight.dim() > 1 else weight.numel()) for weight in parameters.values()
            )
        case "sgd":
            return 0
        case never:
            assert_never(never)


def logit_tile_bytes(vocabulary: int, device: Device) -> int:
    """Bytes the head works on at once: three float32 tiles of logits and their exponentials.

    In 16 bits the next tile's product exists before it is converted, beside the tiles of the one before.
    """
    tile, narrow = VOCAB_TILE[device.type], device.torch_dtype.itemsize % 4
    return STATES_PER_CHUNK * min(tile, vocabulary) * (3 * 4 + (narrow if vocabulary > tile else 0))


def mimic_quantized(linear: Sequence[nn.Linear], table: ModelTable, device: Device) -> None:
    """Make linear layers on meta return an output in the compute dtype, as quantized ones do.

    Each gets its weight in the compute dtype beside it; the conversion itself is another part of the plan.
    """
    for layer in linear:
        if layer.weight.dtype != device.torch_dtype or table.quantization != "none":
            layer.dense_weight = layer.weight.data.to(device.torch_dtype)
        if table.quantization != "none":
            layer.forward = partial(_quantized_forward, layer)  # type: ignore[method-assign]


def _quantized_forward(layer: Any, input_TI: torch.Tensor) -> torch.Tensor:
    weight_OI: torch.Tensor = layer.dense_weight
    bias = None if layer.bias is None else layer.bias.to(weight_OI.dtype)
    return nn.functional.linear(input_TI.to(weight_OI.dtype), weight_OI, bias)


def linear_layers(base: Any) -> list[nn.Linear]:
    """The linear layers except the output head: those that are quantized."""
    head = base.get_output_embeddings()
    return [module for module in base.modules() if isinstance(module, nn.Linear) and module is not head]
