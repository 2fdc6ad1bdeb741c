"""A sequence whose items are made when they are read, so that a large data set stays on disk.

Arrow cannot hold this one: text pairs are parsed from the rows of a file, with the columns that a recipe names.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")
ColumnLoaders = Mapping[str, Callable[[], NDArray[Any]]]
"""Columns by name, each loaded without making an item: a function that returns an array with a row per item."""


class LazySequence(Sequence[_T]):
    """`count` items, each made by `make(index)` at every access; equal to any sequence of equal items.

    `columns` hold values of all items, such as their lengths.
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

    def select(self, indices: Sequence[int] | Any) -> "LazySequence[_T]":
        """The items at `indices`, in that order; they are made when they are read."""
        index_S = np.asarray(indices, dtype=np.int64)
        columns = {name: _select_column(column, index_S) for name, column in self.columns.items()}
        return LazySequence(len(index_S), lambda index: self._make(int(index_S[index])), columns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(item == theirs for item, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # items may be unhashable


def select_items(items: Sequence[_T], indices: Sequence[int] | Any) -> LazySequence[_T]:
    """The `items` at `indices`, in that order."""
    if isinstance(items, LazySequence):
        return items.select(indices)
    return LazySequence(len(indices), lambda index: items[int(indices[index])])


def concatenate_sequences(parts: Sequence[Sequence[_T]]) -> LazySequence[_T]:
    """The items of several sequences, one after another."""
    ends: list[int] = []
    for part in parts:
        ends.append((ends[-1] if ends else 0) + len(part))

    def make(index: int) -> _T:
        number = bisect_right(ends, index)
        return parts[number][index - (ends[number - 1] if number else 0)]

    columns_by_part = [part.columns if isinstance(part, LazySequence) else {} for part in parts]
    names = set.intersection(*(set(columns) for columns in columns_by_part)) if columns_by_part else set[str]()
    return LazySequence(
        ends[-1] if ends else 0, make, {name: _concatenate_column(columns_by_part, name) for name in names}
    )


def _select_column(column: Callable[[], NDArray[Any]], index_S: NDArray[np.int64]) -> Callable[[], NDArray[Any]]:
    return lambda: column()[index_S]


def _concatenate_column(parts: Sequence[ColumnLoaders], name: str) -> Callable[[], NDArray[Any]]:
    return lambda: np.concatenate([columns[name]() for columns in parts])
