"""Progress of reading a data set, reported to a callback."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

_T = TypeVar("_T")

ProgressCallback = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Called with the phase and the number of items; the context manager yields a function that takes newly done items."""
PROGRESS_INTERVAL = 256
"""Items between two reports."""


def no_progress(phase: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Report nothing."""
    return nullcontext(lambda count: None)


def track_progress(items: Iterable[_T], phase: str, total: int, progress: ProgressCallback) -> Iterator[_T]:
    """Yield `items` and report every PROGRESS_INTERVAL of them."""
    with progress(phase, total) as advance:
        for number, item in enumerate(items, 1):
            yield item
            if number % PROGRESS_INTERVAL == 0:
                advance(PROGRESS_INTERVAL)
