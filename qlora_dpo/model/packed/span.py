"""A span of consecutive tokens in a packed row, and the tokens of the row that it attends to."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of a row, which are consecutive tokens of one sequence."""

    start: int
    stop: int
    prefix: tuple[tuple[int, int], ...] = ()
    """The ranges of the row that hold the earlier tokens of the sequence, in order."""

    @property
    def tokens(self) -> int:
        """Number of tokens in the span itself."""
        return self.stop - self.start

    @cached_property
    def visible_ranges(self) -> tuple[tuple[int, int], ...]:
        """The ranges of the row that the span's last token attends to, itself included; adjacent ranges are merged."""
        merged: list[tuple[int, int]] = []
        for start, stop in (*self.prefix, (self.start, self.stop)):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], stop)
            else:
                merged.append((start, stop))
        return tuple(merged)

    @cached_property
    def num_visible(self) -> int:
        """Number of tokens that the span's last token attends to, itself included."""
        return sum(stop - start for start, stop in self.visible_ranges)

    def tiles(self, tokens: int) -> Iterator["Span"]:
        """The span cut into tiles of at most `tokens` tokens; each tile has the earlier ones as prefix."""
        for start in range(self.start, self.stop, tokens):
            earlier = ((self.start, start),) if start > self.start else ()
            yield Span(start, min(start + tokens, self.stop), (*self.prefix, *earlier))

    @cached_property
    def visible(self) -> NDArray[np.int64]:
        """Row indices of the tokens that the span's last token attends to, in the order of the sequence."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.visible_ranges])
