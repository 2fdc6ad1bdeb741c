"""Lets somebody watch how far a long reading has come."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

_T = TypeVar("_T")

ProgressCallback = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Given what is counted and how many there are, it is told of each that is done."""
PROGRESS_INTERVAL = 256


def no_progress(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Tell nobody."""
    return nullcontext(lambda count: None)


def track_progress(items: Iterable[_T], what: str, total: int, watch: ProgressCallback) -> Iterator[_T]:
    """The `items`, one after another; `watch` is told of each few hundred."""
    with watch(what, total) as advance:
        for number, item in enumerate(items, 1):
            yield item
            if number % PROGRESS_INTERVAL == 0:
                advance(PROGRESS_INTERVAL)
