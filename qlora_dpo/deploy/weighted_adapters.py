"""Several adapters of one base at once, each with a weight: their updates are added up exactly."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.deploy.merged_weights import changed_layers, is_dora, modules_to_save_tensors
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.manifest import MANIFEST, find_damage
from qlora_dpo.model import sources
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, read_run_metadata


def parse_weights(folders: Sequence[Path], text: str | None) -> list[float]:
    """One weight for each of `folders`, as a comma-separated `text` gives them; raise RecipeError if it does not."""
    if text is None:
        if len(folders) > 1:
            example = ",".join(f"{1 / len(folders):.2g}" for _ in folders)
            raise RecipeError(f"{len(folders)} adapters need --weights, a number for each, such as {example}")
        return [1.0]
    try:
        weights = [float(each) for each in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(folders) or not all(map(math.isfinite, weights)):
        raise RecipeError(f"--weights {text}: is not {len(folders)} numbers with commas between, one for each adapter")
    return weights


def add_weighted_adapters(opened: OpenedModel, first: Path, others: Sequence[Path], weights: Sequence[float]) -> None:
    """Load `others` beside the adapter of `opened`, and let the model answer with the weighted sum of all updates.

    The base is never added up, so the weights need not sum to 1. Raises ModelError if an adapter has another base, or
    does more than add to linear weights.
    """
    names = ["default", *(f"other{number}" for number in range(1, len(others) + 1))]
    model: Any = opened.model
    for name, folder in zip(names[1:], others, strict=True):
        _check_same_base(opened, first, folder)
        _load(model, name, folder)
    if len(names) > 1:
        model.base_model.set_adapter(names)
        model.requires_grad_(False)
    layers = changed_layers(model).values()
    if weights != [1.0] and any(map(is_dora, layers)):
        raise ModelError("an adapter with DoRA is no sum and cannot be weighed; merge it by itself, without --weights")
    if weights != [1.0] and modules_to_save_tensors(model):
        raise ModelError("an adapter with modules_to_save cannot be weighed; merge it by itself, without --weights")
    for layer in layers:
        if isinstance(layer, LoraLayer):
            for name, weight in zip(names, weights, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= weight


def weighted_name(folders: Sequence[Path], weights: Sequence[float]) -> str:
    """What a merged model of these adapters is called in its card."""
    names = [folder.resolve().name for folder in folders]
    if list(weights) == [1.0]:
        return names[0]
    return " + ".join(f"{weight:g} x {name}" for weight, name in zip(weights, names, strict=True))


def _check_same_base(opened: OpenedModel, first: Path, folder: Path) -> None:
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise RecipeError(f"{folder}: has no {ADAPTER_CONFIG_NAME}; name the adapter folder of a finished run")
    table, run, _ = read_run_metadata(folder)
    if sources.fetch_model(table).fingerprint != opened.source.fingerprint:
        raise ModelError(f"{folder}: has another base than {first}; only adapters of one base can be added up")
    own = read_run_metadata(first)[0]
    for key in ("quantization", "double_quant"):
        if getattr(table, key) != getattr(own, key):
            raise ModelError(
                f"{folder}: was trained with model.{key} = {json.dumps(getattr(table, key))} and {first} with "
                f"{json.dumps(getattr(own, key))}; only adapters of one base can be added up"
            )
    template, other = ((each or {}).get("tokenizer", {}).get("template") for each in (opened.run, run))
    if template and other and template != other:
        raise ModelError(f"{folder}: was trained with another chat template than {first}; they cannot be added up")


def _load(model: PeftModel, name: str, folder: Path) -> None:
    """Load one more adapter under `name`, and check that it is undamaged and that every tensor found its place."""
    if (folder / MANIFEST).is_file() and (damaged := find_damage(folder, required=ADAPTER_SAFE_WEIGHTS_NAME)):
        raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or train again with --resume")
    try:
        with safe_open(folder / ADAPTER_SAFE_WEIGHTS_NAME, framework="pt") as file:
            saved = set(file.keys())
        model.load_adapter(str(folder), name)
    except (FileNotFoundError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        words = sanitize_text((str(error).splitlines() or [""])[0])
        raise ModelError(f"{folder}: the adapter cannot be attached to its base: {words}") from error
    placed = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if misplaced := saved ^ set(placed):
        raise ModelError(
            f"{folder}: {len(misplaced)} tensors do not fit the base, for example {sanitize_text(min(misplaced))}"
        )
