"""Rows that are read by index, and sums of rows, forward and backward: against float64, and the same every time."""

from collections.abc import Callable

import kernel_devices
import pytest
import torch
from kernel_devices import ONE_PRODUCT, PLACES, Where, apart
from torch import Tensor

from qlora_dpo.model.packed.gather import gather_rows, gather_rows_padded, gather_rows_unique, sum_rows

TOKENS, WIDTH, PLACES_READ = 400, 96, 3000
Function = Callable[[Tensor], Tensor]


def drawn() -> dict[str, Tensor]:
    """Tokens read several times each, token 0 by a third of all places, and once each with padding between them."""
    generator = torch.Generator().manual_seed(0)
    token_N = torch.randint(0, TOKENS, (PLACES_READ,), generator=generator)
    token_N[::3] = 0
    token_N[-TOKENS:] = torch.arange(TOKENS)
    place_T = torch.randperm(2 * TOKENS, generator=generator)[:TOKENS]
    query_Q = torch.zeros(2 * TOKENS, dtype=torch.long)
    query_Q[place_T] = torch.arange(TOKENS)
    order_N, counts_T = token_N.argsort(stable=True), token_N.bincount(minlength=TOKENS)
    return {"token": token_N, "order": order_N, "counts": counts_T, "place": place_T, "query": query_Q}


def ours(name: str, index: dict[str, Tensor]) -> Function:
    match name:
        case "read several times":
            return lambda x_TW: gather_rows(x_TW, index["token"], index["order"], index["counts"])
        case "read once and put back":
            return lambda x_TW: gather_rows_unique(
                gather_rows_padded(x_TW, index["query"], index["place"]) * 2, index["place"]
            )
        case _:
            read = ours("read several times", index)
            return lambda x_TW: sum_rows(read(x_TW).float(), index["counts"])  # as everywhere, in float32


def plain(name: str, index: dict[str, Tensor]) -> Function:
    match name:
        case "read several times":
            return lambda x_TW: x_TW[index["token"]]
        case "read once and put back":
            return lambda x_TW: 2 * x_TW[index["query"]][index["place"]]
        case _:
            return lambda x_TW: torch.stack(
                [part.sum(0) for part in x_TW[index["token"]].split(index["counts"].tolist())]
            )


@PLACES
@pytest.mark.parametrize("name", ["read several times", "read once and put back", "read and summed"])
def test_reading_and_summing_rows_is_plain_indexing_in_float64_and_the_same_every_time(
    name: str, where: Where, dtype: str
) -> None:
    place = kernel_devices.chosen(where, dtype)
    index, generator = drawn(), torch.Generator().manual_seed(1)
    x_TW = torch.randn(TOKENS, WIDTH, generator=generator).to(place.torch_dtype)
    exact_TW = x_TW.double().requires_grad_()
    expected = plain(name, index)(exact_TW)
    slope = torch.randn(expected.shape, generator=generator).to(place.torch_dtype)
    (expected_slope,) = torch.autograd.grad(expected, exact_TW, slope.double())
    on_device = {key: numbers.to(place.torch_device) for key, numbers in index.items()}
    results = []
    for _ in range(3):
        leaf_TW = x_TW.to(place.torch_device).requires_grad_()
        found = ours(name, on_device)(leaf_TW)
        (found_slope,) = torch.autograd.grad(found, leaf_TW, slope.to(found.device, found.dtype))
        assert apart(found, expected) < ONE_PRODUCT[dtype]
        assert apart(found_slope, expected_slope) < ONE_PRODUCT[dtype]
        results.append((found, found_slope))
    assert all(torch.equal(each[part], results[0][part]) for each in results[1:] for part in (0, 1))
