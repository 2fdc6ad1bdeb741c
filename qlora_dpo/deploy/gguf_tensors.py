"""A model's weights in GGUF: names, types, and the row order that llama.cpp's rotary positions need."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from qlora_dpo.deploy.shards import StoredTensor, list_tensors
from qlora_dpo.errors import ModelError

Quant = Literal["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
EMBEDDING_TENSORS = ("token_embd.weight", "output.weight")
QUANT_BLOCK = 32
"""Elements that share a scale in all these types; a tensor whose rows are no multiple of it stays in f16."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write: its name and type in GGUF, and the stored tensor it comes from."""

    name: str
    type: Type
    shape: tuple[int, ...]
    stored: StoredTensor | None
    hf_name: str
    heads: int | None
    """Number of heads whose rows are permuted; None if the row order stays."""

    @property
    def bytes(self) -> int:
        """Its size in the file, in bytes."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(math.prod(self.shape) // block * size)


def plan_tensors(folder: Path, config: Any, quant: Quant, name: str) -> list[GgufTensor]:
    """All tensors of the model in `folder`; raises ModelError for one that llama.cpp has no name for."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    planned = []
    for hf_name, stored in list_tensors(folder).items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(
                f"{name}: its tensor {hf_name} has no place in a GGUF file of the kind {config.model_type}"
            )
        tensor_type = _type(gguf_name, stored.shape, quant)
        planned.append(GgufTensor(gguf_name, tensor_type, stored.shape, stored, hf_name, _heads(hf_name, config)))
    if config.rope_parameters["rope_type"] == "llama3":
        factors = rope_factors(config.rope_parameters, _head_dim(config))
        planned.append(GgufTensor("rope_freqs.weight", Type.F32, tuple(factors.shape), None, "", None))
    return planned


def tensor_values(tensor: GgufTensor, config: Any) -> NDArray[np.float32]:
    """The values of a tensor in the order in which they are written, in float32."""
    if tensor.stored is None:
        return rope_factors(config.rope_parameters, _head_dim(config))
    with safe_open(tensor.stored.file, framework="pt") as file:
        values: Tensor = file.get_tensor(tensor.hf_name).float()
    if tensor.heads is not None:
        values = rope_permuted(values, tensor.heads)
    array: NDArray[np.float32] = values.contiguous().numpy()
    return array


def quantize_values(tensor: GgufTensor, values: NDArray[np.float32]) -> NDArray[Any]:
    """`values` in the tensor's type, as they are stored in the file."""
    quantized: NDArray[Any] = quantize(values, tensor.type)
    return quantized


def rope_permuted(rows: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection, permuted so that the two rows of each rotary pair are adjacent.

    transformers rotates row i of a head with row i + half; llama.cpp, for this architecture, row 2i with row 2i + 1.
    """
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rope_factors(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """The divisor of each rotary frequency in Llama 3.1 and later (`rope_type = "llama3"`)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelength = 2 * math.pi * rope["rope_theta"] ** exponent
    old_context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (old_context / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(
        wavelength < old_context / high, 1.0, torch.where(wavelength > old_context / low, float(factor), between)
    )
    array: NDArray[np.float32] = factors.float().numpy()
    return array


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _heads(name: str, config: Any) -> int | None:
    if config.model_type != "llama":
        return None
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


def _type(name: str, shape: tuple[int, ...], quant: Quant) -> Type:
    """The type of a tensor: float32 for vectors, and at least 8 bits for embeddings and head, which matter most."""
    if len(shape) == 1:
        return Type.F32
    if quant in ("f16", "bf16"):
        return Type[quant.upper()]
    if shape[-1] % QUANT_BLOCK:
        return Type.F16
    return Type.Q8_0 if name in EMBEDDING_TENSORS else Type[quant.upper()]
