"""Bounds on what foreign code may take: seconds and memory, while a chat template that came with a model is run."""

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
    """A limit was passed; the text says which, as in "takes longer than 10 seconds"."""


@contextmanager
def limit_resources(seconds: float, extra_bytes: int) -> Iterator[None]:
    """Raise LimitExceeded if the block runs longer than `seconds`, or asks for `extra_bytes` more than the process has.

    The clock is the process's alarm, which only the main thread can set: in other threads there is no limit of time.
    Memory is limited where the kernel tells what the process has (Linux).
    """
    with _limit_time(seconds), _limit_memory(extra_bytes):
        yield


@contextmanager
def infrequent_gc() -> Iterator[None]:
    """Let Python look for cycles of garbage rarely: it goes through all that is alive, for each few thousand new rows.

    An eighth of the time that reading takes; what makes no cycles is freed at once in any case.
    """
    before = gc.get_threshold()
    gc.set_threshold(200_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _limit_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise LimitExceeded(f"takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _limit_memory(extra_bytes: int) -> Iterator[None]:
    statm: Any = Path("/proc/self/statm")
    if not statm.is_file():  # pragma: no cover - not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(statm.read_text().split()[0]) * resource.getpagesize() + extra_bytes
    lower = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
    resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
    try:
        yield
    except MemoryError as error:
        raise LimitExceeded(f"asks for more than {extra_bytes / 2**30:g} GiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
