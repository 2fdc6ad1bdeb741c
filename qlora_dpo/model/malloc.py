"""Settings of glibc's malloc that decide when freed memory goes back to the system; no effect elsewhere."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


class HeapTrimmer:
    """Keeps a run on a CPU near its plan: blocks of ever-changing lengths would fragment the heap without end.

    What `malloc_retain` keeps is returned after a row (a micro-batch) that leaves the process near its plan. A row that
    starts without freed memory takes longer, so it is not returned after every row (benchmarks/README.md).
    """

    def __init__(self, planned_bytes: int) -> None:
        """A step is planned to take `planned_bytes` beyond what the process holds now without freed memory."""
        malloc_trim()
        self.limit = MAX_HEAP_SHARE * (rss_bytes() + planned_bytes)

    def after_backward(self) -> None:
        """Return freed memory to the system if the process holds nearly all that was planned for it."""
        if rss_bytes() > self.limit:
            malloc_trim()


def rss_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not report it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0
