"""Saves adapters in PEFT's format, and opens adapters, model folders and hub models."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qlora_dpo.adapter_weights import attach_adapter, check_undamaged
from qlora_dpo.errors import ModelError, RecipeError, RunError
from qlora_dpo.files import atomic_write
from qlora_dpo.manifest import MANIFEST, write_manifest
from qlora_dpo.model import base, device, sources
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import nonfinite_names
from qlora_dpo.model.memory import cache_at_first_use_if_fits
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, find_model_folder


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
    table: ModelTable | None = None
    """How an adapter's base is loaded; None for a full model."""
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


def open_model(target: str | None, dtype: str = "auto", base_model: str | None = None) -> OpenedModel:
    """Open an adapter folder, a model folder or a hub name; None opens the newest adapter.

    `base_model` is where an adapter's base lies now, if that is not where the adapter says. Raises RecipeError if
    `target` does not exist, ModelError if it cannot be loaded or does not fit its base.
    """
    folder = find_model_folder(target)
    if folder is None:
        return _open_from_hub(str(target), dtype, base_model)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return open_adapter(folder, dtype, base_model)
    _refuse_base_model(target, base_model)
    return _open_dense(ModelTable(name=str(folder.resolve()), quantization="none"), dtype, folder)


def _open_from_hub(name: str, dtype: str, base_model: str | None) -> OpenedModel:
    """Open a model from a hub, or an adapter from a hub with its base."""
    folder = sources.download_model(name, also=["resolved.toml"])
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        _refuse_base_model(name, base_model)
        return _open_dense(ModelTable(name=name, revision=folder.name, quantization="none"), dtype, None)
    opened = open_adapter(folder, dtype, base_model)
    opened.folder = Path(name)  # the folder in the cache is named by a hash
    return opened


def _refuse_base_model(target: str | None, base_model: str | None) -> None:
    if base_model is not None:
        raise RecipeError(f"--base-model: {target} is a full model, which has no base; leave --base-model out")


def open_adapter(
    folder: Path, dtype: str = "auto", base_model: str | None = None, *, cache_dense: bool = True
) -> OpenedModel:
    """Open the adapter of `folder` on the base it was trained on; raises ModelError if either has changed.

    With `cache_dense`, a quantized base is dequantized once, if memory allows, rather than for each token.
    """
    saved = sources.find_base(folder, base_model)
    table, source, run = saved.table, saved.source, saved.run
    selected = device.select_device(dtype)  # type: ignore[arg-type]
    check_undamaged(folder)
    model = base.load_base(source, table, selected)
    if cache_dense:
        cache_at_first_use_if_fits(model, selected)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(ModelSource(source.name, folder if has_tokenizer else source.folder))
    # The template's fingerprint only: another release of transformers may build the tokenizer differently
    template = (run or {}).get("tokenizer", {}).get("template")
    if template and template != base.template_fingerprint(tokenizer):
        raise ModelError(
            f"{folder}: its chat template is another than it was trained with; take chat_template.jinja from a backup"
        )
    return OpenedModel(attach_adapter(model, folder), tokenizer, selected, source, folder, run, saved.recipe, table)


def _open_dense(table: ModelTable, dtype: str, folder: Path | None) -> OpenedModel:
    selected = device.select_device(dtype)  # type: ignore[arg-type]
    source = sources.fetch_model(table)
    return OpenedModel(base.load_base(source, table, selected), load_tokenizer(source), selected, source, folder)
