"""Saves adapters in PEFT's format, and opens adapters, model folders and hub models."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import ModelError, RecipeError, RunError
from qlora_dpo.files import atomic_write
from qlora_dpo.manifest import MANIFEST, find_damage, write_manifest
from qlora_dpo.model import base, device, dora, modules_to_save, sources
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import nonfinite_names
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, newest_adapter, read_run_metadata


@dataclass
class OpenedModel:
    """A loaded model with its metadata. `run` and `recipe` are None for a model that was not trained here."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: Device
    source: ModelSource
    folder: Path | None = None
    run: dict[str, Any] | None = None
    recipe: Recipe | None = None
    name: str = ""
    """Name of a weighted sum of adapters; empty for a single one, which is called by its run or folder."""


def save_adapter(folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> None:
    """Write adapter and tokenizer in PEFT's and transformers' own formats, and a manifest of them.

    adapter_config.json is removed first and written last, and a folder without it is no adapter, so a folder never
    holds a mixture of two adapters. Raises RunError if a weight is not finite.
    """
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    if bad := nonfinite_names(weights):
        raise RunError(f"{folder}: no adapter was written, since {bad[0]} is not finite; lower train.learning_rate")
    config = model.peft_config["default"]
    config.base_model_name_or_path = source.hub_id or str(source.folder)
    config.revision = source.revision
    with TemporaryDirectory(dir=folder, prefix=".saving.") as work:
        model.save_pretrained(work, save_embedding_layers=False)
        tokenizer.save_pretrained(work)
        Path(work, "README.md").unlink(missing_ok=True)
        files = sorted(Path(work).iterdir(), key=lambda file: file.name == ADAPTER_CONFIG_NAME)
        for name in (ADAPTER_CONFIG_NAME, MANIFEST):
            (folder / name).unlink(missing_ok=True)
        for file in files:
            atomic_write(folder / file.name, file.read_bytes())
    write_manifest(folder, [folder / file.name for file in files])


def open_model(target: str | None, dtype: str = "auto") -> OpenedModel:
    """Open an adapter folder, a model folder or a hub name; None opens the newest adapter.

    Raises RecipeError if `target` does not exist, ModelError if it cannot be loaded or does not fit its base.
    """
    folder = newest_adapter() if target is None else Path(target).expanduser()
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return open_adapter(folder, dtype)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RecipeError(f"{folder}: is neither an adapter ({ADAPTER_CONFIG_NAME}) nor a model (config.json)")
        return _open_dense(ModelTable(name=str(folder.resolve()), quantization="none"), dtype, folder)
    if target is not None and target.count("/") == 1 and not target.startswith((".", "~", "/", "adapters/", "merged/")):
        return _open_from_hub(target, dtype)
    raise RecipeError(f"{target}: there is no such folder; name an adapter, a merged model or a hub model")


def _open_from_hub(name: str, dtype: str) -> OpenedModel:
    """Open a model from a hub, or an adapter from a hub with its base."""
    folder = sources.download_model(name, also=["resolved.toml"])
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        return _open_dense(ModelTable(name=name, revision=folder.name, quantization="none"), dtype, None)
    opened = open_adapter(folder, dtype)
    opened.folder = Path(name)  # the folder in the cache is named by a hash
    return opened


def open_adapter(folder: Path, dtype: str = "auto") -> OpenedModel:
    """Open the adapter of `folder` on the base it was trained on; raises ModelError if either has changed."""
    table, run, recipe = read_run_metadata(folder)
    selected = device.select_device(dtype)  # type: ignore[arg-type]
    source = sources.fetch_model(table)
    if run is not None:
        _check_base_matches(run, table, source, folder)
    if (
        (folder / MANIFEST).is_file()
        and (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file()
        and (damaged := find_damage(folder, required=ADAPTER_SAFE_WEIGHTS_NAME))
    ):
        raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or train again with --resume")
    model = base.load_base(source, table, selected)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = base.load_tokenizer(ModelSource(source.name, folder if has_tokenizer else source.folder, ""))
    # The template's fingerprint only: another release of transformers may build the tokenizer differently
    template = (run or {}).get("tokenizer", {}).get("template")
    if template and template != base.tokenizer_fingerprints(tokenizer)["template"]:
        raise ModelError(
            f"{folder}: its chat template is another than it was trained with; take chat_template.jinja from a backup"
        )
    return OpenedModel(attach_saved_adapter(model, folder), tokenizer, selected, source, folder, run, recipe)


def _check_base_matches(run: dict[str, Any], table: ModelTable, source: ModelSource, folder: Path) -> None:
    """Raise ModelError if the adapter of `run` was trained on other or differently quantized weights."""
    trained_on = run["base"]
    if source.fingerprint != trained_on["fingerprint"]:
        raise ModelError(f"{folder}: was trained on other weights of {source.name} than are there now")
    for key in ("quantization", "double_quant"):
        if trained_on.get(key, getattr(table, key)) != getattr(table, key):
            raise ModelError(
                f"{folder}: was trained with model.{key} = {json.dumps(trained_on[key])}, and its resolved.toml says "
                f"{json.dumps(getattr(table, key))}; put that back"
            )


def attach_saved_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Attach the adapter of `folder` to its base, in evaluation mode; check that all its tensors were loaded."""
    try:
        with safe_open(folder / ADAPTER_SAFE_WEIGHTS_NAME, framework="pt") as file:
            saved = set(file.keys())
        peft = PeftModel.from_pretrained(model, folder)
        _restore_modules_to_save(peft, folder)
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: has no {ADAPTER_SAFE_WEIGHTS_NAME}{_conversion_hint(folder)}") from error
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if mismatch := re.search(r"size mismatch for (\S+):", str(error)):
            raise ModelError(
                f"{folder}: was made for a base of another size: {sanitize_text(mismatch[1])} does not fit this one; "
                f"name the right base as base_model_name_or_path in {ADAPTER_CONFIG_NAME}"
            ) from error
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{folder}: the adapter cannot be attached to its base: {sanitize_text(first)}") from error
    if misplaced := saved ^ set(get_peft_model_state_dict(peft, save_embedding_layers=False)):
        raise ModelError(
            f"{folder}: {len(misplaced)} tensors do not fit the base, for example {sanitize_text(min(misplaced))}"
        )
    dora.use_exact_norms(peft)
    return peft.eval()


def _restore_modules_to_save(peft: PeftModel, folder: Path) -> None:
    """Load modules_to_save in the float32 they were trained in; PEFT rounds them to the dtype of the base."""
    trained = modules_to_save.trained_copies(peft)
    if trained:
        for module in trained.values():
            module.float()
        set_peft_model_state_dict(peft, load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME))
        modules_to_save.keep_output_dtypes(peft)


def _conversion_hint(folder: Path) -> str:
    """How to convert a pickled adapter, if there is one; pickles are never loaded here."""
    pickled = next((file.name for ending in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(ending))), None)
    if pickled is None:
        return ""
    return (
        f", and {pickled} is pickled, which can run code and is not read; if you trust it, convert it: python -c "
        f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{pickled}', weights_only=True), "
        f"'{ADAPTER_SAFE_WEIGHTS_NAME}')\" in that folder"
    )


def _open_dense(table: ModelTable, dtype: str, folder: Path | None) -> OpenedModel:
    selected = device.select_device(dtype)  # type: ignore[arg-type]
    source = sources.fetch_model(table)
    return OpenedModel(base.load_base(source, table, selected), base.load_tokenizer(source), selected, source, folder)
