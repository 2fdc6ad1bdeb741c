"""What CUDA computes otherwise than a CPU, for the pretended GPU: bitsandbytes' fused 4-bit product, where its own rule
takes it, and variable-length flash attention, forward and backward.
"""

import ast
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from torch import Tensor
from torch.nn.attention import varlen  # noqa: F401  registers its operations


@functools.cache
def _source() -> ast.Module:
    return ast.parse(Path(bitsandbytes.__file__).parent.joinpath("backends/cuda/ops.py").read_text(encoding="utf-8"))


@functools.cache
def backend_number(name: str) -> int:
    """A number in bitsandbytes' CUDA backend."""
    return next(
        int(ast.literal_eval(node.value))
        for node in ast.walk(_source())
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name
    )


@functools.cache
def fused_kernel_rule(
    multiprocessors: int, major: int, minor: int
) -> Callable[[int, torch.dtype, int, int, int], bool]:
    """The rule by which bitsandbytes takes its fused kernel, compiled from its own source.

    Its module cannot be imported, since it binds CUDA's library, which is not here. A copy of the rule, 200 lines of
    thresholds by card and shape, would stay behind when bitsandbytes changes it.
    """
    name = "_gemm_4bit_use_custom_cuda"
    rule = next(node for node in _source().body if isinstance(node, ast.FunctionDef) and node.name == name)
    known: dict[str, Any] = {
        "functools": functools,
        "torch": torch,
        "_GEMM_4BIT_CUSTOM_FLOOR_M": backend_number("_GEMM_4BIT_CUSTOM_FLOOR_M"),
        "_gpu_dispatch_props": lambda index: (multiprocessors, major, minor),
    }
    exec(compile(ast.Module([rule], []), "bitsandbytes/backends/cuda/ops.py", "exec"), known)
    made: Callable[[int, torch.dtype, int, int, int], bool] = known[name]
    return made


def _fused_product(
    input_MK: Tensor,
    packed: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    kind: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """A fused 4-bit product: weights in the input's dtype, their products added up in float32, 32 at a time.

    The kernel adds in an order of its own. This one is not that either, but it differs from the order of a product with
    dequantized weights, so whatever takes the two for bit-equal fails here as it would on a card.
    """
    operations = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        blocks = operations.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = blocks + absmax_offset
    dense = operations.dequantize_4bit.default(packed, absmax, blocksize, kind, shape, input_MK.dtype)
    parts = zip(input_MK.float().split(32, -1), dense.float().split(32, -1), strict=True)
    output = sum((some_Mk @ weight_Nk.T for some_Mk, weight_Nk in parts), start=torch.zeros(()))
    return (output if bias is None else output + bias.float()).to(input_MK.dtype)


def _varlen(
    capability: tuple[int, int],
    query_QHD: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    queries_S: Tensor,
    keys_S: Tensor,
    longest_query: int,
    longest_key: int,
    causal: bool = False,
    scale: float | None = None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Variable-length flash attention: sequence by sequence in float32, rounded once."""
    if capability < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    if query_QHD.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if not query_QHD.dtype == key_KGD.dtype == value_KGD.dtype:
        raise RuntimeError("query and key must have the same dtype")
    answers, logs = [], []
    for query_qHD, key_kGD, value_kGD in _sequences((query_QHD, key_KGD, value_KGD), queries_S, keys_S):
        score_Hqk, _, value_HkD = _scores(query_qHD, key_kGD, value_kGD, causal, scale)
        answers.append((score_Hqk.softmax(-1) @ value_HkD).transpose(0, 1))
        logs.append(score_Hqk.logsumexp(-1))
    return torch.cat(answers).to(query_QHD.dtype), torch.cat(logs, 1), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    capability: tuple[int, int],
    slope_QHD: Tensor,
    query_QHD: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    answer_QHD: Tensor,
    log_HQ: Tensor,
    queries_S: Tensor,
    keys_S: Tensor,
    longest_query: int,
    longest_key: int,
    causal: bool,
    state: Tensor,
    scale: float | None = None,
    *others: Any,
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value; by hand, since below autograd there is none."""
    groups, factor = key_KGD.shape[1], query_QHD.shape[-1] ** -0.5 if scale is None else scale
    found = []
    slopes = slope_QHD.float().split(queries_S.diff().tolist())
    sequences = _sequences((query_QHD, key_KGD, value_KGD), queries_S, keys_S)
    for (query_qHD, key_kGD, value_kGD), slope_qHD in zip(sequences, slopes, strict=True):
        score_Hqk, key_HkD, value_HkD = _scores(query_qHD, key_kGD, value_kGD, causal, scale)
        weight_Hqk, slope_HqD = score_Hqk.softmax(-1), slope_qHD.transpose(0, 1)
        along_Hqk = weight_Hqk * (slope_HqD @ value_HkD.transpose(1, 2))
        slope_Hqk = (along_Hqk - weight_Hqk * along_Hqk.sum(-1, keepdim=True)) * factor
        slope_key_HkD = slope_Hqk.transpose(1, 2) @ query_qHD.float().transpose(0, 1)
        slope_value_HkD = weight_Hqk.transpose(1, 2) @ slope_HqD
        of_groups = (each.unflatten(0, (groups, -1)).sum(1) for each in (slope_key_HkD, slope_value_HkD))
        found.append([each.transpose(0, 1) for each in (slope_Hqk @ key_HkD, *of_groups)])
    return tuple(torch.cat(each).to(query_QHD.dtype) for each in zip(*found, strict=True))


def _sequences(tensors: Sequence[Tensor], queries_S: Tensor, keys_S: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Query, key and value of each sequence."""
    starts = (queries_S, keys_S, keys_S)
    return zip(*(each.split(start.diff().tolist()) for each, start in zip(tensors, starts, strict=True)), strict=True)


def _scores(
    query_qHD: Tensor, key_kGD: Tensor, value_kGD: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of one sequence (H, q, k), and its keys and values for every head of the queries, in float32."""
    group = query_qHD.shape[1] // key_kGD.shape[1]
    query_HqD = query_qHD.float().transpose(0, 1)
    key_HkD, value_HkD = (each.float().repeat_interleave(group, 1).transpose(0, 1) for each in (key_kGD, value_kGD))
    score_Hqk = query_HqD @ key_HkD.transpose(1, 2) * (query_HqD.shape[-1] ** -0.5 if scale is None else scale)
    if causal:  # the last query sees the last key
        queries, keys = score_Hqk.shape[1:]
        later_qk = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        score_Hqk = score_Hqk.masked_fill(later_qk, -torch.inf)
    return score_Hqk, key_HkD, value_HkD


PRODUCT = torch.ops.bitsandbytes.gemm_4bit.default
KERNELS: dict[Any, Callable[..., Any]] = {
    PRODUCT: _fused_product,
    torch.ops.torch_attn._varlen_attn.default: _varlen,
    torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
}
"""What is computed otherwise than on a CPU."""
