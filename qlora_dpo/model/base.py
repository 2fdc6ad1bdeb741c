"""Loads tokenizer and base model, quantized or dense, so that every later step reads the weights it was given."""

import hashlib
import json
from typing import Any, assert_never

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qlora_dpo.errors import ModelError
from qlora_dpo.model import int8, processes
from qlora_dpo.model.device import Device
from qlora_dpo.model.sources import Source
from qlora_dpo.recipe_model import ModelTable, Quantization


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a padding token pads with its end token."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source.name}: its tokenizer cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    result: PreTrainedTokenizerBase = tokenizer
    return result


def tokenizer_fingerprints(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of how `tokenizer` splits text (words, merges, control tokens), and of its chat template."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        splits = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    else:
        splits = tokenizer.get_vocab()
    words = json.dumps([splits, tokenizer.special_tokens_map], sort_keys=True)
    texts = {"tokenizer": words, "template": str(tokenizer.chat_template)}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of which token each id is: models that share it can be asked about the same ids."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def load_base(source: Source, table: ModelTable, device: Device) -> PreTrainedModel:
    """Load the base onto `device`, frozen, in evaluation mode: linear layers quantized, the rest in `weight_dtype`."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=device.weight_dtype,
            device_map={"": device.type},
            trust_remote_code=False,  # unset, transformers would ask on the terminal
            **_quantization(table, device),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{source.name}: cannot be loaded as a causal language model: {_first_line(error)}") from error
    keep_weights_in_place(model)
    int8.compute_with_dequantized_weights(model)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def _quantization(table: ModelTable, device: Device) -> dict[str, Any]:
    match table.quantization:
        case "nf4" | "fp4":
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=table.quantization,
                bnb_4bit_use_double_quant=table.double_quant,
                bnb_4bit_compute_dtype=device.torch_dtype,
                # FSDP2 shards floats only; the bytes are the same
                bnb_4bit_quant_storage=device.weight_dtype if processes.sharing() == "fsdp2" else torch.uint8,
            )
        case "int8":
            config = BitsAndBytesConfig(load_in_8bit=True)
        case "none":
            return {}
        case never:
            assert_never(never)
    return {"quantization_config": config}


def keep_weights_in_place(model: nn.Module) -> None:
    """Stop bitsandbytes from changing a 4-bit layer in its first forward.

    On CPUs with AVX512-BF16 it would repack the weights: dequantizing, merging and later gradients would then silently
    read garbage. On every device it would cast the bias to the compute dtype, which is done here instead.
    """
    for layer in linear4bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = False
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(layer.compute_dtype)


def linear4bit_layers(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    """All 4-bit layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All 4-bit and 8-bit layers of `model` by name."""
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def quantization_of(model: nn.Module) -> Quantization:
    """How the linear layers of `model` are stored."""
    layer: Any = next(iter(quantized_layers(model).values()), None)
    if layer is None:
        return "none"
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return "int8"
    return "fp4" if layer.weight.quant_type == "fp4" else "nf4"


def keep_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep every linear weight in `dtype` beside its quantized or wider form, so that it is made once."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype != dtype:
            layer.dense_weight = dense_weight(layer, dtype)


@torch.no_grad()
def dense_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The layer's weight (out, in) in `dtype`, as bitsandbytes or autocast would make it for a product."""
    kept: Tensor | None = getattr(layer, "dense_weight", None)
    if kept is not None and kept.dtype == dtype:
        return kept
    weight: Any = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        # a weight that was gathered from its shards has no state of its own
        state = getattr(weight, "quant_state", None) or layer.quant_state
        weight = bnb.functional.dequantize_4bit(weight.data, state)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        weight = int8.dense(layer)
    dense: Tensor = weight.to(dtype)
    return dense


def dequantized(layer: nn.Linear) -> Tensor:
    """The layer's weight as trained against, (out, in) in float32; raises ModelError if it was repacked."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return int8.dense(layer)
    weight: Any = layer.weight
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError("a 4-bit weight was repacked for this CPU and cannot be read back; load the base again")
    kept, state.dtype = state.dtype, torch.float32
    try:
        dense: Tensor = bnb.functional.dequantize_4bit(weight.data, state)
        return dense.float()
    finally:
        state.dtype = kept


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
