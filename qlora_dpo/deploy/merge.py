"""Writes adapter and base as one full model: summed in float32, rounded once, and checked before it is kept."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit, Linear8bitLt, LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_dpo.adapter import CONFIG, Opened, open_adapter
from qlora_dpo.deploy.card import merged_card, public_name
from qlora_dpo.errors import ModelError, RecipeError, RunError
from qlora_dpo.files import whole_folder, write_json, write_whole
from qlora_dpo.manifest import write_manifest
from qlora_dpo.model import copies, device
from qlora_dpo.model.base import dequantized, quantization_of, quantized_layers
from qlora_dpo.recipe_model import Quantization

Onto = Literal["trained", "original"]
Dtype = Literal["bf16", "fp16", "fp32"]
Check = Callable[[Path], Mapping[str, Any]]
"""Loads the model that was written to a folder and returns figures; `kl`, in nats per token, is among them."""

MOST_KL = 0.05
"""Nats per token. Rounding costs 1e-4 in bf16, what 16-bit arithmetic adds on a GPU stays below 0.01, and every wrong
way that was measured costs 0.1 and more: above this the files are not the model that was trained."""

SHARD = "2GB"


@dataclass(frozen=True)
class Merged:
    """What was written, and how it compares with the model that was trained."""

    folder: Path
    onto: Onto
    dtype: Dtype
    bytes: int
    shards: int
    quantization: Quantization
    figures: Mapping[str, Any]


def claim(output: Path) -> None:
    """Raise RunError if there is anything at `output` already; an empty folder may be filled."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: is there already and is not overwritten; name another folder with -o DIR")


def open_for_merge(folder: Path) -> Opened:
    """Open base and adapter as they were trained; on a CPU they compute in float32.

    Raises RecipeError if `folder` is no adapter, ModelError for an adapter that a full model cannot hold exactly.
    """
    if not (folder / CONFIG).is_file():
        found = "has no " + CONFIG if folder.is_dir() else "there is no such folder"
        raise RecipeError(f"{folder}: {found}; name the adapter folder of a finished run")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: its {CONFIG} is damaged ({type(error).__name__})") from error
    if reason := _beyond_weights(config):
        raise ModelError(f"{folder}: cannot be merged: {reason}")
    opened = open_adapter(folder, "fp32" if device.choose().type == "cpu" else "auto")
    for name, layer in changed_layers(opened.model).items():
        if reason := _not_a_sum(layer):
            raise ModelError(f"{folder}: cannot be merged: {name} {reason}")
    head = opened.model.get_output_embeddings()
    if isinstance(head, LoraLayer) and opened.model.config.tie_word_embeddings:
        raise ModelError(f"{folder}: cannot be merged: it adapts the output head, which is tied to the embeddings")
    ends = (opened.model.get_input_embeddings(), head)
    if opened.model.config.tie_word_embeddings and any(isinstance(end, ModulesToSaveWrapper) for end in ends):
        raise ModelError(f"{folder}: cannot be merged: it trained embeddings or head, which are tied to each other")
    return opened


def merge(opened: Opened, output: Path, onto: Onto, dtype: Dtype, check: Check) -> Merged:
    """Write the full model of `opened` to `output`, let `check` load it there, and keep it only if that went well.

    Raises RunError if there is something at `output`, ModelError if the written model is not the trained one.
    """
    claim(output)
    quantization = quantization_of(opened.model)
    with whole_folder(output) as temporary:
        write_model(opened, temporary, onto, device.TORCH_DTYPES[dtype])
        weights = list(temporary.glob("*.safetensors"))
        figures = dict(check(temporary))
        _agrees(figures["kl"], onto, dtype)
        record = {
            "adapter": _adapter_name(opened),
            "base": {
                "name": public_name(opened.source.name),
                "hub_id": opened.source.hub_id,
                "revision": opened.source.revision,
                "fingerprint": opened.source.fingerprint,
                "note": opened.source.note,
                "quantization": quantization,
            },
            "onto": onto,
            "dtype": dtype,
            "bytes": sum(file.stat().st_size for file in weights),
            "shards": len(weights),
            **figures,
        }
        write_json(temporary / "merge.json", record)
        write_whole(temporary / "README.md", merged_card(record))
        write_manifest(temporary, [file for file in temporary.iterdir() if file.is_file()])
    return Merged(output, onto, dtype, record["bytes"], record["shards"], quantization, figures)


def write_model(opened: Opened, folder: Path, onto: Onto, dtype: torch.dtype) -> None:
    """Write weights, config, generation config, tokenizer and chat template.

    Everything that is neither a changed linear layer nor a trained copy comes from the base's files: bitsandbytes casts
    the bias of a 4-bit layer to the compute dtype in its first forward, so the opened model's biases are not taken.
    """
    # the sum needs the original weights in float32; without them, loading in the target dtype takes half the memory
    full = _load_original(opened, torch.float32 if onto == "original" else dtype)
    for name, layer in changed_layers(opened.model).items():
        place = full.get_submodule(name).weight
        base = place.float() if onto == "original" else trained_weight(layer)
        if base.shape != place.shape:
            raise ModelError(f"{opened.source.name}: {name} has another shape quantized than in the files; not merged")
        place.data = (summed(layer, base).cpu()).to(dtype)
    for name, copy in copies.whole(opened.model).items():
        for own, parameter in copy.named_parameters():
            full.get_submodule(name).get_parameter(own).data = parameter.detach().cpu().to(dtype)
    full.to(dtype)
    for name, parameter in full.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ModelError(f"{name} has values that {dtype} cannot hold or that are not finite; try --dtype bf16")
    full.config._name_or_path = ""
    full.save_pretrained(folder, max_shard_size=SHARD)
    opened.tokenizer.save_pretrained(folder)


def changed_layers(model: Any) -> dict[str, nn.Module]:
    """Linear layers whose weight is not that of the base's files, by name in the base: adapted, quantized or both."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    quantized = {name.removesuffix(".base_layer"): layer for name, layer in quantized_layers(base).items()}
    return quantized | adapted


@torch.no_grad()
def trained_weight(layer: nn.Module) -> Tensor:
    """The weight (out, in) that the adapter was trained against, in float32."""
    inner: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    return inner.weight.detach().float() if quantization_of(inner) == "none" else dequantized(inner)


@torch.no_grad()
def delta(layer: Any) -> Tensor:
    """What the adapter adds to the layer's weight: scaling * B A, in float32; a zero for a layer without adapter.

    PEFT computes it in the dtype of A and B, which it loads as float32.
    """
    if not isinstance(layer, LoraLayer):
        return torch.zeros(())
    added: Tensor = layer.get_delta_weight("default")
    return added.float()


@torch.no_grad()
def summed(layer: Any, base: Tensor) -> Tensor:
    """The layer's whole weight on top of `base`, (out, in) in float32.

    DoRA (Liu et al. 2024, eq. 5) brings each row of the sum to a length of its own.
    """
    whole = base + delta(layer).to(base.device)
    if not _is_dora(layer):
        return whole
    length: Tensor = layer.lora_magnitude_vector["default"].weight.detach().float().to(base.device)
    scaled: Tensor = whole * (length / whole.norm(dim=1))[:, None]
    return scaled


def _is_dora(layer: Any) -> bool:
    return isinstance(layer, LoraLayer) and bool(layer.use_dora.get("default"))


def _load_original(opened: Opened, dtype: torch.dtype) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(opened.source.folder, dtype=dtype, trust_remote_code=False)
        return model.requires_grad_(False).eval()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{opened.source.name}: cannot be loaded: {str(error).splitlines()[0]}") from error


def _beyond_weights(config: Any) -> str:
    """Why the adapter is more than a change of linear weights; empty if it is not."""
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return f"it is of PEFT's type {getattr(config.peft_type, 'value', config.peft_type)}, not LORA"
    reasons = {
        "lora_bias, which the base has no place for": config.lora_bias,
        f'bias = "{config.bias}", trained biases': config.bias != "none",
        "trainable_token_indices, trained embeddings": config.trainable_token_indices,
        "layer_replication, another number of layers": config.layer_replication,
        # PiSSA and its kin start by taking something out of the base, so B A is not the whole difference
        f'init_lora_weights = "{config.init_lora_weights}", which changes the base itself': config.init_lora_weights
        not in (True, False, "gaussian", "orthogonal", "eva"),
    }
    return next((f"it has {words}" for words, present in reasons.items() if present), "")


def _not_a_sum(layer: nn.Module) -> str:
    """Why the layer's weight is not base + scaling * B A; empty if it is."""
    if not isinstance(layer, LoraLayer):
        return ""
    if not isinstance(layer, LoraLinear | Linear4bit | Linear8bitLt):
        return f"is no linear layer but {type(layer).__name__}"
    if layer.lora_variant and not _is_dora(layer):
        return f"uses a variant of LoRA ({type(next(iter(layer.lora_variant.values()))).__name__})"
    return ""


def _agrees(kl: float, onto: Onto, dtype: Dtype) -> None:
    if not math.isfinite(kl):
        raise ModelError(f"the merged model gives no finite log-probabilities in {dtype}; nothing was kept")
    if onto == "trained" and kl > MOST_KL:
        raise ModelError(
            f"the merged model is not the trained one: KL {kl:.3g} nats per token, at most {MOST_KL} is rounding; "
            "nothing was kept"
        )


def _adapter_name(opened: Opened) -> str:
    folder = opened.folder.resolve().name if opened.folder else "adapter"
    return str(opened.run["name"]) if opened.run else folder
