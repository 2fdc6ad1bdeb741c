"""Which of the encoded pairs are used, which rows were dropped or repaired, and what to say if too few are left."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from qlora_dpo.data.arrow_columns import read_numbers, valid_rows
from qlora_dpo.data.audit import OVERLONG, Audit
from qlora_dpo.data.encoded import EncodedPairs
from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.mixture import Mixture
from qlora_dpo.data.pairs import IntArray, Pair
from qlora_dpo.data.sources import DataPart, SourceRows
from qlora_dpo.data.templates.chat_template import CONTROL_AS_TEXT, SYSTEM_FOLDED
from qlora_dpo.data.truncation import PROMPT_TRUNCATED
from qlora_dpo.recipe.data import DataTable


class Selection:
    """The table of the pairs that were encoded, and which of them are usable."""

    def __init__(self, encoded: pa.Table, max_length: int) -> None:
        self._table = encoded
        self.position_N: IntArray = read_numbers(encoded, "position")
        every = EncodedPairs(encoded)
        length_N3 = every.lengths()
        is_long_N = length_N3[:, 0] + length_N3[:, 1:].max(axis=1, initial=0) > max_length
        refused_N = np.zeros(len(is_long_N), dtype=bool)
        refused_N[valid_rows(encoded, "reason")] = True
        self._unusable_X = np.flatnonzero(refused_N | is_long_N)
        self._usable_U = np.flatnonzero(~refused_N & ~is_long_N)
        self.encoded = EncodedPairs(encoded, self._usable_U)

    def positions(self) -> IntArray:
        """The position of each usable pair among the parsed pairs (U)."""
        return self.position_N[self._usable_U]

    def dropped_rows(self, at_parse: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Row numbers by reason, those dropped `at_parse` first."""
        dropped = {reason: list(numbers) for reason, numbers in at_parse.items()}
        rows, reasons = read_numbers(self._table, "row")[self._unusable_X].tolist(), self._table["reason"]
        for row, index in zip(rows, self._unusable_X.tolist(), strict=True):
            reason = reasons[index].as_py()
            dropped.setdefault(OVERLONG if reason is None else reason, []).append(row)
        return dropped

    def repaired_rows(self, used: set[int]) -> dict[str, tuple[int, ...]]:
        """Numbers of the `used` rows by repair, the repair with the first row first."""
        repaired: dict[str, list[int]] = {PROMPT_TRUNCATED: [], SYSTEM_FOLDED: [], CONTROL_AS_TEXT: []}
        row_N = read_numbers(self._table, "row")
        for index in np.intersect1d(valid_rows(self._table, "repairs"), self._usable_U).tolist():
            row = int(row_N[index])
            for repair in json.loads(self._table["repairs"][index].as_py()) if row in used else ():
                repaired.setdefault(repair, []).append(row)
        by_first_row = sorted(repaired.items(), key=lambda item: sorted(item[1])[:1])
        return {repair: tuple(sorted(rows)) for repair, rows in by_first_row if rows}

    def texts(self, pairs: Sequence[Pair]) -> LazySequence[Pair]:
        """The usable pairs as text; all but those whose prompt was cut are made from `pairs` when they are read."""
        position_U = self.positions()
        truncated = dict[int, Pair]()
        texts_N = self._table["truncated"]
        for index in np.flatnonzero(np.isin(self._usable_U, valid_rows(self._table, "truncated"))).tolist():
            fields = json.loads(texts_N[int(self._usable_U[index])].as_py())
            truncated[index] = Pair(
                **{**fields, "prompt": tuple(fields["prompt"]), "repairs": tuple(fields["repairs"])}
            )
        return LazySequence(len(position_U), lambda index: truncated.get(index) or pairs[int(position_U[index])])


def one_reason_per_row(dropped: Mapping[str, Sequence[int]], used: set[int]) -> dict[str, tuple[int, ...]]:
    """Dropped rows with at most one reason each, without rows of which a pair is used."""
    seen, dropped_rows = set(used), dict[str, tuple[int, ...]]()
    for reason, numbers in dropped.items():
        if new := sorted(set(numbers) - seen):
            dropped_rows[reason] = tuple(new)
            seen |= set(new)
    return dropped_rows


def overlong_message(rows: SourceRows, over: Sequence[int], max_length: int) -> str:
    """The error of `data.overlong = "error"`; `over` holds the row numbers."""
    numbers = sorted(over)
    first = ", ".join(str(row) for row in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
    count = f"{len(numbers):,} pairs are" if len(numbers) > 1 else "1 pair is"
    return (
        f"{rows.name}: {count} longer than data.max_length = {max_length} tokens (row {first}); raise it, or set "
        'data.overlong to "drop" or "cut_prompt"'
    )


def small_share_message(mixture: Mixture, source_U: IntArray, part: DataPart) -> str:
    """The error of a mixture in which one source has too few usable pairs (source numbers: `source_U`)."""
    counts = np.bincount(source_U, minlength=len(mixture.names))
    name = mixture.names[int(np.argmin(counts))]
    which, advice = (
        ("training", "leave its weight or it out")
        if part == "train"
        else ("held-out", "raise data.eval_share, or name the held-out pairs in data.eval")
    )
    return f"{name}: has {counts.min()} {which} pairs, too few for its share of the mixture; {advice}"


def no_pairs_message(audit: Audit, part: DataPart, table: DataTable) -> str:
    """The error of a part without a usable pair."""
    if audit.other_split and not audit.dropped:
        which, advice = ("training", "lower") if part == "train" else ("held-out", "raise")
        return (
            f"{audit.source}: data.eval_share = {table.effective_eval_share} of its prompts leaves no {which} pair "
            f"of its {audit.other_split:,}; {advice} it, or name the held-out pairs in data.eval"
        )
    which = "its only row is no" if audit.rows == 1 else f"none of its {audit.rows:,} rows is a"
    return f"{audit.source}: {which} usable pair: {audit.reason_summary()}"
