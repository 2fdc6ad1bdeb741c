"""What is wrong with the data, and what is left of it: rows read, pairs used, rows dropped by reason, token lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qlora_dpo.errors import DataError

if TYPE_CHECKING:
    from qlora_dpo.data.encoded import EncodedPair

OVERLONG = "longer than max_length"
"""The reason of a pair that is left out for its length alone."""


@dataclass(frozen=True)
class Audit:
    """The account of one part of the data; `rows == used + not_drawn + all dropped rows`."""

    source: str
    """File or data set and split, as messages name it."""
    shape: str
    """The shape that was recognised."""
    rows: int
    """Rows read."""
    used: int
    """Pairs that are trained on or evaluated."""
    dropped: Mapping[str, tuple[int, ...]]
    """Numbers of the rows left out, counted from 1, by reason."""
    not_drawn: int
    """Rows not looked at further because `max_*_samples` pairs had been drawn."""
    cut: tuple[int, ...]
    """Numbers of the used rows whose prompt was cut at the front."""
    tokens: Mapping[str, tuple[int, int, int]]
    """For prompt, chosen and rejected: the median, the 95th percentile and the longest, in tokens."""
    note: str = ""
    """What a reader should know about the encoding; empty for most chat templates."""

    def table(self) -> list[tuple[str, str]]:
        """Two columns of plain text, one line per count; the second is a number or three."""
        lines = [("rows read", f"{self.rows:,}"), ("pairs used", f"{self.used:,}")]
        if self.cut:
            lines.append(("  of them with the prompt cut", f"{len(self.cut):,}"))
        if self.not_drawn:
            lines.append(("not drawn", f"{self.not_drawn:,}"))
        lines += [(f"dropped: {reason}", f"{len(rows):,}") for reason, rows in self.dropped.items()]
        lines += [
            (f"{part}, tokens (p50 / p95 / max)", " / ".join(map(str, self.tokens[part]))) for part in self.tokens
        ]
        return lines

    def lines(self, numbers: bool = False) -> list[str]:
        """The table as lines of text; with `numbers`, each dropped or cut row is named in a line of its own reason."""
        table = self.table()
        width = max(len(name) for name, _ in table)
        text = [f"{self.source}: {self.shape}", *(f"  {name:<{width}}  {value}" for name, value in table)]
        if self.note:
            text.append(f"  {self.note}")
        return text + (self.numbers() if numbers else [])

    def numbers(self) -> list[str]:
        """The row numbers behind the counts, a line per reason."""
        groups = [*((f"dropped: {reason}", rows) for reason, rows in self.dropped.items()), ("prompt cut", self.cut)]
        return [f"  rows, {reason}: {', '.join(map(str, rows))}" for reason, rows in groups if rows]


def insist_on_few_bad_rows(audit: Audit, most: float) -> None:
    """Raise DataError if more than the share `most` of the rows looked at are no usable pairs.

    A pair that is merely longer than data.max_length is not bad.
    """
    bad = {reason: len(rows) for reason, rows in audit.dropped.items() if reason != OVERLONG}
    count, looked_at = sum(bad.values()), audit.rows - audit.not_drawn
    if count > most * looked_at:
        reasons = ", ".join(f"{reason} ({rows:,})" for reason, rows in bad.items())
        raise DataError(
            f"{audit.source}: {count:,} of {looked_at:,} rows ({count / looked_at:.1%}) are no usable pairs: "
            f"{reasons}; data.max_bad_share = {most:g} allows {most:.1%}; list them with --dropped-rows and mend them, "
            "or raise it"
        )


def quantiles(lengths: Sequence[int]) -> tuple[int, int, int]:
    """Median, 95th percentile (both the lower of two neighbours) and maximum; three zeros for no lengths."""
    if not lengths:
        return 0, 0, 0
    p50, p95, longest = np.quantile(lengths, [0.5, 0.95, 1.0], method="lower")
    return int(p50), int(p95), int(longest)


def baselines(encoded: Sequence["EncodedPair"]) -> dict[str, float]:
    """Accuracy of picking the longer and of picking the shorter answer, in tokens, as shares from 0 to 1.

    A tie counts one half, so the two add up to 1. Raises ValueError without pairs.
    """
    if not encoded:
        raise ValueError("baselines need at least one pair")
    longer = sum(
        0.5 if len(pair.chosen) == len(pair.rejected) else float(len(pair.chosen) > len(pair.rejected))
        for pair in encoded
    ) / len(encoded)
    return {"longer": longer, "shorter": 1 - longer}
