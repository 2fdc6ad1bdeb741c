"""Where the tests of kernels compute: on the CPU in the default suite, and the same on a GPU with `pytest -m gpu`."""

from typing import Any, Literal
from unittest import mock

import pytest
import torch
from torch import Tensor

from qlora_dpo.model import device
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import trainable_parameters

Where = Literal["cpu", "cuda"]

NEEDS_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
    # what kernels, drivers and libraries remark on is for the summary: a card is hard to come by
    pytest.mark.filterwarnings("default"),
]
ON_A_GPU = pytest.param("cuda", marks=NEEDS_A_GPU)


def _case(where: Where, dtype: str) -> Any:
    return pytest.param(where, dtype, id=f"{where}-{dtype}", marks=NEEDS_A_GPU if where == "cuda" else [])


PLACES = pytest.mark.parametrize(
    ("where", "dtype"),
    [
        _case("cpu", "fp32"),
        _case("cpu", "bf16"),
        _case("cuda", "fp32"),
        _case("cuda", "fp16"),
        _case("cuda", "bf16"),
    ],
)
"""Every device with the dtypes that it computes in."""

# relative L2 distances that rounding explains: fp16 has 11 bits of mantissa, bf16 has 8
ONE_PRODUCT = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.5e-2}
"""Of what is rounded once or twice, from the same in float64."""


def chosen(where: Where, dtype: Any) -> Device:
    """The device of a test, as a run on it would choose; skips bf16 on a card that only emulates it."""
    if where == "cuda" and dtype == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no bf16")
    with mock.patch.object(device, "has_gpu", lambda: where == "cuda"):
        return device.select_device(dtype)


def moved(model: Any, place: Device) -> Any:
    """The model with all that is trained on `place`, wherever it was made."""
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.to(place.torch_device)
    return model


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative distance by L2 norms, in float64 on the CPU."""
    expected = expected.detach().cpu().double()
    return float((found.detach().cpu().double() - expected).norm() / expected.norm())
