"""An adapter on disk from which a run starts or which it takes as its reference: found, checked, loaded."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.files import file_sha256
from qlora_dpo.manifest import MANIFEST, find_damage
from qlora_dpo.model import dora, modules_to_save
from qlora_dpo.model.lora import nonfinite_names
from qlora_dpo.model.sources import ModelSource, model_fingerprint
from qlora_dpo.recipe.model import LoraTable, ModelTable
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

EFFECT_DEFAULTS: dict[str, Any] = {
    "r": None,
    "lora_alpha": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}
"""Keys of adapter_config.json that change what the tensors compute, with PEFT's defaults."""
UNSUPPORTED_DEFAULTS: dict[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "use_qalora": False,
    "fan_in_fan_out": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
}
"""Keys of adapter_config.json that [lora] does not have, with the value that switches each feature off."""
NOT_IN_DELTA_WEIGHTS = {"layer_replication": "layer_replication, another number of layers"}
"""Those of the unsupported features that change more than the values of the base's tensors, in words."""
IDENTITY_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base unchanged. PiSSA and its kin subtract their initial B A from it."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder that matches the recipe."""

    folder: Path
    fingerprint: str
    """SHA-256 over its tensors and the config keys that scale them."""
    note: str = ""
    """A sentence on what could not be checked."""


def find_saved_adapter(folder: Path, key: str, lora: LoraTable) -> SavedAdapter:
    """The adapter in `folder`, checked against the `lora` table; `key` is the recipe key that names the folder.

    Raises RecipeError if there is no adapter or it does not match the table, ModelError if it is damaged.
    """
    if not (folder / ADAPTER_CONFIG_NAME).is_file() or not (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        missing = (
            f"has no {ADAPTER_CONFIG_NAME} and {ADAPTER_SAFE_WEIGHTS_NAME}" if folder.is_dir() else "is not a folder"
        )
        raise RecipeError(f"{key}: {folder} {missing}; name the folder of a finished run or of a PEFT adapter")
    if (folder / MANIFEST).is_file() and (damaged := find_damage(folder, required=ADAPTER_SAFE_WEIGHTS_NAME)):
        raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or train it again")
    config = _read_json(folder / ADAPTER_CONFIG_NAME)
    _check_plain_lora(config, folder, key)
    effect = {name: config.get(name, default) or default for name, default in EFFECT_DEFAULTS.items()}
    for name, saved_value in effect.items():
        recipe_value = getattr(lora, name)
        if recipe_value != saved_value:
            raise RecipeError(
                f"lora.{name} is {json.dumps(recipe_value)}, and {folder} was made with {json.dumps(saved_value)}; "
                f"write that in [lora], or leave {key} out"
            )
    effect_json = json.dumps(list(effect.values()), sort_keys=True)
    content = f"{effect_json} {file_sha256(folder / ADAPTER_SAFE_WEIGHTS_NAME)}"
    return SavedAdapter(folder, hashlib.sha256(content.encode()).hexdigest())


def check_base_matches(saved: SavedAdapter, table: ModelTable, source: ModelSource, template: str) -> SavedAdapter:
    """Check that `saved` was trained on the base in `source`; returns it, with a note if its base is not recorded.

    `template` is the fingerprint of this run's chat template. Raises ModelError for another base, quantization or
    template.
    """
    folder = saved.folder
    if not (folder / "run.json").is_file():
        return _check_base_by_name(saved, source)
    run = _read_json(folder / "run.json")
    base = run.get("base", {})
    if base.get("fingerprint") != source.fingerprint:
        raise ModelError(
            f"{folder}: was trained on other weights ({sanitize_text(str(base.get('name')))}) than model.name = "
            f'"{source.name}" has; name its base there'
        )
    for key in ("quantization", "double_quant"):
        recipe_value = getattr(table, key)
        if base.get(key, recipe_value) != recipe_value and (
            key == "quantization" or table.quantization in ("nf4", "fp4")
        ):
            raise ModelError(
                f"{folder}: was trained with model.{key} = {json.dumps(base[key])}, and the recipe says "
                f"{json.dumps(recipe_value)}; write what it was trained with"
            )
    if run.get("tokenizer", {}).get("template", template) != template:
        raise ModelError(f"{folder}: was trained with another chat template than the base has now; put that back")
    return saved


def _check_base_by_name(saved: SavedAdapter, source: ModelSource) -> SavedAdapter:
    """Check an adapter of another tool, whose config records its base by name only."""
    name = _read_json(saved.folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    if isinstance(name, str) and Path(name).is_dir():
        if model_fingerprint(Path(name)) == source.fingerprint:
            return saved
    elif name == source.hub_id and name is not None:
        return saved
    elif source.hub_id is None or name is None or str(name).count("/") != 1:
        note = f"{saved.folder}: does not say by fingerprint what base it was made for; taken as made for {source.name}"
        return SavedAdapter(saved.folder, saved.fingerprint, note)
    raise ModelError(
        f'{saved.folder}: was made for {sanitize_text(str(name))}, and model.name is "{source.name}"; name its base '
        f"there, or correct base_model_name_or_path in its {ADAPTER_CONFIG_NAME}"
    )


def load_adapter_weights(model: PeftModel, saved: SavedAdapter) -> None:
    """Copy the tensors of `saved` into the model's adapter, in float32.

    Raises RecipeError if they belong to other layers, ModelError if they cannot be read, have another shape or are not
    finite.
    """
    try:
        tensors = load_file(saved.folder / ADAPTER_SAFE_WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{saved.folder}: its {ADAPTER_SAFE_WEIGHTS_NAME} cannot be read; take it from a backup"
        ) from error
    if nonfinite := nonfinite_names(tensors):
        raise ModelError(
            f"{saved.folder}: {sanitize_text(nonfinite[0])} is not finite; train it again with a lower rate"
        )
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if unmatched := sorted(expected.keys() ^ tensors.keys()):
        which = "the adapter does not have" if unmatched[0] in expected else "the recipe does not adapt"
        raise RecipeError(
            f"[lora] names other modules than {saved.folder} has: {sanitize_text(unmatched[0])} is one that {which}; "
            "write its target_modules, layers and modules_to_save there"
        )
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise ModelError(
                f"{saved.folder}: {sanitize_text(name)} has the shape {list(tensors[name].shape)}, and this base needs "
                f"{list(tensor.shape)}; name the base that it was made for"
            )
    set_peft_model_state_dict(model, {name: tensor.to(torch.float32) for name, tensor in tensors.items()})


@contextmanager
def opened_by_peft(base: PreTrainedModel, saved: SavedAdapter) -> Iterator[nn.Module]:
    """Inside the context, `base` with the adapter as PEFT itself loads it; afterwards `base` is unchanged."""
    try:
        opened = PeftModel.from_pretrained(base, saved.folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{saved.folder}: the adapter cannot be attached to its base: {sanitize_text(reason)}"
        ) from error
    dora.use_exact_norms(opened)
    try:
        yield opened.eval()
    finally:
        modules_to_save.unload(opened)


def beyond_delta_weights(config: Mapping[str, Any]) -> str:
    """Why an adapter is more than a change of the base's tensors; empty if it is not.

    `config` is the content of its adapter_config.json.
    """
    if (peft_type := _peft_type(config)) != "LORA":
        return f"it is of PEFT's type {peft_type}, not LORA"
    for name, feature in NOT_IN_DELTA_WEIGHTS.items():
        if _is_used(config, name):
            return f"it has {feature.format_map(config)}"
    if (init := config.get("init_lora_weights", True)) not in IDENTITY_INITS:
        return f'it has init_lora_weights = "{init}", which changes the base itself'
    return ""


def _check_plain_lora(config: Mapping[str, Any], folder: Path, key: str) -> None:
    """Raise RecipeError if [lora] cannot describe an adapter with this config."""
    if (peft_type := _peft_type(config)) != "LORA":
        raise RecipeError(f"{key}: {folder} is of PEFT's type {sanitize_text(peft_type)}, not LORA")
    for name in UNSUPPORTED_DEFAULTS:
        if _is_used(config, name):
            raise RecipeError(
                f"{key}: {folder} has {name}, which [lora] has no key for; name an adapter that is plain LoRA"
            )
    if config.get("init_lora_weights", True) not in IDENTITY_INITS:
        raise RecipeError(
            f"{key}: {folder} has init_lora_weights = {json.dumps(config['init_lora_weights'])}, which changes the "
            "base itself; convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _peft_type(config: Mapping[str, Any]) -> str:
    peft_type = config.get("peft_type")
    return str(getattr(peft_type, "value", peft_type))  # a string in the file, an enum in PEFT's own config


def _is_used(config: Mapping[str, Any], name: str) -> bool:
    """True if the config switches this feature on."""
    return bool((config.get(name) or UNSUPPORTED_DEFAULTS[name]) != UNSUPPORTED_DEFAULTS[name])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: is damaged ({type(error).__name__}); take it from a backup") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: is damaged (it holds no table); take it from a backup")
    return values
