"""The audit of a data set: rows read, pairs used, rows dropped by reason, repairs and token lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.errors import DataError

if TYPE_CHECKING:
    from qlora_dpo.data.encoded import EncodedPair

MAX_REASONS = 20
"""Reasons that a table lists; a hostile file could cause a different one in each row."""
OVERLONG = "longer than max_length"
"""The reason of a pair that is dropped for its length alone."""


@dataclass(frozen=True)
class Audit:
    """The audit of one part of the data: `rows == used - extra_pairs + not_sampled + other_split + all dropped rows`.

    Every row is used as it is, repaired, dropped or not sampled; repaired and dropped rows are listed by number.
    """

    source: str
    """File, or data set and split, as shown in messages."""
    format: str
    """The detected format."""
    rows: int
    """Rows read."""
    used: int
    """Pairs for training or evaluation."""
    dropped: Mapping[str, tuple[int, ...]]
    """Numbers of the dropped rows, from 1, by reason."""
    not_sampled: int
    """Rows that were not encoded because `max_*_samples` pairs had been found."""
    repaired: Mapping[str, tuple[int, ...]]
    """Numbers of the used rows that were changed, by repair; a row can have several repairs."""
    tokens: Mapping[str, tuple[int, int, int]]
    """Median, 95th percentile and maximum length of prompt, chosen and rejected, in tokens; see `part_quantiles`."""
    first_location: Mapping[str, str] = field(default_factory=dict)
    """The location of the first row of each reason: `pairs.jsonl:17`."""
    dropped_at_parse: int = 0
    """Rows dropped before tokenizing; all rows were checked for that, sampled or not."""
    other_split: int = 0
    """Rows of the other part, if a share of the prompts is held out."""
    extra_pairs: int = 0
    """Pairs beyond the first of a row of ranked answers."""
    per_source: tuple[tuple[str, int, int], ...] = ()
    """For a mixture: name, first row number and used pairs of each source."""
    note: str = ""
    """A remark about the encoding; empty for most chat templates."""

    def table(self) -> list[tuple[str, str]]:
        """Rows of two columns of text: a label, and one number or three."""
        counted = "answers" if "answer" in self.tokens else "pairs"
        lines = [("rows read", f"{self.rows:,}"), (f"{counted} used", f"{self.used:,}")]
        ends = [*(first - 1 for _, first, _ in self.per_source[1:]), self.rows]
        for (name, first, used), last in zip(self.per_source, ends, strict=False):
            lines.append((f"  of {name} (rows {first:,} to {last:,})", f"{used:,}"))
        if self.extra_pairs:
            lines.append(("  of them beyond one a row", f"{self.extra_pairs:,}"))
        lines += [(f"  repaired: {repair}", f"{len(rows):,}") for repair, rows in self.repaired.items()]
        if self.other_split:
            lines.append(("of prompts of the other part", f"{self.other_split:,}"))
        if self.not_sampled:
            lines.append(("not drawn", f"{self.not_sampled:,}"))
        dropped = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        lines += [(f"dropped: {reason}", f"{len(rows):,}") for reason, rows in dropped[:MAX_REASONS]]
        if rest := [rows for _, rows in dropped[MAX_REASONS:]]:
            lines.append((f"dropped: {len(rest):,} other reasons", f"{sum(map(len, rest)):,}"))
        lines += [
            (f"{part}, tokens (p50 / p95 / max)", " / ".join(map(str, self.tokens[part]))) for part in self.tokens
        ]
        return lines

    def lines(self, with_row_numbers: bool = False) -> list[str]:
        """The table as lines of text; `with_row_numbers` adds a line per reason with the rows it applies to."""
        table = self.table()
        width = max(len(name) for name, _ in table)
        text = [f"{self.source}: {self.format}", *(f"  {name:<{width}}  {value}" for name, value in table)]
        if self.note:
            text.append(f"  {self.note}")
        return text + (self.row_number_lines() if with_row_numbers else [])

    def row_number_lines(self) -> list[str]:
        """The row numbers of each count, a line per reason."""
        groups = [
            *((f"dropped: {reason}", rows) for reason, rows in self.dropped.items()),
            *((f"repaired: {repair}", rows) for repair, rows in self.repaired.items()),
        ]
        return [f"  rows, {reason}: {', '.join(map(str, rows))}" for reason, rows in groups if rows]

    def to_dict(self) -> dict[str, Any]:
        """The content of audit.json: the whole audit with every row number."""
        return {
            "source": self.source,
            "shape": self.format,
            **(
                {
                    "sources": [
                        dict(zip(("source", "first_row", "used"), counts, strict=True)) for counts in self.per_source
                    ]
                }
                if self.per_source
                else {}
            ),
            "rows": self.rows,
            "used": self.used,
            "further": self.extra_pairs,
            "not_drawn": self.not_sampled,
            "apart": self.other_split,
            "dropped": {reason: list(rows) for reason, rows in self.dropped.items()},
            "repaired": {what: list(rows) for what, rows in self.repaired.items()},
            "tokens": {
                part: dict(zip(("p50", "p95", "max"), quantiles, strict=True))
                for part, quantiles in self.tokens.items()
            },
        }

    def reason_summary(self, exclude: str = "") -> str:
        """Every reason except `exclude`, with its number of rows and the location of the first one."""
        reasons = [
            f"{reason} ({len(rows):,}, first {self.first_location[reason]})"
            if reason in self.first_location
            else f"{reason} ({len(rows):,})"
            for reason, rows in self.dropped.items()
            if reason != exclude
        ]
        return ", ".join(reasons[:5]) + (f" and {len(reasons) - 5} other reasons" if len(reasons) > 5 else "")


def check_bad_share(audit: Audit, max_share: float) -> None:
    """Raise DataError if more than `max_share` of the checked rows are not usable pairs.

    A pair that is merely longer than data.max_length is not bad.
    """
    count = sum(len(rows) for reason, rows in audit.dropped.items() if reason != OVERLONG)
    read, encoded = audit.rows - audit.other_split, audit.rows - audit.other_split - audit.not_sampled
    later = count - audit.dropped_at_parse
    share = audit.dropped_at_parse / max(1, read) + later / max(1, encoded)
    if share > max_share:
        raise DataError(
            f"{audit.source}: {count:,} of {encoded if later else read:,} rows ({share:.1%}) are no usable pairs: "
            f"{audit.reason_summary(exclude=OVERLONG)}; data.max_bad_share = {max_share:g} allows {max_share:.1%}; "
            "list them with --dropped-rows and mend them, or raise it"
        )


def length_quantiles(lengths: Sequence[int] | NDArray[np.int32]) -> tuple[int, int, int]:
    """Median, 95th percentile (each the lower of two neighbours) and maximum; three zeros for no lengths."""
    if not len(lengths):
        return 0, 0, 0
    p50, p95, longest = np.quantile(lengths, [0.5, 0.95, 1.0], method="lower")
    return int(p50), int(p95), int(longest)


def part_quantiles(lengths_P3: NDArray[np.int32]) -> dict[str, tuple[int, int, int]]:
    """`length_quantiles` of prompt, chosen and rejected; of prompt and answer where no pair has a rejected answer."""
    names = ("prompt", "chosen", "rejected")
    if len(lengths_P3) and not lengths_P3[:, 2].any():
        names, lengths_P3 = ("prompt", "answer", ""), lengths_P3[:, :2]
    return dict(zip(names, map(length_quantiles, lengths_P3.T), strict=False))


def length_baselines(encoded: Sequence["EncodedPair"]) -> dict[str, float]:
    """Accuracies (0 to 1) of always preferring the longer and the shorter answer, in tokens.

    A tie counts one half, so the two add up to 1. Empty where there is one answer alone. Raises ValueError without
    pairs.
    """
    if not encoded:
        raise ValueError("baselines need at least one pair")
    if not encoded[0].rejected:
        return {}
    longer = sum(
        0.5 if len(pair.chosen) == len(pair.rejected) else float(len(pair.chosen) > len(pair.rejected))
        for pair in encoded
    ) / len(encoded)
    return {"longer": longer, "shorter": 1 - longer}
