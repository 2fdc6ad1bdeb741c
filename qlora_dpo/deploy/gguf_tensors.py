"""A model's weights in GGUF: names, types, and the row order that llama.cpp's rotary positions need."""

import math
import re
from collections.abc import Iterator, Mapping
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

from qlora_dpo.deploy.gguf_families import GGUF_FAMILIES, head_dim_of, rope_of, rotary_dim
from qlora_dpo.deploy.shards import StoredTensor, list_tensors
from qlora_dpo.errors import ModelError

Quant = Literal["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]

EMBEDDING_TENSORS = ("token_embd.weight", "output.weight")
QUANT_BLOCK = 32
"""Elements that share a scale in all these types; a tensor whose rows are no multiple of it stays in f16."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write: its name and type in GGUF, and the stored tensor it comes from."""

    name: str
    type: Type
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]
    """One, or one for each expert, which are stacked; none for factors of rotary frequencies."""
    hf_name: str
    heads: int | None
    """Number of heads whose rows are permuted; None if the row order stays."""
    rows: tuple[int, int] | None = None
    """The rows of each expert that are written, from the first to before the last; None for all."""
    factors: str = ""
    """Which factors of rotary frequencies it holds: "llama3", "short_factor" or "long_factor"."""

    @property
    def bytes(self) -> int:
        """Its size in the file, in bytes."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(math.prod(self.shape) // block * size)


def plan_tensors(folder: Path, config: Any, quant: Quant, name: str) -> list[GgufTensor]:
    """All tensors of the model in `folder`; raises ModelError for one that llama.cpp has no name for."""
    names = gguf.get_tensor_name_map(GGUF_FAMILIES[config.model_type].architecture, config.num_hidden_layers)
    planned = []
    for hf_name, parts, shape, rows in _stacked(list_tensors(folder)):
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(
                f"{name}: its tensor {hf_name} has no place in a GGUF file of the kind {config.model_type}"
            )
        tensor_type = _type(gguf_name, shape, quant)
        planned.append(GgufTensor(gguf_name, tensor_type, shape, parts, hf_name, permuted_heads(hf_name, config), rows))
    factors = {"llama3": {"rope_freqs": "llama3"}, "longrope": LONGROPE_TENSORS}.get(rope_of(config)["rope_type"], {})
    for gguf_name, key in factors.items():
        shape = (rotary_dim(config) // 2,)
        planned.append(GgufTensor(f"{gguf_name}.weight", Type.F32, shape, (), "", None, factors=key))
    return planned


def _stacked(
    stored: Mapping[str, StoredTensor],
) -> Iterator[tuple[str, tuple[StoredTensor, ...], tuple[int, ...], tuple[int, int] | None]]:
    """Name, stored parts, shape and rows of each tensor; the experts of a layer make one (E, out, in)."""
    experts = dict[str, dict[int, StoredTensor]]()
    for name, tensor in stored.items():
        if (expert := _EXPERT.fullmatch(name)) is not None:
            experts.setdefault(f"{expert[1]}{expert[3]}", {})[int(expert[2])] = tensor
        elif name.endswith(".experts.gate_up_proj"):
            half = tensor.shape[1] // 2
            for part, rows in (("gate_proj", (0, half)), ("up_proj", (half, 2 * half))):
                renamed = f"{name.removesuffix('gate_up_proj')}{part}.weight"
                yield renamed, (tensor,), (tensor.shape[0], half, tensor.shape[2]), rows
        else:
            yield name, (tensor,), tensor.shape, None
    for name, parts in experts.items():
        ordered = tuple(parts[number] for number in range(len(parts)))
        yield name, ordered, (len(ordered), *ordered[0].shape), None


_EXPERT = re.compile(r"(.+\.experts\.)(\d+)\.(.+)")
LONGROPE_TENSORS = {"rope_factors_short": "short_factor", "rope_factors_long": "long_factor"}


def tensor_values(tensor: GgufTensor, config: Any) -> NDArray[np.float32]:
    """The values of a tensor in the order in which they are written, in float32."""
    if tensor.factors == "llama3":
        return rope_factors(rope_of(config), head_dim_of(config))
    if tensor.factors:
        return np.array(rope_of(config)[tensor.factors], dtype=np.float32)
    parts = list[Tensor]()
    for stored in tensor.stored:
        with safe_open(stored.file, framework="pt") as file:
            parts.append(file.get_tensor(stored.name).float())
    values = torch.stack(parts) if parts[1:] else parts[0]
    if tensor.rows is not None:
        values = values[:, slice(*tensor.rows)]
    if tensor.heads is not None:
        values = rope_permuted(values, tensor.heads)
    if tensor.name.endswith("norm.weight"):
        values = values + GGUF_FAMILIES[config.model_type].norm_offset
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


def permuted_heads(name: str, config: Any) -> int | None:
    """The heads of a query or key projection whose rows llama.cpp has in another order; None for any other tensor."""
    if not GGUF_FAMILIES[config.model_type].permutes:
        return None
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


def _type(name: str, shape: tuple[int, ...], quant: Quant) -> Type:
    """The type of a tensor: float32 for vectors, and at least 8 bits for embeddings and head, which matter most."""
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):  # the choice of experts, as llama.cpp keeps it
        return Type.F32
    if quant in ("f16", "bf16"):
        return Type[quant.upper()]
    if shape[-1] % QUANT_BLOCK:
        return Type.F16
    return Type.Q8_0 if name in EMBEDDING_TENSORS else Type[quant.upper()]
