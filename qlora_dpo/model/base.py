"""Loads the frozen base model, quantized or dense."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, assert_never

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from qlora_dpo.errors import ModelError, RecipeError, first_line
from qlora_dpo.model.cast_output import CastOutput
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.quantized import compute_with_dequantized_weights, linear4bit_layers, quantized_layers
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.recipe.model import ModelTable

logger = logging.getLogger(__name__)


def check_vocabulary(
    model: PreTrainedModel, tokenizer: Any, largest_id: Callable[[], int], source: ModelSource
) -> None:
    """Raise ModelError if pairs have token ids for which the base has no embedding.

    `largest_id` finds the largest id of all pairs; it is called for a tokenizer that has ids beyond the embeddings.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    if max(tokenizer.get_vocab().values(), default=0) < embeddings or (largest := largest_id()) < embeddings:
        return
    raise ModelError(
        f"{source.name}: its tokenizer writes token {largest} ({tokenizer.convert_ids_to_tokens(largest)}), and the "
        f"model has embeddings for {embeddings} tokens; name a model whose tokenizer belongs to it, or resize its "
        "embeddings with model.resize_token_embeddings(len(tokenizer)) and train the new ones first"
    )


def check_stored_quantization(source: ModelSource, table: ModelTable) -> None:
    """Raise ModelError or RecipeError for a base that is stored in other bits than `table` says.

    A base that bitsandbytes has quantized is loaded as it is stored, and may be named as that. Other tools' formats
    have layers of their own, which neither train here nor merge.
    """
    stored = source.read_config().get("quantization_config")
    if not isinstance(stored, dict):
        return
    method = str(stored.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in stored else "unknown"))
    if method == "mxfp4" and table.quantization == "none":  # GPT-OSS, which transformers dequantizes as it loads
        return
    if method != "bitsandbytes":
        original = likely_original(source.hub_id or source.name, source.read_config())
        raise ModelError(
            f"{source.name}: is stored in the format {method}, whose layers cannot be trained here; name the original "
            f"model that it was made from{f', probably {original},' if original else ','} and let "
            'model.quantization = "nf4" quantize that'
        )
    kind = "int8" if stored.get("load_in_8bit") else str(stored.get("bnb_4bit_quant_type", "fp4"))
    double = bool(stored.get("bnb_4bit_use_double_quant")) if kind != "int8" else table.double_quant
    if (table.quantization, table.double_quant) == (kind, double):
        return
    wanted = f'model.quantization = "{kind}"'
    if kind != "int8":
        wanted += f" and model.double_quant = {str(double).lower()}"
    raise RecipeError(
        f'{source.name}: is stored as {kind} of bitsandbytes already, and the recipe says "{table.quantization}"; '
        f"write {wanted}, or name the original model"
    )


def likely_original(name: str, config: Mapping[str, Any]) -> str:
    """The hub name of the model that a quantized one was made from, by its name or its config; empty if unknown."""
    stripped = _QUANTIZED_ENDING.sub("", name.rstrip("/"))
    if stripped != name and _HUB_NAME.fullmatch(stripped):
        return stripped
    stored = str(config.get("_name_or_path") or "")
    return stored if stored != name and _HUB_NAME.fullmatch(stored) else ""


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_QUANTIZED_ENDING = re.compile(
    r"([-_.](awq|gptq|int[48]|w[48]a(16|8)|fp8|nvfp4|mxfp4|[48]-?bits?|bnb|quantized|dynamic|autoround|g(32|64|128)))+$",
    re.IGNORECASE,
)
"""What people add to a model's name when they quantize it."""


def merge_obstacle(model: PeftModel, source: ModelSource) -> str:
    """Why the adapter of `model` cannot be merged, as a sentence; empty if nothing is known to forbid it.

    A base that is stored quantized is merged layer by layer from its own files, which must name each layer as the code
    does; transformers loads some models of experts under other names.
    """
    if not isinstance(source.read_config().get("quantization_config"), dict):
        return ""
    names: set[str] = set()
    for file in source.folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and f"{name}.weight" not in names:
            return (
                f"{source.name}: is stored quantized, and its files have no {name}: this adapter can be used with the "
                "base, but not be merged; for a merged model, name the model that it was made from"
            )
    return ""


def tokenizer_fingerprints(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of the tokenization of `tokenizer` (vocabulary, merges, special tokens) and of its chat template."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        tokenization = {key: value for key, value in state.items() if key not in ("padding", "truncation")}
    else:
        tokenization = tokenizer.get_vocab()
    tokenizer_json = json.dumps([tokenization, tokenizer.special_tokens_map], sort_keys=True)
    tokenization_fingerprint = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    return {"tokenizer": tokenization_fingerprint, "template": template_fingerprint(tokenizer)}


def template_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the chat template of `tokenizer`."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the mapping from tokens to ids; models with the same fingerprint can score the same token ids."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def load_base(source: ModelSource, table: ModelTable, device: Device) -> PreTrainedModel:
    """Load the base onto `device`, frozen and in evaluation mode.

    Linear layers are quantized as `table` says, embeddings and output head have the device's `embedding_dtype`, other
    weights its `weight_dtype`. Raises ModelError if it cannot be loaded.
    """
    is_stored = "quantization_config" in source.read_config()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=device.weight_dtype,
            device_map={"": device.type},
            trust_remote_code=False,  # if unset, transformers would prompt on the terminal
            **({} if is_stored else _quantization(table, device)),
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"{source.name}: cannot be loaded as a causal language model: {first_line(error)}") from error
    if is_stored:
        _compute_in_device_dtype(model, device)
    compute_with_dequantized_weights(model)
    store_embeddings(model, device)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def _compute_in_device_dtype(model: nn.Module, device: Device) -> None:
    """Give a base that is stored quantized the dtypes of `device`; its files name others, which transformers keeps."""
    quantized = quantized_layers(model)
    weights = {id(layer.weight) for layer in quantized.values()}
    for layer in linear4bit_layers(model).values():
        layer.compute_dtype = device.torch_dtype
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in weights:
            parameter.data = parameter.data.to(device.weight_dtype)


def _quantization(table: ModelTable, device: Device) -> dict[str, Any]:
    match table.quantization:
        case "nf4" | "fp4":
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=table.quantization,
                bnb_4bit_use_double_quant=table.double_quant,
                bnb_4bit_compute_dtype=device.torch_dtype,
                # FSDP2 shards floating-point tensors only; the stored bytes are the same
                bnb_4bit_quant_storage=device.weight_dtype if processes.sharding_strategy() == "fsdp2" else torch.uint8,
            )
        case "int8":
            config = BitsAndBytesConfig(load_in_8bit=True)
        case "none":
            return {}
        case never:
            assert_never(never)
    return {"quantization_config": config}


def disable_dropout(model: PreTrainedModel) -> dict[str, float]:
    """Switch off what the base does in training mode alone: dropout, layer drop and router noise; returns what was on.

    Only LoRA's own dropout may tell the policy from its reference. Some layers have nn.Dropout, others read a number of
    theirs or of the config; the config on disk is not touched.
    """
    was_on: dict[str, float] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            was_on |= {"dropout": module.p} if module.p else {}
            module.p = 0.0
        was_on |= _zero_rates(vars(module))
        # a router's noise stands in for its threshold in evaluation mode too (Phi-MoE), so it keeps its value
        if noise := {name: value for name, value in vars(module).items() if "jitter" in name and type(value) is float}:
            was_on |= {name: value for name, value in noise.items() if value and not hasattr(module, "stays_in_eval")}
            module.stays_in_eval = True
            module.train = partial(_train_children, module)
            module.training = False
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        was_on |= _zero_rates(vars(config))
        if getattr(config, "altup_coef_clip", None) is not None:  # Gemma 3n would clip weights of the base in place
            vars(config)["altup_coef_clip"] = None  # its dataclass takes floats alone
    return was_on


def _train_children(module: nn.Module, mode: bool = True) -> nn.Module:
    """What `module.train` does to its children; the module itself stays in evaluation mode."""
    for child in module.children():
        child.train(mode)
    return module


def _zero_rates(values: dict[str, Any]) -> dict[str, float]:
    """Set the numbers of `values` that are rates of dropout to 0; returns those that were not."""
    rates = {
        name: value
        for name, value in values.items()
        if type(value) is float and value and "drop" in name and not name.startswith("_")
    }
    values |= dict.fromkeys(rates, 0.0)
    return rates


def store_embeddings(model: PreTrainedModel, device: Device) -> None:
    """Store input embeddings and output head in `embedding_dtype`; embeddings still return `weight_dtype`."""
    if device.embedding_dtype == device.weight_dtype:
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embeddings) is nn.Embedding:  # subclasses compute with their weight, for instance scale it
        embeddings.weight.data = embeddings.weight.data.to(device.embedding_dtype)
        embeddings.register_forward_hook(CastOutput(device.weight_dtype))
    if type(head) is nn.Linear:
        head.weight.data = head.weight.data.to(device.embedding_dtype)
