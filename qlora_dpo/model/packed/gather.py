"""Gathers rows of a matrix by index, with deterministic gradients and without sorting on the device.

The backward pass of torch's `x[index]` sorts the index each time, and `index_add_` sums in an undefined order on a GPU.
Here the order is computed once per batch. T rows of width W are gathered into N or Q slots.
"""

from typing import Any

import torch
from torch import Tensor


def gather_rows(x_TW: Tensor, index_N: Tensor, order_M: Tensor, counts_T: Tensor) -> Tensor:
    """x[index] (N, W). `order` lists the slots that hold row 0, then row 1 and so on; `counts` is their number per row.

    Slots that are missing in `order` are padding, and their gradient is dropped.
    """
    rows: Tensor = _Gather.apply(x_TW, index_N, order_M, counts_T)  # type: ignore[no-untyped-call]
    return rows


def gather_rows_padded(x_TW: Tensor, index_Q: Tensor, place_T: Tensor) -> Tensor:
    """x[index] (Q, W), where row t is used in slot `place[t]` only; all other slots are padding."""
    rows: Tensor = _GatherPadded.apply(x_TW, index_Q, place_T)  # type: ignore[no-untyped-call]
    return rows


def gather_rows_unique(x_QW: Tensor, place_T: Tensor) -> Tensor:
    """x[place] (T, W), where no slot occurs twice in `place`."""
    rows: Tensor = _GatherUnique.apply(x_QW, place_T)  # type: ignore[no-untyped-call]
    return rows


def sum_rows(x_NW: Tensor, counts_R: Tensor) -> Tensor:
    """Sums (R, W) of consecutive groups of rows, of `counts` rows each, added in the order of the rows."""
    # `unsafe` skips a check of the counts, for which the host would wait for the device
    sums: Tensor = torch.segment_reduce(x_NW, "sum", lengths=counts_R, axis=0, unsafe=True)
    return sums


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, index_N: Tensor, order_M: Tensor, counts_T: Tensor) -> Tensor:
        ctx.save_for_backward(order_M, counts_T)
        return x_TW.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, gradient_NW: Tensor) -> tuple[Tensor, None, None, None]:
        order_M, counts_T = ctx.saved_tensors
        # in float32, since a system prompt's gradient is summed over every pair of a row
        sums_TW = sum_rows(gradient_NW.index_select(0, order_M).to(_at_least_float32(gradient_NW)), counts_T)
        return sums_TW.to(gradient_NW.dtype), None, None, None


class _GatherPadded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, index_Q: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(place_T)
        return x_TW.index_select(0, index_Q)

    @staticmethod
    def backward(ctx: Any, gradient_QW: Tensor) -> tuple[Tensor, None, None]:
        (place_T,) = ctx.saved_tensors
        return gradient_QW.index_select(0, place_T), None, None


class _GatherUnique(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_QW: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(place_T)
        ctx.rows = len(x_QW)
        return x_QW.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, gradient_TW: Tensor) -> tuple[Tensor, None]:
        (place_T,) = ctx.saved_tensors
        gradient_QW = gradient_TW.new_zeros(ctx.rows, gradient_TW.shape[1])
        return gradient_QW.index_copy_(0, place_T, gradient_TW), None


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
