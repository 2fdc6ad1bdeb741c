"""Writes a LoRA adapter alone as GGUF, which llama.cpp's `--lora` adds to a GGUF file of its base."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora.layer import ParamWrapper as LoraParameter
from torch import Tensor

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.deploy.gguf_families import GGUF_FAMILIES
from qlora_dpo.deploy.gguf_file import check_architecture
from qlora_dpo.deploy.gguf_tensors import permuted_heads, rope_permuted
from qlora_dpo.deploy.merged_weights import adapted_layers, has_whole_tensors, is_dora
from qlora_dpo.errors import ModelError
from qlora_dpo.files import atomic_folder, write_json
from qlora_dpo.manifest import write_manifest

AdapterDtype = Literal["f16", "bf16"]

_TYPES = {"f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16}
_MAX_ERROR = {"f16": 1e-3, "bf16": 4e-3}
"""Largest relative L2 error of a matrix that rounding explains."""


@dataclass(frozen=True)
class ExportedAdapter:
    """The file, its size in bytes, its adapted layers, and the largest relative error of a matrix read back."""

    file: Path
    bytes: int
    layers: int
    error: float


def export_adapter(opened: OpenedModel, output: Path, name: str, dtype: AdapterDtype) -> ExportedAdapter:
    """Write the adapter of `opened` to `NAME-lora-DTYPE.gguf` in the new folder `output`; it is kept if it reads back.

    Raises ModelError for a base whose family is not written as GGUF, and for an adapter that is more than a sum of
    matrix products.
    """
    config: Any = opened.model.config
    check_architecture(config, opened.source.name)
    family = GGUF_FAMILIES[config.model_type]
    matrices = dict(_matrices(opened.model, config, name))
    with atomic_folder(output) as temporary:
        file = temporary / f"{name}-lora-{dtype}.gguf"
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[family.architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(
            gguf.Keys.Adapter.LORA_ALPHA, 1.0
        )  # llama.cpp divides it by the rank; lora_b is scaled for it
        for key, values in matrices.items():
            writer.add_tensor(key, quantize(values, _TYPES[dtype]), raw_dtype=_TYPES[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        error = _verify(file, matrices, dtype)
        size, layers = file.stat().st_size, len(matrices) // 2
        base = {"name": opened.source.name, "hub_id": opened.source.hub_id, "fingerprint": opened.source.fingerprint}
        record = {"base": base, "to": "gguf-lora", "quant": dtype, "file": file.name, "layers": layers}
        write_json(temporary / "export.json", record | {"bytes": size, "error": error})
        write_manifest(temporary, [path for path in temporary.iterdir() if path.is_file()])
    return ExportedAdapter(output / file.name, size, layers, error)


def _matrices(model: Any, config: Any, name: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Both matrices of each adapted layer by their names in GGUF: A (r, in), and B (out, r) with all factors."""
    names = gguf.get_tensor_name_map(GGUF_FAMILIES[config.model_type].architecture, config.num_hidden_layers)
    if has_whole_tensors(model):
        raise ModelError(f"{name}: holds tensors that were trained as a whole, which a LoRA in GGUF cannot; merge it")
    for layer_name, layer in adapted_layers(model).items():
        key = names.get_name(f"{layer_name}.weight", try_suffixes=(".weight",))
        if reason := _obstacle(layer, key):
            raise ModelError(f"{name}: {layer_name} {reason}; merge the adapter, and export the full model")
        (adapter,) = layer.active_adapters
        a_RI, b_OR = (matrix[adapter].weight.detach().float().cpu() for matrix in (layer.lora_A, layer.lora_B))
        heads = permuted_heads(f"{layer_name}.weight", config)
        scaled_OR: Tensor = b_OR * (layer.scaling[adapter] * len(a_RI))
        if heads is not None:
            scaled_OR = rope_permuted(scaled_OR, heads)
        yield f"{key}.lora_a", a_RI.numpy()
        yield f"{key}.lora_b", scaled_OR.contiguous().numpy()


def _obstacle(layer: Any, key: str | None) -> str:
    """Why the update of a layer is no LoRA of llama.cpp; empty if it is one."""
    if isinstance(layer, LoraParameter):
        return "is the weights of several experts, whose adapters have no place in GGUF"
    if isinstance(layer, LoraEmbedding):
        return "is the embeddings, whose adapter has no place in GGUF"
    if is_dora(layer):
        return "is scaled by DoRA, which llama.cpp does not compute"
    if any(layer.lora_bias.values()):
        return "has lora_bias, which has no place in GGUF"
    if len(layer.active_adapters) != 1:
        return "has several adapters"
    return "" if key is not None else "has no place in a GGUF file of its kind"


def _verify(file: Path, matrices: dict[str, NDArray[np.float32]], dtype: AdapterDtype) -> float:
    """The largest relative error of a matrix in `file`; raises ModelError if it differs from what was written."""
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    if written.keys() != matrices.keys():
        raise ModelError(f"{file.name}: has other tensors than were written; nothing was kept")
    worst = 0.0
    for key, values in matrices.items():
        read_back = dequantize(written[key].data, _TYPES[dtype]).reshape(values.shape)
        error = float(torch.linalg.norm(torch.from_numpy(read_back - values)) / (np.linalg.norm(values) or 1.0))
        if not error <= _MAX_ERROR[dtype]:
            raise ModelError(f"{file.name}: {key} reads back with an error of {error:.2g}; nothing was kept")
        worst = max(worst, error)
    return worst
