"""A sequence whose items are made when they are asked for, so that a large data set stays on disk."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")
ColumnLoaders = Mapping[str, Callable[[], NDArray[Any]]]
"""What is known of all items without making one: by name, a function that returns an array with a row for each."""


class LazySequence(Sequence[_T]):
    """`count` items, of which `make(index)` makes one anew each time; equal to a sequence of equal items.

    `columns` tell something of every item at once.
    """

    def __init__(self, count: int, make: Callable[[int], _T], columns: ColumnLoaders = MappingProxyType({})) -> None:
        self._count, self._make, self.columns = count, make, columns

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> "LazySequence[_T]": ...
    def __getitem__(self, index: int | slice) -> "_T | LazySequence[_T]":
        if isinstance(index, slice):
            return self.select(range(self._count)[index])
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._make(int(index) % self._count)

    def select(self, places: Sequence[int] | Any) -> "LazySequence[_T]":
        """The items at `places`, in that order; they too are made when they are asked for."""
        chosen = np.asarray(places, dtype=np.int64)
        columns = {name: _select_column(column, chosen) for name, column in self.columns.items()}
        return LazySequence(len(chosen), lambda index: self._make(int(chosen[index])), columns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # its items may be of any kind


def select_items(items: Sequence[_T], places: Sequence[int] | Any) -> LazySequence[_T]:
    """The `items` at `places`, in that order."""
    if isinstance(items, LazySequence):
        return items.select(places)
    return LazySequence(len(places), lambda index: items[int(places[index])])


def concatenate_sequences(parts: Sequence[Sequence[_T]]) -> LazySequence[_T]:
    """The items of several sequences, one after another."""
    ends: list[int] = []
    for part in parts:
        ends.append((ends[-1] if ends else 0) + len(part))

    def make(index: int) -> _T:
        number = bisect_right(ends, index)
        return parts[number][index - (ends[number - 1] if number else 0)]

    known = [part.columns if isinstance(part, LazySequence) else {} for part in parts]
    names = set.intersection(*(set(columns) for columns in known)) if known else set[str]()
    return LazySequence(ends[-1] if ends else 0, make, {name: _concatenate_column(known, name) for name in names})


def _select_column(column: Callable[[], NDArray[Any]], places: NDArray[np.int64]) -> Callable[[], NDArray[Any]]:
    return lambda: column()[places]


def _concatenate_column(parts: Sequence[ColumnLoaders], name: str) -> Callable[[], NDArray[Any]]:
    return lambda: np.concatenate([columns[name]() for columns in parts])
