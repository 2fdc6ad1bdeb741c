"""A sequence whose items are made when they are asked for, so that a large data set stays on disk."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Columns = Mapping[str, Callable[[], NDArray[Any]]]
"""What is known of all items without making one: by name, a function that returns an array with a row for each."""


class Lazily(Sequence[T]):
    """`count` items, of which `make(index)` makes one anew each time; equal to a sequence of equal items.

    `columns` tell something of every item at once.
    """

    def __init__(self, count: int, make: Callable[[int], T], columns: Columns = MappingProxyType({})) -> None:
        self._count, self._make, self.columns = count, make, columns

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Lazily[T]": ...
    def __getitem__(self, index: int | slice) -> "T | Lazily[T]":
        if isinstance(index, slice):
            return self.only(range(self._count)[index])
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._make(int(index) % self._count)

    def only(self, places: Sequence[int] | Any) -> "Lazily[T]":
        """The items at `places`, in that order; they too are made when they are asked for."""
        chosen = np.asarray(places, dtype=np.int64)
        columns = {name: _chosen(column, chosen) for name, column in self.columns.items()}
        return Lazily(len(chosen), lambda index: self._make(int(chosen[index])), columns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # its items may be of any kind


def picked(items: Sequence[T], places: Sequence[int] | Any) -> Lazily[T]:
    """The `items` at `places`, in that order."""
    if isinstance(items, Lazily):
        return items.only(places)
    return Lazily(len(places), lambda index: items[int(places[index])])


def joined(parts: Sequence[Sequence[T]]) -> Lazily[T]:
    """The items of several sequences, one after another."""
    ends: list[int] = []
    for part in parts:
        ends.append((ends[-1] if ends else 0) + len(part))

    def make(index: int) -> T:
        number = bisect_right(ends, index)
        return parts[number][index - (ends[number - 1] if number else 0)]

    known = [part.columns if isinstance(part, Lazily) else {} for part in parts]
    names = set.intersection(*(set(columns) for columns in known)) if known else set[str]()
    return Lazily(ends[-1] if ends else 0, make, {name: _together(known, name) for name in names})


def _chosen(column: Callable[[], NDArray[Any]], places: NDArray[np.int64]) -> Callable[[], NDArray[Any]]:
    return lambda: column()[places]


def _together(parts: Sequence[Columns], name: str) -> Callable[[], NDArray[Any]]:
    return lambda: np.concatenate([columns[name]() for columns in parts])
