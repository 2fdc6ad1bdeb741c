"""Time and memory limits for running a chat template, which comes with a model and is untrusted code.

SECURITY.md promises both limits, and transformers' sandbox has neither: a template can loop without writing anything,
which a check of its output alone would not end.
"""

import gc
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class LimitExceeded(Exception):
    """A limit was exceeded; the text says which, as in "takes longer than 10 seconds"."""


@contextmanager
def limit_resources(seconds: float, extra_bytes: int) -> Iterator[None]:
    """Raise LimitExceeded if the block runs longer than `seconds` or allocates more than `extra_bytes`.

    The timer is the process's SIGALRM, which only the main thread can set, so other threads have no time limit. Memory
    is limited on Linux only, where /proc shows the size of the process.
    """
    with _limit_time(seconds), _limit_memory(extra_bytes):
        yield


@contextmanager
def infrequent_gc() -> Iterator[None]:
    """Run the cyclic garbage collector rarely: by default it scans all live objects every few thousand new rows.

    That takes an eighth of the time of reading a data set. Objects without cycles are freed at once in any case.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(200_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@contextmanager
def _limit_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_timeout(number: int, frame: FrameType | None) -> None:
        raise LimitExceeded(f"takes longer than {seconds:g} seconds")

    previous_handler = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


@contextmanager
def _limit_memory(extra_bytes: int) -> Iterator[None]:
    statm: Any = Path("/proc/self/statm")
    if not statm.is_file():  # pragma: no cover - not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + extra_bytes
    limit = limit if soft == resource.RLIM_INFINITY else min(soft, limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError as error:
        raise LimitExceeded(f"asks for more than {extra_bytes / 2**30:g} GiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
