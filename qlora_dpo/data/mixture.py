"""Concatenates the pairs of all sources of a recipe; each source contributes according to its weight and limit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlora_dpo.data.formats import PreferenceFormat
from qlora_dpo.data.lazy_sequence import LazySequence, concatenate_sequences
from qlora_dpo.data.pairs import BoolArray, IntArray, Pair, ParsedRows, parse_pairs
from qlora_dpo.data.progress import ProgressCallback, no_progress
from qlora_dpo.data.rows.rated import join_rated_rows
from qlora_dpo.data.rows.reader import ParseOptions
from qlora_dpo.data.rows.rendered import MarkFamily
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
    """The source number of each pair (P)."""
    names: tuple[str, ...]
    first_rows: tuple[int, ...]
    """The first row number of each source."""
    max_pairs: tuple[int | None, ...]
    """The largest number of pairs from each source; None means all."""
    weights: tuple[float, ...] | None
    """The share of each source among the used pairs, adding up to 1; None means all pairs."""

    @property
    def is_drawn(self) -> bool:
        """True if pairs are sampled rather than taken in order."""
        return self.weights is not None or any(limit is not None for limit in self.max_pairs)

    def source_limits(self, max_pairs: int | None) -> list[float]:
        """How many pairs of each source may be needed for `max_pairs` pairs in all."""
        limits = [float("inf") if limit is None else limit for limit in self.max_pairs]
        if self.weights is None or max_pairs is None:
            return limits
        return [min(limit, np.ceil(max_pairs * share)) for limit, share in zip(limits, self.weights, strict=True)]

    def select_shares(self, source_U: IntArray, max_pairs: int | None) -> BoolArray:
        """A mask of the usable pairs, in sampling order, that are used: each source gets its share."""
        if self.weights is None:
            return np.ones(len(source_U), dtype=bool)
        shares = np.array(self.weights)
        counts = np.bincount(source_U, minlength=len(shares))
        total = min([*(counts / shares), *([max_pairs] if max_pairs is not None else [])])
        quotas = np.floor(total * shares + 1e-6)
        nth_U = np.zeros(len(source_U), dtype=np.int64)
        for source in range(len(shares)):
            nth_U[source_U == source] = np.arange(counts[source])
        kept: BoolArray = nth_U < quotas[source_U]
        return kept


def parse_sources(
    table: DataTable,
    part: DataPart,
    extra_columns: Mapping[str, str],
    progress: ProgressCallback = no_progress,
    own_marks: MarkFamily | None = None,
    *,
    supervised: bool = False,
) -> Mixture:
    """Read and parse the rows of all sources of `part`; raises what `read_sources` and `parse_pairs` raise.

    `own_marks` are those of the chat template of the model that the rows are for, if there is one. With `supervised`,
    rows of questions and answers are read too.
    """
    parts = [join_rated_rows(rows) for rows in read_sources(table, part)]
    tables = _source_tables(table, part)
    every_pair = table.ranked_pairs == "all"
    parsed_parts = [
        parse_pairs(
            rows,
            extra_columns,
            ParseOptions(
                source.format, source.columns, every_pair, table.answer, supervised, table.train_on, own_marks
            ),
            table.effective_eval_share,
            progress,
        )
        for rows, source in zip(parts, tables, strict=True)
    ]
    _check_same_kind(parts, parsed_parts)
    first_rows = np.cumsum([1, *(len(rows.rows) for rows in parts)])[:-1].tolist()
    weights = [source.weight for source in tables if isinstance(source, MixTable) and source.weight is not None]
    return Mixture(
        rows=concatenate_rows(parts),
        format="; ".join(dict.fromkeys(parsed.format.value for parsed in parsed_parts)),
        parsed=_concatenate_parsed(parsed_parts, first_rows),
        source_P=np.repeat(np.arange(len(parsed_parts)), [len(parsed.pairs) for parsed in parsed_parts]),
        names=tuple(rows.name for rows in parts),
        first_rows=tuple(first_rows),
        max_pairs=tuple(_max_source_pairs(source, table.effective_eval_share, part) for source in tables),
        weights=tuple(weight / sum(weights) for weight in weights) if weights else None,
    )


def _source_tables(table: DataTable, part: DataPart) -> Sequence[DataTable | MixTable]:
    has_own_eval = part == "eval" and table.effective_eval_share is None
    return [table] if table.mix is None or has_own_eval else table.mix


def _max_source_pairs(source: DataTable | MixTable, share: float | None, part: DataPart) -> int | None:
    """The largest number of pairs from a source in one part; its `max_samples` include the held-out pairs."""
    if not isinstance(source, MixTable) or source.max_samples is None:
        return None
    num_eval = round(source.max_samples * share) if share is not None else 0
    return num_eval if part == "eval" else source.max_samples - num_eval


def _check_same_kind(parts: Sequence[SourceRows], parsed_parts: Sequence[ParsedRows]) -> None:
    is_unpaired = [parsed.format is PreferenceFormat.UNPAIRED for parsed in parsed_parts]
    if any(is_unpaired) and not all(is_unpaired):
        unpaired, paired = parts[is_unpaired.index(True)].name, parts[is_unpaired.index(False)].name
        raise RecipeError(
            f"{unpaired}: holds answers with a label, and {paired} holds pairs; a mixture is of one kind, "
            "so leave one out"
        )


def _concatenate_parsed(parts: Sequence[ParsedRows], first_rows: Sequence[int]) -> ParsedRows:
    if len(parts) == 1:
        return parts[0]
    dropped = dict[str, list[int]]()
    for parsed, first in zip(parts, first_rows, strict=True):
        for reason, numbers in parsed.dropped.items():
            dropped.setdefault(reason, []).extend(number + first - 1 for number in numbers)
    pairs = [_offset_rows(parsed.pairs, first - 1) for parsed, first in zip(parts, first_rows, strict=True)]
    rows = [parsed.row_P + first - 1 for parsed, first in zip(parts, first_rows, strict=True)]
    is_eval = [parsed.is_eval_P for parsed in parts if parsed.is_eval_P is not None]
    return ParsedRows(
        parts[0].format,
        concatenate_sequences(pairs),
        dropped,
        np.concatenate(rows),
        np.concatenate(is_eval) if is_eval else None,
        {
            row + first - 1: key
            for parsed, first in zip(parts, first_rows, strict=True)
            for row, key in parsed.repeated_keys.items()
        },
    )


def _offset_rows(pairs: Sequence[Pair], offset: int) -> LazySequence[Pair]:
    def make(index: int) -> Pair:
        pair = pairs[index]
        return replace(pair, row=pair.row + offset)

    return LazySequence(len(pairs), make)
