"""Reads rows of a matrix by index, with gradients that are summed in a fixed order and without sorting on the device.

torch's `x[index]` sorts the index in every backward pass, and its `index_add_` sums in any order on a GPU. Here the
order is known beforehand. T rows of width W, N or Q places that they are read into.
"""

from typing import Any

import torch
from torch import Tensor


def gather_rows(x_TW: Tensor, index_N: Tensor, order_M: Tensor, counts_T: Tensor) -> Tensor:
    """x[index] (N, W). `order` lists the places of row 0, then of row 1 and so on, and `counts` how many each has.

    Places that `order` leaves out are padding, and their gradient is dropped.
    """
    rows: Tensor = _Take.apply(x_TW, index_N, order_M, counts_T)  # type: ignore[no-untyped-call]
    return rows


def gather_rows_padded(x_TW: Tensor, index_Q: Tensor, place_T: Tensor) -> Tensor:
    """x[index] (Q, W), where row t is wanted at `place[t]` only; every other place is padding."""
    rows: Tensor = _TakeOnce.apply(x_TW, index_Q, place_T)  # type: ignore[no-untyped-call]
    return rows


def gather_rows_unique(x_QW: Tensor, place_T: Tensor) -> Tensor:
    """x[place] (T, W), where no place is read twice."""
    rows: Tensor = _TakeBack.apply(x_QW, place_T)  # type: ignore[no-untyped-call]
    return rows


def sum_rows(x_NW: Tensor, counts_R: Tensor) -> Tensor:
    """The sums (R, W) of so many rows each, one group after another, in the order in which they stand."""
    # `unsafe`: the counts are ours, and checking them would make the host wait for the device
    sums: Tensor = torch.segment_reduce(x_NW, "sum", lengths=counts_R, axis=0, unsafe=True)
    return sums


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, index_N: Tensor, order_M: Tensor, counts_T: Tensor) -> Tensor:
        ctx.save_for_backward(order_M, counts_T)
        return x_TW.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, gradient_NW: Tensor) -> tuple[Tensor, None, None, None]:
        order_M, counts_T = ctx.saved_tensors
        # in float32: a system prompt's tokens are read by every pair of a row
        sums_TW = sum_rows(gradient_NW.index_select(0, order_M).to(_wide(gradient_NW)), counts_T)
        return sums_TW.to(gradient_NW.dtype), None, None, None


class _TakeOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, index_Q: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(place_T)
        return x_TW.index_select(0, index_Q)

    @staticmethod
    def backward(ctx: Any, gradient_QW: Tensor) -> tuple[Tensor, None, None]:
        (place_T,) = ctx.saved_tensors
        return gradient_QW.index_select(0, place_T), None, None


class _TakeBack(torch.autograd.Function):
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


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
