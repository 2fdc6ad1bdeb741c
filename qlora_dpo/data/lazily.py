"""A sequence whose items are made when they are asked for, so that a large data set stays on disk."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

T = TypeVar("T")


class Lazily(Sequence[T]):
    """`count` items, of which `make(index)` makes one anew each time; equal to a sequence of equal items."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

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
        return Lazily(len(places), lambda index: self._make(int(places[index])))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # its items may be of any kind


def joined(parts: Sequence[Sequence[T]]) -> Lazily[T]:
    """The items of several sequences, one after another."""
    ends: list[int] = []
    for part in parts:
        ends.append((ends[-1] if ends else 0) + len(part))

    def make(index: int) -> T:
        number = bisect_right(ends, index)
        return parts[number][index - (ends[number - 1] if number else 0)]

    return Lazily(ends[-1] if ends else 0, make)
