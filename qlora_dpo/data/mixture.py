"""The pairs of all sources of a recipe as one list: each keeps its place, and each source gives what its table says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlora_dpo.data.formats import PreferenceFormat
from qlora_dpo.data.lazy_sequence import LazySequence, concatenate_sequences
from qlora_dpo.data.pairs import BoolArray, IntArray, Pair, ParsedRows, ParseOptions, parse_pairs
from qlora_dpo.data.progress import ProgressCallback, no_progress
from qlora_dpo.data.sources import DataPart, SourceRows, concatenate_rows, read_sources
from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe.data import DataTable, MixTable


@dataclass(frozen=True)
class Mixture:
    """Rows and pairs of one part of the data; row numbers count from 1 over all sources."""

    rows: SourceRows
    format: str
    parsed: ParsedRows
    source_P: IntArray
    """Which source each pair is of."""
    names: tuple[str, ...]
    first_rows: tuple[int, ...]
    """The number of the first row of each source."""
    max_pairs: tuple[int | None, ...]
    """How many pairs each source gives at most; None: as many as there are."""
    weights: tuple[float, ...] | None
    """The share of each source among the pairs that are used; None: whatever there are."""

    @property
    def is_drawn(self) -> bool:
        """True if the pairs are drawn rather than taken in their order."""
        return self.weights is not None or any(most is not None for most in self.max_pairs)

    def source_limits(self, wanted: int | None) -> list[float]:
        """How many pairs of each source may be needed for `wanted` pairs in all."""
        limits = [float("inf") if most is None else most for most in self.max_pairs]
        if self.weights is None or wanted is None:
            return limits
        return [min(limit, np.ceil(wanted * share)) for limit, share in zip(limits, self.weights, strict=True)]

    def select_shares(self, source_U: IntArray, wanted: int | None) -> BoolArray:
        """Which of the usable pairs, in the order of their draw, are in the mixture: each source has its share."""
        if self.weights is None:
            return np.ones(len(source_U), dtype=bool)
        shares = np.array(self.weights)
        counts = np.bincount(source_U, minlength=len(shares))
        total = min([*(counts / shares), *([wanted] if wanted is not None else [])])
        give = np.floor(total * shares + 1e-6)
        nth_U = np.zeros(len(source_U), dtype=np.int64)
        for source in range(len(shares)):
            nth_U[source_U == source] = np.arange(counts[source])
        kept: BoolArray = nth_U < give[source_U]
        return kept


def parse_sources(
    table: DataTable, part: DataPart, extra_columns: Mapping[str, str], progress: ProgressCallback = no_progress
) -> Mixture:
    """Read the rows of all sources of `part` and find their pairs; raises as `read_rows` and `parse_pairs` do."""
    parts = read_sources(table, part)
    tables = _source_tables(table, part)
    each_pair = table.ranked_pairs == "all"
    founds = [
        parse_pairs(
            rows, extra_columns, ParseOptions(own.format, own.columns, each_pair), table.effective_eval_share, progress
        )
        for rows, own in zip(parts, tables, strict=True)
    ]
    _check_same_kind(parts, founds)
    first_rows = np.cumsum([1, *(len(each.rows) for each in parts)])[:-1].tolist()
    weights = [own.weight for own in tables if isinstance(own, MixTable) and own.weight is not None]
    return Mixture(
        rows=concatenate_rows(parts),
        format="; ".join(dict.fromkeys(each.format.value for each in founds)),
        parsed=_concatenate_parsed(founds, first_rows),
        source_P=np.repeat(np.arange(len(founds)), [len(each.pairs) for each in founds]),
        names=tuple(each.name for each in parts),
        first_rows=tuple(first_rows),
        max_pairs=tuple(_max_source_pairs(own, table.effective_eval_share, part) for own in tables),
        weights=tuple(weight / sum(weights) for weight in weights) if weights else None,
    )


def _source_tables(table: DataTable, part: DataPart) -> Sequence[DataTable | MixTable]:
    apart = part == "eval" and table.effective_eval_share is None
    return [table] if table.mix is None or apart else table.mix


def _max_source_pairs(own: DataTable | MixTable, share: float | None, part: DataPart) -> int | None:
    """How many pairs a source gives to one part; what is held out of it counts among its `max_samples`."""
    if not isinstance(own, MixTable) or own.max_samples is None:
        return None
    held = round(own.max_samples * share) if share is not None else 0
    return held if part == "eval" else own.max_samples - held


def _check_same_kind(parts: Sequence[SourceRows], founds: Sequence[ParsedRows]) -> None:
    labelled = [each.format is PreferenceFormat.UNPAIRED for each in founds]
    if any(labelled) and not all(labelled):
        one, other = parts[labelled.index(True)].name, parts[labelled.index(False)].name
        raise RecipeError(
            f"{one}: holds answers with a label, and {other} holds pairs; a mixture is of one kind, so leave one out"
        )


def _concatenate_parsed(founds: Sequence[ParsedRows], first_rows: Sequence[int]) -> ParsedRows:
    if len(founds) == 1:
        return founds[0]
    dropped = dict[str, list[int]]()
    for found, first in zip(founds, first_rows, strict=True):
        for reason, numbers in found.dropped.items():
            dropped.setdefault(reason, []).extend(number + first - 1 for number in numbers)
    moved = [_offset_rows(found.pairs, first - 1) for found, first in zip(founds, first_rows, strict=True)]
    rows = [found.row_P + first - 1 for found, first in zip(founds, first_rows, strict=True)]
    held = [found.is_eval_P for found in founds if found.is_eval_P is not None]
    return ParsedRows(
        founds[0].format,
        concatenate_sequences(moved),
        dropped,
        np.concatenate(rows),
        np.concatenate(held) if held else None,
    )


def _offset_rows(pairs: Sequence[Pair], by: int) -> LazySequence[Pair]:
    def make(index: int) -> Pair:
        pair = pairs[index]
        return replace(pair, row=pair.row + by)

    return LazySequence(len(pairs), make)
