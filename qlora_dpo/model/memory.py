"""What fits in memory: bytes that are free, bytes a step keeps for its backward pass, and what follows from both."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.quantized import cache_dequantized

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt, as malloc.h numbers them."""

USABLE_FRACTION = 0.9
"""Share of the free bytes that is planned with: a plan has been wrong by a tenth at most (benchmarks/README.md)."""


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that one token keeps in one layer for the backward pass, and bytes of the layer's input alone."""

    layer: float
    layer_input: float
    working: float = 0.0
    """Bytes of a token that one layer's backward pass takes while it works, on top of what is kept."""
    forward: float = 0.0
    """Bytes of a token that a pass without gradients takes at most; nothing is kept then."""

    def bytes(self, tokens: int, layers: int, checkpointed: int) -> float:
        """Bytes kept for `tokens` at the moment most are kept, with so many of the layers checkpointed.

        A checkpointed layer keeps its input, and is computed again as a whole when its turn comes.
        """
        again = self.layer if checkpointed else 0.0
        return tokens * ((layers - checkpointed) * self.layer + checkpointed * self.layer_input + again)


def free_bytes(device: Device) -> int:
    """Bytes that this process can still take: of its GPU, or of the machine within the limit of its control group.

    Processes that train together on one machine share its memory alike.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(_available_bytes(device), _cgroup_free_bytes()) // processes.local_world_size()


def _available_bytes(device: Device) -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return device.total_bytes // 2  # macOS and others do not say; half of it is usually there
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024


def _cgroup_free_bytes() -> int:
    home = Path("/sys/fs/cgroup")
    try:
        most, used = ((home / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(most) - int(used))
    except (OSError, ValueError):  # no control group, or "max"
        return 2**62


def malloc_retain(*, retain: bool = True) -> None:
    """Let the C library keep what a step frees for the next one; without `keep`, do as it does unasked.

    glibc hands blocks of 32 MiB and more back to the system at once, which has to zero their pages when the next block
    is asked for: a tenth of a step of the 0.5B model (benchmarks/README.md). Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    largest_unmapped = 2**25  # what glibc's own threshold grows to
    for name, kept, unasked in (
        (M_MMAP_MAX, 0, 2**16),
        (M_TRIM_THRESHOLD, -1, 2 * largest_unmapped),
        (M_MMAP_THRESHOLD, largest_unmapped, largest_unmapped),
    ):
        mallopt(name, kept if retain else unasked)


@contextmanager
def malloc_release_eagerly() -> Iterator[None]:
    """Inside, the C library hands every freed block of a MiB and more back to the system, as while weights are read.

    Read in several threads, what is converted on the way would otherwise stay in each thread's heap: 350 MiB of a model
    of 135 M parameters.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
    yield
    malloc_trim()
    malloc_retain(retain=False)


def malloc_trim() -> None:
    """Hand what was freed back to the system now: glibc keeps small blocks, such as 4-bit weights, for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def dense_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of all linear weights in `dtype` whose stored form is another."""
    return sum(
        layer.in_features * layer.out_features * dtype.itemsize
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer.weight.dtype != dtype
    )


def cache_dequantized_if_fits(model: nn.Module, device: Device, headroom: int) -> tuple[bool, str]:
    """Keep the linear weights in the compute dtype beside their stored form if they take no more than `headroom` bytes.

    True if they are kept, and what was done in words.
    """
    need = dense_bytes(model, device.torch_dtype)
    if fits := need <= headroom:
        cache_dequantized(model, device.torch_dtype)
    return fits, (
        f"weights: the linear layers take {need / 2**30:.1f} GiB in {device.compute_dtype}, and {headroom / 2**30:.1f} GiB "
        f"are free for that: converted {'once' if fits else 'in every layer visit'}"
    )


def rss_bytes() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0


def measure_activation_bytes(model: Any, forward: Callable[[], Tensor], tokens: int) -> ActivationBytes:
    """Measure what a layer keeps per token: run `forward` over `tokens` tokens and look at what autograd saves."""
    layers, width = checkpointable_layers(model), model.config.get_text_config().hidden_size
    inputs = {"itemsize": model.get_input_embeddings().weight.dtype.itemsize}
    frozen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in frozen:
            saved[storage._cdata] = storage.nbytes()
        return tensor.detach()  # a node that saves its own output would otherwise hold itself, and all before it

    def look(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given:  # embeddings may be stored in another dtype than the stream has
            inputs["itemsize"] = given[0].dtype.itemsize

    hooks = [layer.register_forward_pre_hook(look) for layer in layers[:1]]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = forward()
        del out
    finally:
        for hook in hooks:
            hook.remove()
    return ActivationBytes(
        layer=sum(saved.values()) / tokens / max(1, len(layers)), layer_input=width * inputs["itemsize"]
    )


def checkpointable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers whose activations can be recomputed, in the model's order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def set_gradient_checkpointing(model: Any, count: int) -> None:
    """Recompute the first `count` layers in the backward pass, and keep the activations of the others."""
    if count:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for index, layer in enumerate(checkpointable_layers(model)):
        layer.gradient_checkpointing = index < count
