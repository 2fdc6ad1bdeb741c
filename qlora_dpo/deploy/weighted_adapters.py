"""Combines several adapters of one base, each with a weight; their delta weights are added exactly."""

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
    """The weight of each adapter from the comma-separated `text`; raises RecipeError if it is no list of numbers."""
    if text is None:
        if len(folders) > 1:
            example = ",".join(f"{1 / len(folders):.2g}" for _ in folders)
            raise RecipeError(f"{len(folders)} adapters need --weights, a number for each, such as {example}")
        return [1.0]
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(folders) or not all(map(math.isfinite, weights)):
        raise RecipeError(f"--weights {text}: is not {len(folders)} numbers with commas between, one for each adapter")
    return weights


def add_weighted_adapters(opened: OpenedModel, first: Path, others: Sequence[Path], weights: Sequence[float]) -> None:
    """Load `others` beside the adapter of `opened`, and activate the weighted sum of all delta weights.

    The base is not weighted, so the weights need not sum to 1. Raises ModelError if an adapter has another base, or is
    more than a sum of linear weights.
    """
    names = ["default", *(f"other{number}" for number in range(1, len(others) + 1))]
    model: Any = opened.model
    for name, folder in zip(names[1:], others, strict=True):
        _check_same_base(opened, first, folder)
        _load_adapter(model, name, folder)
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
    """The name of a merged model of these adapters in its card."""
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
    first_table = read_run_metadata(first)[0]
    for key in ("quantization", "double_quant"):
        if getattr(table, key) != getattr(first_table, key):
            raise ModelError(
                f"{folder}: was trained with model.{key} = {json.dumps(getattr(table, key))} and {first} with "
                f"{json.dumps(getattr(first_table, key))}; only adapters of one base can be added up"
            )
    template, other = ((metadata or {}).get("tokenizer", {}).get("template") for metadata in (opened.run, run))
    if template and other and template != other:
        raise ModelError(f"{folder}: was trained with another chat template than {first}; they cannot be added up")


def _load_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Load another adapter under `name`; check that it is undamaged and that all its tensors were loaded."""
    if (folder / MANIFEST).is_file() and (damaged := find_damage(folder, required=ADAPTER_SAFE_WEIGHTS_NAME)):
        raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or train again with --resume")
    try:
        with safe_open(folder / ADAPTER_SAFE_WEIGHTS_NAME, framework="pt") as file:
            saved = set(file.keys())
        model.load_adapter(str(folder), name)
    except (FileNotFoundError, SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = sanitize_text((str(error).splitlines() or [""])[0])
        raise ModelError(f"{folder}: the adapter cannot be attached to its base: {first_line}") from error
    placed = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if misplaced := saved ^ set(placed):
        raise ModelError(
            f"{folder}: {len(misplaced)} tensors do not fit the base, for example {sanitize_text(min(misplaced))}"
        )
