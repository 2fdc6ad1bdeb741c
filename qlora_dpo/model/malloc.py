"""Settings of glibc's malloc that decide when freed memory goes back to the system; no effect elsewhere."""

import ctypes
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt, numbered as in malloc.h."""


def malloc_retain(*, retain: bool = True) -> None:
    """Make malloc keep freed memory for later allocations; `retain=False` restores glibc's defaults.

    By default, glibc returns freed blocks of 32 MiB and more to the system, which has to zero their pages when the next
    such block is allocated: a tenth of a step of the 0.5B model (benchmarks/README.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    largest_unmapped = 2**25  # glibc's own dynamic threshold grows up to this
    for parameter, retaining, default in (
        (M_MMAP_MAX, 0, 2**16),
        (M_TRIM_THRESHOLD, -1, 2 * largest_unmapped),
        (M_MMAP_THRESHOLD, largest_unmapped, largest_unmapped),
    ):
        mallopt(parameter, retaining if retain else default)


@contextmanager
def malloc_release_eagerly() -> Iterator[None]:
    """Inside the context, freed blocks of 1 MiB and more go back to the system at once; for loading weights.

    transformers reads weights in several threads, and what is converted on the way would otherwise stay in each
    thread's heap: 350 MiB for a model of 135 M parameters.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
    yield
    malloc_trim()
    malloc_retain(retain=False)


def malloc_trim() -> None:
    """Return freed memory to the system now; glibc otherwise keeps small blocks, such as 4-bit weights, for reuse."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


MAX_HEAP_SHARE = 0.95
"""Share of its plan that a process may hold before everything free is returned."""


@contextmanager
def limit_heap(layers: Iterable[nn.Module], planned_bytes: int) -> Iterator[None]:
    """Inside the context, a process on a CPU stays near its plan: of `planned_bytes` beyond what it holds now.

    What `malloc_retain` keeps is returned as soon as the process holds nearly all of its plan, which is looked at after
    the forward pass and before the backward pass of each of `layers`: within one row, blocks of other lengths fragment
    the heap by up to three quarters of what is allocated (benchmarks/README.md). It is not returned more often, since
    whatever is allocated afterwards takes longer.
    """
    malloc_trim()
    limit = int(MAX_HEAP_SHARE * (rss_bytes() + planned_bytes))

    def trim_above_limit(*_: object) -> None:
        if rss_bytes() > limit:
            malloc_trim()

    def after_forward(_layer: nn.Module, _args: object, output: Any) -> None:
        trim_above_limit()
        states_BLD = output[0] if isinstance(output, tuple) else output
        if states_BLD.requires_grad:
            states_BLD.register_hook(trim_above_limit)

    handles = [layer.register_forward_hook(after_forward) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rss_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not report it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0
