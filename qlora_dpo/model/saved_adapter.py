"""An adapter on disk that a run goes on from, or compares with: found, checked against the recipe, put into a model."""

import hashlib
import json
from collections.abc import Iterator
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

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
EFFECT_DEFAULTS: dict[str, Any] = {
    "r": None,
    "lora_alpha": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
}
"""What decides an adapter's effect beside its tensors, and what PEFT takes where its config says nothing."""
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
"""What a [lora] table has no key for, at the value that is none of it."""
IDENTITY_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to draw an adapter that leave the base as it is. After PiSSA and its kin, B A is not the whole difference."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder that fits the recipe. `note` says what could not be checked."""

    folder: Path
    fingerprint: str
    """SHA-256 over its tensors and what scales them."""
    note: str = ""


def find_saved_adapter(folder: Path, key: str, lora: LoraTable) -> SavedAdapter:
    """The adapter in `folder`, which the recipe's `key` names and which must have the shape that `lora` says.

    Raises RecipeError if there is none or it has another shape, ModelError if it is damaged.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        found = "is no folder" if not folder.is_dir() else f"has no {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        raise RecipeError(f"{key}: {folder} {found}; name the folder of a finished run or of a PEFT adapter")
    if (folder / MANIFEST).is_file() and (damaged := find_damage(folder, required=ADAPTER_WEIGHTS)):
        raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or train it again")
    config = _read_json(folder / ADAPTER_CONFIG)
    _check_plain_lora(config, folder, key)
    for name, otherwise in EFFECT_DEFAULTS.items():
        asked, found = getattr(lora, name), config.get(name, otherwise) or otherwise
        if asked != found:
            raise RecipeError(
                f"lora.{name} is {json.dumps(asked)}, and {folder} was made with {json.dumps(found)}; write that in "
                f"[lora], or leave {key} out"
            )
    scaled = json.dumps(
        [config.get(name, otherwise) or otherwise for name, otherwise in EFFECT_DEFAULTS.items()], sort_keys=True
    )
    content = hashlib.sha256(f"{scaled} {file_sha256(folder / ADAPTER_WEIGHTS)}".encode()).hexdigest()
    return SavedAdapter(folder, content)


def check_base_matches(saved: SavedAdapter, table: ModelTable, source: ModelSource, template: str) -> SavedAdapter:
    """`saved`, with a note if it does not say what it was made for; raise ModelError if it is another base.

    `template` is the fingerprint of the chat template that this run trains with.
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
        asked = getattr(table, key)
        if base.get(key, asked) != asked and (key == "quantization" or table.quantization in ("nf4", "fp4")):
            raise ModelError(
                f"{folder}: was trained with model.{key} = {json.dumps(base[key])}, and the recipe says "
                f"{json.dumps(asked)}; write what it was trained with"
            )
    if run.get("tokenizer", {}).get("template", template) != template:
        raise ModelError(f"{folder}: was trained with another chat template than the base has now; put that back")
    return saved


def _check_base_by_name(saved: SavedAdapter, source: ModelSource) -> SavedAdapter:
    """For an adapter that was made elsewhere and knows its base by name only."""
    name = _read_json(saved.folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if isinstance(name, str) and Path(name).is_dir():
        if model_fingerprint(Path(name)) == source.fingerprint:
            return saved
    elif name == source.hub_id and name is not None:
        return saved
    elif source.hub_id is None or name is None or str(name).count("/") != 1:
        note = f"{saved.folder}: does not say by fingerprint what base it was made for; taken as made for {source.name}"
        return SavedAdapter(saved.folder, saved.fingerprint, note)
    raise ModelError(
        f'{saved.folder}: was made for {sanitize_text(str(name))}, and model.name is "{source.name}"; name its base there, '
        f"or correct base_model_name_or_path in its {ADAPTER_CONFIG}"
    )


def load_adapter_weights(model: PeftModel, saved: SavedAdapter) -> None:
    """Give the model's adapter the tensors of `saved`; raise RecipeError if they are not of the same layers."""
    try:
        tensors = load_file(saved.folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{saved.folder}: its {ADAPTER_WEIGHTS} cannot be read; take it from a backup") from error
    if bad := nonfinite_names(tensors):
        raise ModelError(f"{saved.folder}: {sanitize_text(bad[0])} is not finite; train it again with a lower rate")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    if odd := sorted(own.keys() ^ tensors.keys()):
        which = "the adapter does not have" if odd[0] in own else "the recipe does not adapt"
        raise RecipeError(
            f"[lora] names other modules than {saved.folder} has: {sanitize_text(odd[0])} is one that {which}; write its "
            "target_modules, layers and modules_to_save there"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ModelError(
                f"{saved.folder}: {sanitize_text(name)} has the shape {list(tensors[name].shape)}, and this base needs "
                f"{list(tensor.shape)}; name the base that it was made for"
            )
    set_peft_model_state_dict(model, {name: tensor.to(torch.float32) for name, tensor in tensors.items()})


@contextmanager
def opened_by_peft(base: PreTrainedModel, saved: SavedAdapter) -> Iterator[nn.Module]:
    """`base` with the adapter as PEFT itself opens it; afterwards `base` is as it was."""
    try:
        opened = PeftModel.from_pretrained(base, saved.folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{saved.folder}: the adapter cannot be attached to its base: {sanitize_text(first)}"
        ) from error
    dora.use_exact_norms(opened)
    try:
        yield opened.eval()
    finally:
        modules_to_save.unload(opened)


def _check_plain_lora(config: dict[str, Any], folder: Path, key: str) -> None:
    if config.get("peft_type") != "LORA":
        raise RecipeError(f"{key}: {folder} is of PEFT's type {sanitize_text(str(config.get('peft_type')))}, not LORA")
    for name, none in UNSUPPORTED_DEFAULTS.items():
        if (config.get(name) or none) != none:
            raise RecipeError(
                f"{key}: {folder} has {name}, which [lora] has no key for; name an adapter that is plain LoRA"
            )
    if config.get("init_lora_weights", True) not in IDENTITY_INITS:
        raise RecipeError(
            f"{key}: {folder} has init_lora_weights = {json.dumps(config['init_lora_weights'])}, which changes the "
            "base itself; convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: is damaged ({type(error).__name__}); take it from a backup") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: is damaged (it holds no table); take it from a backup")
    return values
