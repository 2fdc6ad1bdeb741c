"""Combines several adapters of one base, each with a weight; their delta weights are added exactly."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.adapter_weights import add_adapter, check_undamaged
from qlora_dpo.deploy.merged_weights import adapted_layers, has_whole_tensors, is_dora
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model.sources import find_base
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME


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


def add_weighted_adapters(
    opened: OpenedModel,
    first: Path,
    others: Sequence[Path],
    weights: Sequence[float],
    base_model: str | None = None,
) -> None:
    """Load `others` beside the adapter of `opened`, and activate the weighted sum of all delta weights.

    The base is not weighted, so the weights need not sum to 1. Raises ModelError if an adapter has another base, or is
    more than a sum of linear weights.
    """
    names = ["default", *(f"other{number}" for number in range(1, len(others) + 1))]
    model: Any = opened.model
    for name, folder in zip(names[1:], others, strict=True):
        _check_same_base(opened, first, folder, base_model)
        check_undamaged(folder)
        add_adapter(model, folder, name)
    if len(names) > 1:
        model.base_model.set_adapter(names)
        model.requires_grad_(False)
    layers = adapted_layers(model).values()
    if weights != [1.0] and any(map(is_dora, layers)):
        raise ModelError("an adapter with DoRA is no sum and cannot be weighed; merge it by itself, without --weights")
    if weights != [1.0] and has_whole_tensors(model):
        raise ModelError(
            "an adapter that holds whole tensors (modules_to_save, embeddings, biases or tokens) cannot be weighed; "
            "merge it by itself, without --weights"
        )
    for layer in layers:
        for name, weight in zip(names, weights, strict=True):
            if name in layer.scaling:
                layer.scaling[name] *= weight


def weighted_name(folders: Sequence[Path], weights: Sequence[float]) -> str:
    """The name of a merged model of these adapters in its card."""
    names = [folder.resolve().name for folder in folders]
    if list(weights) == [1.0]:
        return names[0]
    return " + ".join(f"{weight:g} x {name}" for weight, name in zip(weights, names, strict=True))


def _check_same_base(opened: OpenedModel, first: Path, folder: Path, base_model: str | None) -> None:
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise RecipeError(f"{folder}: has no {ADAPTER_CONFIG_NAME}; name the adapter folder of a finished run")
    saved = find_base(folder, base_model)
    if saved.source.fingerprint != opened.source.fingerprint:
        raise ModelError(f"{folder}: has another base than {first}; only adapters of one base can be added up")
    for key in ("quantization", "double_quant"):
        other_value, first_value = getattr(saved.table, key), getattr(opened.table, key)
        if other_value != first_value:
            raise ModelError(
                f"{folder}: was trained with model.{key} = {json.dumps(other_value)} and {first} with "
                f"{json.dumps(first_value)}; only adapters of one base can be added up"
            )
    template, other = ((metadata or {}).get("tokenizer", {}).get("template") for metadata in (opened.run, saved.run))
    if template and other and template != other:
        raise ModelError(f"{folder}: was trained with another chat template than {first}; they cannot be added up")
