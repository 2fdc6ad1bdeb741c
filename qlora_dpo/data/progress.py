"""Lets somebody watch how far a long reading has come."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

T = TypeVar("T")

Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Given what is counted and how many there are, it is told of each that is done."""
EVERY = 256


def unwatched(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Tell nobody."""
    return nullcontext(lambda count: None)


def watched(items: Iterable[T], what: str, total: int, watch: Watch) -> Iterator[T]:
    """The `items`, one after another; `watch` is told of each few hundred."""
    with watch(what, total) as advance:
        for number, item in enumerate(items, 1):
            yield item
            if number % EVERY == 0:
                advance(EVERY)
