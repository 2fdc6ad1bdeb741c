"""Memory that is free and in use, and which weights may be cached in the compute dtype within it."""

import gc
import os
from pathlib import Path

import torch
from torch import nn

from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.quantized import cache_at_first_use, cache_dequantized

USABLE_FRACTION = 0.9
"""Fraction of the free bytes that plans may use: estimates have been off by at most a tenth (benchmarks/README.md)."""


def free_bytes(device: Device) -> int:
    """Bytes that this process can still allocate: on its GPU, or in RAM as `free_ram_bytes` says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free_ram_bytes()


def free_ram_bytes() -> int:
    """Bytes of RAM that this process can still allocate within the limit of its control group.

    They are divided evenly among the ranks on one machine.
    """
    return min(_available_bytes(), _cgroup_free_bytes()) // processes.local_world_size()


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():  # macOS and others do not report it; half is usually available
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024


def _cgroup_free_bytes() -> int:
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or its limit is "max"
        return 2**62


def free_cached_memory() -> None:
    """Collect reference cycles, such as that of an adapter and its base, and empty torch's cache of GPU memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def dense_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes in `dtype` of all linear weights that are stored in another dtype."""
    return sum(
        layer.in_features * layer.out_features * dtype.itemsize
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer.weight.dtype != dtype
    )


def cache_at_first_use_if_fits(model: nn.Module, device: Device) -> None:
    """Have quantized weights be dequantized once, for a model that answers, if that takes half of the free memory."""
    if dense_bytes(model, device.torch_dtype) <= USABLE_FRACTION / 2 * free_bytes(device):
        cache_at_first_use(model)


def cache_dequantized_if_fits(model: nn.Module, device: Device, headroom: int) -> tuple[bool, str]:
    """Cache the linear weights in the compute dtype, beside their stored form, if that takes at most `headroom` bytes.

    Returns whether they are cached, and a sentence that says so.
    """
    needed = dense_bytes(model, device.torch_dtype)
    if fits := needed <= headroom:
        cache_dequantized(model, device.torch_dtype)
    return fits, (
        f"weights: the linear layers take {needed / 2**30:.1f} GiB in {device.compute_dtype}, and "
        f"{headroom / 2**30:.1f} GiB are free for that: converted {'once' if fits else 'at each use'}"
    )
