"""What a device is found to be able to do, with the reason that is printed."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from qlora_dpo.errors import RecipeError
from qlora_dpo.model import device


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of the given name and capability, as torch would report it."""
    name, capability = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # what torch says of a T4, too
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16 * 2**30))


T4, A10 = ("Tesla T4", (7, 5)), ("NVIDIA A10", (8, 6))


@pytest.mark.parametrize("gpu", [T4], indirect=True)
def test_a_t4_computes_in_fp16_with_a_grad_scaler_and_without_triton(gpu: None) -> None:
    assert device.select_device().describe() == [
        "device      Tesla T4 (cuda, 16 GiB)",
        "compute     fp16 + GradScaler: capability (7, 5) is below (8, 0), where bf16 is only emulated",
        "adapter     float32 weights, gradients and optimizer state; float32 loss and log-softmax",
        "attention   batched: SDPA over padded spans, since flash attention needs capability (8, 0); Triton not used",
    ]


@pytest.mark.parametrize("gpu", [A10], indirect=True)
def test_an_ampere_gpu_computes_in_bf16(gpu: None) -> None:
    assert device.select_device().describe() == [
        "device      NVIDIA A10 (cuda, 16 GiB)",
        "compute     bf16: capability (8, 6) has native bf16",
        "adapter     float32 weights, gradients and optimizer state; float32 loss and log-softmax",
        "attention   varlen: variable-length flash attention; Triton allowed",
    ]


@pytest.mark.parametrize("gpu", [("NVIDIA A100", (8, 0))], indirect=True)
def test_capability_8_0_is_the_first_with_bf16(gpu: None) -> None:
    assert device.select_device().compute_dtype == "bf16"


@pytest.mark.parametrize("gpu", [T4, A10], indirect=True)
@pytest.mark.parametrize(("dtype", "scaler"), [("fp32", False), ("fp16", True)])
def test_the_recipe_may_ask_for_another_dtype_on_a_gpu(gpu: None, dtype: str, scaler: bool) -> None:
    chosen = device.select_device(dtype)  # type: ignore[arg-type]
    assert (chosen.compute_dtype, chosen.dtype_reason) == (dtype, "the recipe asks for it")
    assert (chosen.needs_grad_scaler, chosen.torch_dtype) == (scaler, device.TORCH_DTYPES[chosen.compute_dtype])


@pytest.mark.parametrize(("gpu", "reduced"), [(T4, False), (A10, True)], indirect=["gpu"])
def test_in_fp16_no_product_is_summed_in_fp16(gpu: None, reduced: bool) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = True  # torch's own choice
    device.select_device()
    found = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = True
    assert found == reduced


@pytest.mark.parametrize("gpu", [T4], indirect=True)
def test_bf16_is_refused_on_a_gpu_that_would_only_emulate_it(gpu: None) -> None:
    with pytest.raises(RecipeError) as error:
        device.select_device("bf16")
    assert str(error.value) == (
        'model.dtype = "bf16": Tesla T4 has capability (7, 5), below (8, 0), so bf16 would only be emulated, and '
        'attention would hold all scores at once; choose "auto", "fp16" or "fp32"'
    )


@pytest.mark.parametrize(
    ("capabilities", "dtype", "reason"),
    [
        ({"avx512_bf16": True}, "bf16", "this CPU has bf16 instructions, which are faster than fp32"),
        ({"amx_bf16": True}, "bf16", "this CPU has bf16 instructions, which are faster than fp32"),
        ({"avx2": True}, "fp32", "this CPU has no bf16 instructions"),
        (  # Sapphire Rapids in a virtual machine that hides AMX
            {"avx512_bf16": True, "avx512_fp16": True},
            "fp32",
            "this CPU's bf16 instructions are slower than fp32, since it shows no AMX",
        ),
        (
            {"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True},
            "bf16",
            "this CPU has bf16 instructions, which are faster than fp32",
        ),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_has_the_instructions(
    capabilities: dict[str, bool], dtype: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    chosen = device.select_device()
    assert chosen.describe()[1:] == [
        f"compute     {dtype}: {reason}",
        "adapter     float32 weights, gradients and optimizer state; float32 loss and log-softmax",
        "attention   spans: SDPA span by span, without padding; Triton not used",
    ]
    assert (chosen.torch_device, chosen.weight_dtype) == (torch.device("cpu"), torch.float32)


NO_FLASH = "SDPA over padded spans, since "


@pytest.mark.parametrize(
    ("gpu", "dtype", "varlen", "expected"),
    [
        (A10, "bf16", True, ("varlen", "variable-length flash attention")),
        (A10, "fp16", True, ("varlen", "variable-length flash attention")),
        (A10, "fp32", True, ("batched", NO_FLASH + "flash attention computes in 16 bits only")),
        (
            A10,
            "bf16",
            False,
            ("batched", NO_FLASH + f"torch {torch.__version__} has no varlen_attn with a window; 2.11 has"),
        ),
        (T4, "fp16", True, ("batched", NO_FLASH + "flash attention needs capability (8, 0)")),
    ],
    indirect=["gpu"],
)
def test_flash_attention_needs_a_card_16_bits_and_a_torch_that_have_it_and_the_one_that_is_missing_is_said(
    gpu: None, dtype: str, varlen: bool, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_varlen", lambda: varlen)
    chosen = device.select_device(dtype)  # type: ignore[arg-type]
    assert (chosen.attention, chosen.attention_reason) == expected


def of_torch_2_11(query: Any, key: Any, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> None:
    """The arguments of varlen_attn that matter here, as torch 2.11 has them."""


def of_torch_2_10(query: Any, key: Any, is_causal: bool = False) -> None:
    """The same of torch 2.10, which has no window."""


@pytest.mark.parametrize(("function", "has"), [(of_torch_2_11, True), (of_torch_2_10, False)])
def test_varlen_attention_is_used_where_it_takes_a_window_and_a_scale(
    function: Any, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.has_varlen()  # torch 2.13, whose function takes grouped heads too
    monkeypatch.setattr(varlen, "varlen_attn", function)
    assert device.has_varlen() == has


def test_without_varlen_attention_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert not device.has_varlen()


def test_fp16_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError) as error:
        device.select_device("fp16")
    assert str(error.value) == 'model.dtype = "fp16" needs a GPU; on this CPU choose "auto", "bf16" or "fp32"'
