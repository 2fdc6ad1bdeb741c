"""Writes a merged model shard by shard, so that no more than one shard and one layer lie in memory beside the model."""

import errno
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.deploy.merge_card import BaseWeights
from qlora_dpo.deploy.merged_weights import add_delta_weight, base_layer_weight, changed_layers, modules_to_save_tensors
from qlora_dpo.errors import ModelError
from qlora_dpo.files import write_json
from qlora_dpo.model.decoder_layers import unwrap_peft

SHARD = "2GB"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in one of the base's files."""

    file: Path
    shape: tuple[int, ...]
    itemsize: int | None
    """Bytes of an element of a plain floating-point type; None for any other, which is copied as it is."""
    bytes: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Bytes that it takes in a file of `dtype`."""
        return self.bytes if self.itemsize is None else self.elements * dtype.itemsize


def write_model(opened: OpenedModel, folder: Path, onto: BaseWeights, dtype: torch.dtype) -> None:
    """Write weights, config, generation config, tokenizer and chat template.

    Everything that is neither a changed linear layer nor a trained copy comes from the base's files: bitsandbytes casts
    the bias of a 4-bit layer to the compute dtype in its first forward, so the opened model's biases are not taken.
    """
    folder.mkdir(exist_ok=True)
    stored = base_tensors(opened)
    if stored is None:
        _write_whole_model(opened, folder, onto, dtype)
    else:
        _write_shards(opened, stored, folder, onto, dtype)
        config: Any = AutoConfig.from_pretrained(opened.source.folder, trust_remote_code=False)
        config.dtype, config._name_or_path = dtype, ""
        config.architectures = [type(unwrap_peft(opened.model)).__name__]
        config.save_pretrained(folder)
        if (opened.source.folder / GENERATION).is_file():
            shutil.copyfile(opened.source.folder / GENERATION, folder / GENERATION)
        elif unwrap_peft(opened.model).generation_config is not None:
            unwrap_peft(opened.model).generation_config.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def base_tensors(opened: OpenedModel) -> dict[str, StoredTensor] | None:
    """The tensors of the base's files by name; None if the files name or store layers in a way of their own.

    That is so for some architectures, and for bases that are stored quantized. A second name of a tied tensor is left
    out, as transformers does.
    """
    model = unwrap_peft(opened.model)
    if getattr(AutoConfig.from_pretrained(opened.source.folder), "quantization_config", None) is not None:
        return None
    found = list_tensors(opened.source.folder)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    twice = {name: first[id(each)] for name, each in model.named_parameters(remove_duplicate=False)}
    stored = {name: each for name, each in found.items() if twice.get(name, name) not in found.keys() - {name}}
    named = {f"{name}.weight" for name in changed_layers(model)} | modules_to_save_tensors(model).keys()
    return stored if named and named <= stored.keys() else None


def largest_layer_bytes(opened: OpenedModel, stored: Mapping[str, StoredTensor]) -> int:
    """Bytes of the largest changed layer in float32, which is what is summed at a time."""
    return max(4 * stored[f"{name}.weight"].elements for name in changed_layers(opened.model))


def plan_shards(stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> Any:
    """Which tensors go into which file, as huggingface_hub splits a model of `dtype`."""
    return split_state_dict_into_shards_factory(
        dict(stored),
        get_storage_size=lambda each: each.bytes_in(dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD,
    )


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the files that transformers reads; the index names no file outside of the folder."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, StoredTensor] = {}
    for path in (folder / each for each in names if (folder / each).is_file()):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dictionary
                tensor = file.get_slice(name)
                shape, itemsize = tuple(tensor.get_shape()), FLOATS.get(tensor.get_dtype())
                size = math.prod(shape) * itemsize if itemsize else file.get_tensor(name).nbytes
                found[name] = StoredTensor(path, shape, itemsize, size)
    return found


def _write_shards(
    opened: OpenedModel, stored: Mapping[str, StoredTensor], folder: Path, onto: BaseWeights, dtype: torch.dtype
) -> None:
    layers, copies = changed_layers(opened.model), modules_to_save_tensors(opened.model)
    split = plan_shards(stored, dtype)
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            tensor = copies[name] if name in copies else _tensor(name, layer, stored[name], onto)
            shard[name] = _rounded(name, tensor, dtype)
            del tensor
        try:
            save_file(shard, folder / file, {"format": "pt"})
        except SafetensorError as error:
            if f"os error {errno.ENOSPC}" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device", str(folder / file)) from error
            raise
    if split.is_sharded:
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": split.metadata, "weight_map": split.tensor_to_filename},
        )


def _tensor(name: str, layer: nn.Module | None, stored: StoredTensor, onto: BaseWeights) -> Tensor:
    """The merged weight of a changed layer in float32, any other tensor as the base's file has it."""
    if layer is not None and onto == "trained":
        whole = base_layer_weight(layer)
        if whole.shape != stored.shape:
            raise ModelError(f"{name} has another shape quantized than in the files of the base; not merged")
        return add_delta_weight(layer, whole)
    with safe_open(stored.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor if layer is None else add_delta_weight(layer, tensor.to(torch.float32, copy=True))


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.cpu()
    rounded = tensor.to(dtype).cpu().contiguous()
    # the least and the greatest, which are NaN if any is: isfinite() would take three copies of an embedding matrix
    if rounded.numel() and not all(bool(each.isfinite()) for each in rounded.aminmax()):
        raise ModelError(f"{name} has values that {dtype} cannot hold or that are not finite; try --dtype bf16")
    return rounded


def _write_whole_model(opened: OpenedModel, folder: Path, onto: BaseWeights, dtype: torch.dtype) -> None:
    """The same for a base whose files name its layers otherwise than its code: loaded as a whole, beside the other."""
    try:
        # the sum needs the original weights in float32; without them, loading in the target dtype takes half the memory
        full: Any = AutoModelForCausalLM.from_pretrained(
            opened.source.folder, dtype=torch.float32 if onto == "original" else dtype, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{opened.source.name}: cannot be loaded: {str(error).splitlines()[0]}") from error
    full.requires_grad_(False).eval()
    for name, layer in changed_layers(opened.model).items():
        place = full.get_submodule(name).weight
        whole = place.to(torch.float32, copy=True) if onto == "original" else base_layer_weight(layer)
        if whole.shape != place.shape:
            raise ModelError(f"{name}.weight has another shape quantized than in the files of the base; not merged")
        place.data = add_delta_weight(layer, whole).cpu().to(dtype)
    for name, tensor in modules_to_save_tensors(opened.model).items():
        full.get_parameter(name).data = tensor.cpu().to(dtype)
    full.to(dtype)
    for name, parameter in full.named_parameters():
        _rounded(name, parameter, dtype)
    full.config._name_or_path = ""
    full.save_pretrained(folder, max_shard_size=SHARD)
