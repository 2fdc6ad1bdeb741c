"""A stretch of a packed row whose tokens follow one another in their sequence, and which tokens of the row it sees."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of a row, which stand one after another in their sequence.

    `prefix` are the stretches of the row that come before them in that sequence, in order.
    """

    start: int
    stop: int
    prefix: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the span itself."""
        return self.stop - self.start

    @cached_property
    def visible_ranges(self) -> tuple[tuple[int, int], ...]:
        """The stretches of the row that its last token sees, itself included; neighbours are joined."""
        joined: list[tuple[int, int]] = []
        for start, stop in (*self.prefix, (self.start, self.stop)):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        return tuple(joined)

    @cached_property
    def num_visible(self) -> int:
        """Tokens that its last token sees, itself included."""
        return sum(stop - start for start, stop in self.visible_ranges)

    def tiles(self, tokens: int) -> Iterator["Span"]:
        """The span cut into stretches of at most so many tokens, each of which sees those before it."""
        for start in range(self.start, self.stop, tokens):
            own = ((self.start, start),) if start > self.start else ()
            yield Span(start, min(start + tokens, self.stop), (*self.prefix, *own))

    @cached_property
    def visible(self) -> NDArray[np.int64]:
        """The tokens of the row that its last token sees, in the order of the sequence."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.visible_ranges])
