"""Writes a merged model shard by shard, with at most one shard and one layer in memory beside the model."""

import errno
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.adapter_weights import base_name
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.deploy.merge_card import BaseWeights
from qlora_dpo.deploy.merged_weights import ChangedTensor, changed_tensors, tied_names
from qlora_dpo.errors import ModelError
from qlora_dpo.files import write_json
from qlora_dpo.model.decoder_layers import unwrap_peft

MAX_SHARD_SIZE = "2GB"
FLOAT_ITEMSIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
GENERATION_CONFIG_NAME = "generation_config.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in one of a model's files."""

    file: Path
    name: str
    """Its name in that file."""
    shape: tuple[int, ...]
    itemsize: int | None
    """Bytes of an element of a plain floating-point type; None for another type, which is copied unchanged."""
    bytes: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Its size in a file of `dtype`, in bytes."""
        return self.bytes if self.itemsize is None else self.elements * dtype.itemsize


def write_model(opened: OpenedModel, folder: Path, onto: BaseWeights, dtype: torch.dtype) -> None:
    """Write weights, config, generation config, tokenizer and chat template.

    Everything except the changed tensors is copied from the base's files: bitsandbytes casts the bias of a 4-bit layer
    to the compute dtype in its first forward pass, so the opened model's biases may be rounded.
    """
    folder.mkdir(exist_ok=True)
    stored, untied = base_tensors(opened), untied_head(opened.model)
    if stored is None:
        _write_whole_model(opened, folder, onto, dtype)
    else:
        _write_shards(opened, stored, folder, onto, dtype)
        config: Any = AutoConfig.from_pretrained(opened.source.folder, trust_remote_code=False)
        config.dtype, config._name_or_path = dtype, ""
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.architectures = [type(unwrap_peft(opened.model)).__name__]
        _fit_config(config, opened.model, untied=untied is not None)
        config.save_pretrained(folder)
        if (opened.source.folder / GENERATION_CONFIG_NAME).is_file():
            shutil.copyfile(opened.source.folder / GENERATION_CONFIG_NAME, folder / GENERATION_CONFIG_NAME)
        elif unwrap_peft(opened.model).generation_config is not None:
            unwrap_peft(opened.model).generation_config.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)
    _end_with_template(opened, folder)


def _end_with_template(opened: OpenedModel, folder: Path) -> None:
    """Have other programs end a reply where the chat template does; a base model's settings know other ends alone."""
    file = folder / GENERATION_CONFIG_NAME
    if not file.is_file() or not opened.tokenizer.chat_template:
        return
    try:
        end = detect_chat_format(opened.tokenizer).end_token_id
    except ModelError:  # a template that nothing was trained with here
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    known = settings.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if end not in ends:
        write_json(file, settings | {"eos_token_id": [end, *ends]})


def _fit_config(config: Any, model: Any, *, untied: bool) -> None:
    """Make `config` that of the merged model: with its number of tokens, and with a head of its own if `untied`."""
    for each in {id(each): each for each in (config, config.get_text_config())}.values():
        if untied:
            each.tie_word_embeddings = False
        if hasattr(each, "vocab_size") and each is config.get_text_config():
            each.vocab_size = len(model.get_input_embeddings().weight)


def untied_head(model: Any) -> tuple[str, str] | None:
    """The names of head and embeddings if the base ties them and the adapter has changed one otherwise than the other.

    The merged model then has a head of its own, as the adapter model has; PEFT's `merge_and_unload` would change both.
    """
    names = tied_names(model)
    if names is None:
        return None
    changed = changed_tensors(model)
    head, embeddings = (changed.get(name) for name in names)
    if head is None and embeddings is None:
        return None
    if head is not None and embeddings is not None and torch.equal(head.merged(), embeddings.merged()):
        return None
    return names


def base_tensors(opened: OpenedModel) -> dict[str, StoredTensor] | None:
    """The tensors to write, by name; None if the base's files name or store layers differently from the model.

    That is the case for some architectures. Each comes from the tensor of the base's files that is named, in the shape
    that it has merged. A second name of a tied tensor is omitted, as in transformers. Of a base that is stored in 4 or
    8 bits, the quantized layers are written dequantized.
    """
    model = unwrap_peft(opened.model)
    tensors, changed = list_tensors(opened.source.folder), changed_tensors(opened.model)
    first_names = {id(parameter): base_name(name) for name, parameter in model.named_parameters()}
    parameters = model.named_parameters(remove_duplicate=False)
    tied_to = {base_name(name): first_names[id(parameter)] for name, parameter in parameters}
    stored = {name: t for name, t in tensors.items() if tied_to.get(name, name) not in tensors.keys() - {name}}
    if names := untied_head(opened.model):
        one = next((name for name in names if name in stored), None)
        stored |= {name: replace(stored[one], shape=stored[one].shape) for name in names if one is not None}
    elif names := tied_names(opened.model):
        # one of both is in the files; it has both names' values
        changed = {name: tensor for name, tensor in changed.items() if name not in names or name in stored}
    if is_stored_quantized(opened):
        stored = {name: tensor for name, tensor in stored.items() if name in changed or name in tied_to}
    if not changed or not changed.keys() <= stored.keys():
        return None
    return stored | {
        name: replace(stored[name], shape=tensor.shape, itemsize=stored[name].itemsize or FLOAT_ITEMSIZES["F32"])
        for name, tensor in changed.items()
    }


def is_stored_quantized(opened: OpenedModel) -> bool:
    """True if the files of the base hold quantized weights, so that there are no original ones."""
    return getattr(AutoConfig.from_pretrained(opened.source.folder), "quantization_config", None) is not None


def largest_layer_bytes(opened: OpenedModel, stored: Mapping[str, StoredTensor]) -> int:
    """Bytes of the largest changed layer in float32; one layer is summed at a time."""
    return max(4 * stored[name].elements for name in changed_tensors(opened.model) if name in stored)


def plan_shards(stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> Any:
    """The tensors of each file, as huggingface_hub splits a model of `dtype`."""
    return split_state_dict_into_shards_factory(
        dict(stored),
        get_storage_size=lambda tensor: tensor.bytes_in(dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_SIZE,
    )


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the files that transformers reads."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, StoredTensor] = {}
    for path in (folder / name for name in names if (folder / name).is_file()):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dictionary
                tensor = file.get_slice(name)
                shape, itemsize = tuple(tensor.get_shape()), FLOAT_ITEMSIZES.get(tensor.get_dtype())
                size = math.prod(shape) * itemsize if itemsize else file.get_tensor(name).nbytes
                tensors[name] = StoredTensor(path, name, shape, itemsize, size)
    return tensors


def _write_shards(
    opened: OpenedModel, stored: Mapping[str, StoredTensor], folder: Path, onto: BaseWeights, dtype: torch.dtype
) -> None:
    changed = changed_tensors(opened.model)
    split = plan_shards(stored, dtype)
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            tensor = _merged_tensor(name, changed.get(name), stored[name], onto, dtype)
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


def _merged_tensor(
    name: str, changed: ChangedTensor | None, stored: StoredTensor, onto: BaseWeights, dtype: torch.dtype
) -> Tensor:
    """The merged tensor in `dtype` if it is `changed`; any other one as it is in the base's file."""

    def original() -> Tensor:
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
        return tensor

    if changed is None:
        return original()
    return changed.merged_in(dtype, name, original if onto == "original" else None)


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.cpu()
    rounded = tensor.to(dtype).cpu().contiguous()
    # The extremes are NaN if any element is; isfinite() would take three copies of an embedding matrix
    if rounded.numel() and not all(bool(extreme.isfinite()) for extreme in rounded.aminmax()):
        raise ModelError(f"{name} has values that {dtype} cannot hold or that are not finite; try --dtype bf16")
    return rounded


def _write_whole_model(opened: OpenedModel, folder: Path, onto: BaseWeights, dtype: torch.dtype) -> None:
    """Merge into a second copy of the model, for a base whose files name its layers differently from its code."""
    if is_stored_quantized(opened):
        raise ModelError(
            f"{opened.source.name}: is stored quantized, and its files name layers otherwise than transformers' code; "
            "train on the model that it was made from, or use the adapter with the base"
        )
    try:
        # Only a sum onto the original weights needs them in float32; the target dtype takes half the memory
        full: Any = AutoModelForCausalLM.from_pretrained(
            opened.source.folder, dtype=torch.float32 if onto == "original" else dtype, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{opened.source.name}: cannot be loaded: {str(error).splitlines()[0]}") from error
    full.requires_grad_(False).eval()
    if len(full.get_input_embeddings().weight) != len(opened.model.get_input_embeddings().weight):
        full.resize_token_embeddings(len(opened.model.get_input_embeddings().weight), mean_resizing=False)
    if untied_head(opened.model):
        full.get_output_embeddings().weight = nn.Parameter(
            full.get_input_embeddings().weight.detach().clone(), requires_grad=False
        )
        _fit_config(full.config, opened.model, untied=True)
    for name, changed in changed_tensors(opened.model).items():
        parameter = full.get_parameter(name)
        merged = changed.merged_in(dtype, name, parameter.detach if onto == "original" else None)
        if merged.shape != parameter.shape:
            raise ModelError(f"{name} has another shape quantized than in the files of the base; not merged")
        parameter.data = merged.cpu()
    full.to(dtype)
    for name, parameter in full.named_parameters():
        _rounded(name, parameter, dtype)
    full.config._name_or_path = ""
    generation_config = opened.source.folder / GENERATION_CONFIG_NAME
    if generation_config.is_file():
        full.generation_config = GenerationConfig()  # transformers loads files that it refuses to save
    full.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    if generation_config.is_file():
        shutil.copyfile(generation_config, folder / GENERATION_CONFIG_NAME)
