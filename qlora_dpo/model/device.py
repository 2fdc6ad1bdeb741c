"""Selects device, compute dtype and attention backend, with a reason for each; nothing else queries the hardware."""

import os
from dataclasses import dataclass
from inspect import signature
from typing import Literal, assert_never

import torch

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.gpu_specs import GpuSpec

ComputeDtype = Literal["bf16", "fp16", "fp32"]
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Device:
    """Device and precision of a run. LoRA weights and optimizer state are float32 in every case."""

    type: Literal["cpu", "cuda"]
    name: str
    compute_dtype: ComputeDtype
    dtype_reason: str
    attention: Literal["spans", "batched", "varlen"]
    attention_reason: str
    triton: bool
    total_bytes: int

    @property
    def torch_device(self) -> torch.device:
        """The device that holds the tensors."""
        return torch.device(self.type)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return TORCH_DTYPES[self.compute_dtype]

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the base's unquantized weights, and so of the residual stream.

        bf16 has float32's range, but fp16 ends at 65,504, which some models' activations exceed. There, and on a CPU,
        where memory is cheap, the residual stream stays float32 and only matrix products are computed in 16 bits.
        """
        on_ampere = self.type == "cuda" and self.compute_dtype == "bf16"
        return torch.bfloat16 if on_ampere else torch.float32

    @property
    def embedding_dtype(self) -> torch.dtype:
        """The dtype in which input embeddings and output head are stored.

        For the 7B they take 2.03 GiB in 16 bits and 4.06 GiB in 32. fp16 represents a bf16 weight exactly unless it is
        smaller than 6e-5, and then to 3e-8. On a CPU they have the dtype of the other weights.
        """
        return self.torch_dtype if self.type == "cuda" else self.weight_dtype

    @property
    def tolerance(self) -> float:
        """Largest change of several log-probabilities by rounding alone, relative to their L2 norm."""
        return 1e-4 if self.compute_dtype == "fp32" else 2e-2

    @property
    def needs_grad_scaler(self) -> bool:
        """True for fp16, whose gradients need loss scaling."""
        return self.compute_dtype == "fp16"

    def autocast(self) -> torch.autocast:
        """The autocast context of forward passes."""
        return torch.autocast(self.type, dtype=self.torch_dtype, enabled=self.compute_dtype != "fp32")

    def describe(self) -> list[str]:
        """The decisions and their reasons, one per line."""
        scaler = " + GradScaler" if self.needs_grad_scaler else ""
        return [
            f"device      {self.name} ({self.type}, {self.total_bytes / 2**30:.0f} GiB)",
            f"compute     {self.compute_dtype}{scaler}: {self.dtype_reason}",
            "adapter     float32 weights, gradients and optimizer state; float32 loss and log-softmax",
            f"attention   {self.attention}: {self.attention_reason}; Triton {'allowed' if self.triton else 'not used'}",
        ]


def has_gpu() -> bool:
    """True if there is a GPU to train on."""
    return torch.cuda.is_available()


def check_gpu_count(processes: int) -> None:
    """Raise RecipeError if this machine has GPUs but fewer than `processes`; each process needs one."""
    gpus = torch.cuda.device_count() if has_gpu() and processes > 1 else processes
    if processes > gpus:
        raise RecipeError(
            f"--processes {processes}: each takes a GPU, and this machine has {gpus}; name at most {gpus}"
        )


def select_device(dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto") -> Device:
    """Select device, compute dtype and the attention backend for packed rows.

    With fp16 on a GPU, matrix products accumulate in float32 from here on. Raises RecipeError for a dtype that this
    device cannot train in.
    """
    return _select_cuda(dtype) if has_gpu() else _select_cpu(dtype)


def _select_cuda(dtype: Literal["auto", "bf16", "fp16", "fp32"]) -> Device:
    gpu = GpuSpec(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        torch.cuda.get_device_properties(None).total_memory,
    )
    device = device_for_gpu(gpu, dtype)
    if device.compute_dtype == "fp16":
        # cuBLAS may split the sum over 2,048 tokens in lora_B's gradient, and add the parts in fp16
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return device


def device_for_gpu(gpu: GpuSpec, dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto") -> Device:
    """The device settings for a GPU model, which need not be in this machine.

    Raises RecipeError for bf16 on a GPU that would emulate it.
    """
    # by capability, since is_bf16_supported() is True even where bf16 is only emulated, as on a T4
    major, minor = gpu.capability
    ampere = (major, minor) >= (8, 0)
    chosen: ComputeDtype
    match dtype:
        case "auto":
            chosen = "bf16" if ampere else "fp16"
            support = "has native bf16" if ampere else "is below (8, 0), where bf16 is only emulated"
            reason = f"capability ({major}, {minor}) {support}"
        case "bf16" if not ampere:
            # SDPA's memory-efficient kernel has no bf16 there, and its math kernel keeps all scores for backward
            raise RecipeError(
                f'model.dtype = "bf16": {gpu.name} has capability ({major}, {minor}), below (8, 0), so bf16 would '
                'only be emulated, and attention would hold all scores at once; choose "auto", "fp16" or "fp32"'
            )
        case "bf16" | "fp16" | "fp32":
            chosen, reason = dtype, "the recipe asks for it"
        case never:
            assert_never(never)
    attention, attention_reason = _select_attention(ampere, chosen)
    return Device(
        type="cuda",
        name=gpu.name,
        compute_dtype=chosen,
        dtype_reason=reason,
        attention=attention,
        attention_reason=attention_reason,
        triton=ampere,
        total_bytes=gpu.total_bytes,
    )


def _select_attention(ampere: bool, dtype: ComputeDtype) -> tuple[Literal["batched", "varlen"], str]:
    """The attention backend for packed rows on a GPU, and the reason."""
    if not ampere:
        reason = "flash attention needs capability (8, 0)"
    elif dtype == "fp32":
        reason = "flash attention computes in 16 bits only"
    elif not has_varlen():
        reason = f"torch {torch.__version__} has no varlen_attn with a window; 2.11 has"
    else:
        return "varlen", "variable-length flash attention"
    return "batched", f"SDPA over padded spans, since {reason}"


def _select_cpu(dtype: Literal["auto", "bf16", "fp16", "fp32"]) -> Device:
    chosen: ComputeDtype
    match dtype:
        case "auto" if not cpu_has_bf16():
            chosen, reason = "fp32", "this CPU has no bf16 instructions"
        case "auto" if _cpu_bf16_is_slow():
            chosen, reason = "fp32", "this CPU's bf16 instructions are slower than fp32, since it shows no AMX"
        case "auto":
            # benchmarks/README.md: gradients at a cosine above 0.999 to those of fp32
            chosen, reason = "bf16", "this CPU has bf16 instructions, which are faster than fp32"
        case "bf16" | "fp32":
            chosen, reason = dtype, "the recipe asks for it"
        case "fp16":
            raise RecipeError('model.dtype = "fp16" needs a GPU; on this CPU choose "auto", "bf16" or "fp32"')
        case never:
            assert_never(never)
    return Device(
        type="cpu",
        name=f"CPU, {torch.get_num_threads()} threads",
        compute_dtype=chosen,
        dtype_reason=reason,
        attention="spans",
        attention_reason="SDPA span by span, without padding",
        triton=False,
        total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def has_varlen() -> bool:
    """True if torch has variable-length attention with a window and a scale, as since 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "scale"} <= signature(varlen_attn).parameters.keys()


def cpu_has_bf16() -> bool:
    """True if the CPU multiplies bf16 natively (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _cpu_bf16_is_slow() -> bool:
    """True for Intel's Sapphire Rapids and later without AMX, which virtual machines often hide.

    AVX512-BF16 alone then takes 1.7 times as long as float32 (benchmarks/README.md). AMD's CPUs, where it takes half as
    long, have no AVX512-FP16.
    """
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_fp16") and not capabilities.get("amx_bf16"))
