"""Products with the weights of linear layers on a CPU, in the form that is fastest for the number of rows decoded.

In float32, adapters are merged into copies of the weights. Where a model's own products are in bf16 (autocast), the
copies are in bf16, or stay in 4 bits where bitsandbytes has a kernel for that, and adapters are applied beside them in
float32: merged into 16 bits they would lose their small updates. Autocast would convert all weights anew for each
token, and dequantize them first.

In names: R rows, I width of the input, O width of the output, r rank of the adapters.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu as packed_for_cpu
from bitsandbytes.functional import has_avx512bf16
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from qlora_dpo.model.quantized import dense_weight

MIN_PACKED_ROWS = {torch.float32: 4, torch.bfloat16: 2}
"""Rows at once from which on weights of a dtype are packed."""
MAX_4BIT_ROWS = 6
"""Rows at once up to which bitsandbytes' kernel is faster than dense weights in bf16."""
PACKED_OUTPUTS = 32
"""The width of a layer's output has to be a multiple of this for bitsandbytes' kernel."""

Product = Callable[[Tensor], Tensor]
"""Maps inputs (R, I) to outputs (R, O), both in float32."""


def fused_product(layers: Sequence[Any], rows: int, dtype: torch.dtype) -> Product:
    """The product of linear layers that read the same input, with active adapters; their outputs follow each other.

    `dtype` is that in which the model multiplies, float32 or bfloat16. An adapter that is disabled is left out.
    """
    bases = [layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in layers]
    bias = None if bases[0].bias is None else torch.cat([base.bias.detach().float() for base in bases])
    if dtype == torch.float32:
        weight_OI = _concatenated([_merged_weight(layer) for layer in layers])
        return _packed(weight_OI, bias, rows) or _Dense(weight_OI, bias)
    if rows <= MAX_4BIT_ROWS and all(map(_has_4bit_kernel, bases)):
        product: Product = _four_bit(bases)
    else:
        weight_OI = _concatenated([dense_weight(base, dtype).detach() for base in bases])
        product = _packed(weight_OI, None, rows) or _DenseBF16(weight_OI)
    adapters = _joined_adapters(layers)
    return product if bias is None and adapters is None else _WithAdapters(product, bias, adapters)


def product_bytes(layer: Any, dtype: torch.dtype) -> int:
    """The most that the copy of a layer's weight takes."""
    return int(layer.in_features * layer.out_features * dtype.itemsize)


@dataclass(frozen=True)
class _Dense:
    weight_OI: Tensor
    bias: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight_OI, self.bias)


@dataclass(frozen=True)
class _DenseBF16:
    weight_OI: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(torch.bfloat16)
        if len(inputs) == 1:  # a third faster than `linear`, which is no faster than in float32
            return torch.mv(self.weight_OI, inputs[0])[None].float()
        return functional.linear(inputs, self.weight_OI).float()


@dataclass(frozen=True)
class _Packed:
    """A weight in oneDNN's own blocks, by the operators that torch.compile calls on a CPU.

    4 to 32 rows take a fifth to a third less time than with `linear`, which reorders the weight in each call; one row
    takes a third more.
    """

    weight: Tensor
    dtype: torch.dtype
    bias: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.dtype)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return output.float()


@dataclass(frozen=True)
class _FourBit:
    """Weights in bitsandbytes' blocks for CPUs with AVX512-BF16; a kernel dequantizes them as it multiplies.

    Up to 6 rows take a third to two thirds of the time that dense weights in bf16 take. Scales are rounded to bf16 and
    not weights: outputs are as far from float32's as with weights in bf16.
    """

    weight: Tensor
    scale: Tensor
    code: Tensor
    blocksize: int

    def __call__(self, inputs: Tensor) -> Tensor:
        shape = len(self.weight), inputs.shape[-1]
        output: Tensor = torch.ops.bitsandbytes.gemv_4bit(
            inputs.to(torch.bfloat16), self.weight, shape, self.scale, self.code, self.blocksize
        )
        return output.float()


@dataclass(frozen=True)
class _Adapters:
    """The LoRA adapters of joined layers: all of their A, and each one's B times its scaling with its first output."""

    a_rI: Tensor
    b_rO: tuple[Tensor, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class _WithAdapters:
    product: Product
    bias: Tensor | None
    adapters: _Adapters | None

    def __call__(self, inputs: Tensor) -> Tensor:
        output_RO = self.product(inputs)
        if self.bias is not None:
            output_RO += self.bias
        if (adapters := self.adapters) is not None:
            reduced_Rr = functional.linear(inputs, adapters.a_rI).split([len(b_rO) for b_rO in adapters.b_rO], dim=1)
            for b_rO, start, of_adapter in zip(adapters.b_rO, adapters.starts, reduced_Rr, strict=True):
                output_RO[:, start : start + b_rO.shape[1]].addmm_(of_adapter, b_rO)
        return output_RO


def _packed(weight_OI: Tensor, bias: Tensor | None, rows: int) -> _Packed | None:
    """The product with a packed weight; None where that is slower."""
    if rows < MIN_PACKED_ROWS[weight_OI.dtype] or not _packs(weight_OI.dtype):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), rows)
    return _Packed(packed, weight_OI.dtype, bias)


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in `dtype` on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_4bit_kernel(base: Any) -> bool:
    if type(base) is not bnb.nn.Linear4bit or not has_avx512bf16():
        return False
    fits = base.out_features % PACKED_OUTPUTS == 0 and base.in_features % base.weight.quant_state.blocksize == 0
    return bool(fits)


def _four_bit(bases: Sequence[Any]) -> _FourBit:
    # the function changes the state that it is given
    packed = [packed_for_cpu(base.weight.data, copy.deepcopy(base.weight.quant_state)) for base in bases]
    state = packed[0][1]
    scale = torch.cat([state.absmax for _, state in packed], dim=1)
    return _FourBit(torch.cat([weight for weight, _ in packed]), scale, state.code, state.blocksize)


@torch.no_grad()
def _joined_adapters(layers: Sequence[Any]) -> _Adapters | None:
    """The adapters of the layers that are active and not disabled; None without any."""
    a_rI, b_rO, starts, start = list[Tensor](), list[Tensor](), list[int](), 0
    for layer in layers:
        for name in _active_adapters(layer):
            a_rI.append(layer.lora_A[name].weight.float())
            b_rO.append((layer.lora_B[name].weight.float() * layer.scaling[name]).T.contiguous())
            starts.append(start)
        start += layer.out_features
    return _Adapters(torch.cat(a_rI), tuple(b_rO), tuple(starts)) if a_rI else None


def _active_adapters(layer: Any) -> list[str]:
    if not isinstance(layer, LoraLayer) or layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


@torch.no_grad()
def _merged_weight(layer: Any) -> Tensor:
    """The layer's weight (O, I) plus its adapters, in float32."""
    base: nn.Linear = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    weight_OI = dense_weight(base, torch.float32).detach()
    for name in _active_adapters(layer):
        a_rI, b_Or = layer.lora_A[name].weight, layer.lora_B[name].weight
        weight_OI = torch.addmm(weight_OI, b_Or.float(), a_rI.float(), alpha=layer.scaling[name])
    return weight_OI


def _concatenated(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))
