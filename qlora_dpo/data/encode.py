"""Pairs become token ids: the prompt, and each answer from where the prompt ends to the template's end token."""

import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_dpo.data import scan_cache
from qlora_dpo.data.audit import OVERLONG, Audit, length_quantiles
from qlora_dpo.data.chat_format import ChatFormat, answer_ids, detect_chat_format
from qlora_dpo.data.chat_template import (
    CONTROL_AS_TEXT,
    SYSTEM_FOLDED,
    TEMPLATE_ERRORS,
    TemplateTraits,
    clear_turn_cache,
    list_repairs,
    supports_tools,
    template_traits,
    tokenize_chats,
)
from qlora_dpo.data.dialogue import InvalidRow, Message, sanitize_text
from qlora_dpo.data.encoded import EncodedPair, EncodedPairs, TokenIds, digest_ids
from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.mixture import Mixture, parse_sources
from qlora_dpo.data.pairs import BoolArray, IntArray, Pair, ParsedRows
from qlora_dpo.data.progress import ProgressCallback, no_progress, track_progress
from qlora_dpo.data.sources import DataPart, SourceRows
from qlora_dpo.data.template_limits import LimitExceeded, infrequent_gc
from qlora_dpo.data.token_cache import (
    TOKEN_CACHE_VERSION,
    load_tokens,
    store_tokens,
    token_cache_key,
    tokenizer_fingerprint,
)
from qlora_dpo.data.truncation import truncate_prompt
from qlora_dpo.errors import DataError, ModelError, SourceError
from qlora_dpo.recipe.data import DataTable

PROMPT_TRUNCATED = "prompt cut at the front"
ENCODE_CHUNK = 1024
"""Pairs rendered and tokenized at once: enough to keep the tokenizer's threads busy, few enough to draw 50 quickly."""


@dataclass(frozen=True)
class PairSet:
    """The usable pairs of one part of the data in the order of their rows, as ids and as text, and their account."""

    encoded: Sequence[EncodedPair]
    pairs: Sequence[Pair]
    audit: Audit


@infrequent_gc()
def load_pairs(
    table: DataTable,
    part: DataPart,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    extra_columns: Mapping[str, str] = MappingProxyType({}),
    progress: ProgressCallback = no_progress,
) -> PairSet:
    """Read, check, draw and encode the pairs of `part`; `extra_columns` names columns that stay with each pair as text,
    and the keys of the recipe that ask for them; `progress` is told how far it is.

    With `max_train_samples` or `max_eval_samples`, every row gets a random number from `random.Random(seed)`, in
    the order of the rows; rows are then taken from the smallest number on until that many usable pairs are found, so
    the draw is the same on every machine and a row that becomes unusable moves no other. Raises RecipeError,
    SourceError, DataError or ModelError, each one sentence.
    """
    form = detect_chat_format(tokenizer)
    mixture = parse_sources(table, part, extra_columns, progress)
    rows, (found, mine_P, apart) = mixture.rows, _split_part(mixture.parsed, part)
    mixture = replace(mixture, source_P=mixture.source_P[mine_P])
    wanted = table.max_train_samples if part == "train" else table.max_eval_samples
    in_order = wanted is None and not mixture.is_drawn
    order = np.arange(len(found.pairs)) if in_order else _sampling_order(found.row_P, len(rows.rows), seed)
    name = _scan_cache_key(mixture.rows, (table, part, seed, extra_columns), tokenizer, form)
    known = scan_cache.load_scan(name)
    used, looked_at, dropped = _load_cached_scan(known) or _select_pairs(
        mixture, found, order, wanted, tokenizer, form, table, progress
    )
    clear_turn_cache()
    if known is None:
        _store_scan_results(name, used, looked_at, dropped)
    if table.overlong == "error" and OVERLONG in dropped:
        raise DataError(_overlong_message(rows, dropped[OVERLONG], table.max_length))
    places = np.array(used.positions, dtype=np.int64)
    kept_U = mixture.select_shares(mixture.source_P[places], wanted)
    if not kept_U.any() and len(places):
        raise DataError(_small_share_message(mixture, mixture.source_P[places], part))
    numbers = used.encoded.row_numbers()[kept_U]
    left_out = _one_reason_per_row(dropped, set(numbers.tolist()))
    seen = np.setdiff1d(looked_at, places[~kept_U])
    audit = Audit(
        source=rows.name,
        format=mixture.format,
        rows=len(rows.rows),
        used=len(numbers),
        dropped_at_parse=sum(map(len, found.dropped.values())),
        other_split=apart,
        extra_pairs=len(numbers) - len(np.unique(numbers)),
        dropped=left_out,
        not_sampled=len(np.unique(found.row_P)) - len(np.unique(found.row_P[seen])),
        repaired=used.repairs(set(numbers.tolist())),
        tokens=dict(
            zip(("prompt", "chosen", "rejected"), map(length_quantiles, used.encoded.lengths()[kept_U].T), strict=True)
        ),
        first_location={reason: rows.location(numbers[0]) for reason, numbers in left_out.items()},
        note=form.note,
        per_source=_pairs_per_source(mixture, mixture.source_P[places[kept_U]]),
    )
    if not len(numbers):
        raise DataError(_no_pairs_message(audit, part, table))
    by_row = np.flatnonzero(kept_U)[np.argsort(numbers, kind="stable")]
    return PairSet(used.encoded.pairs().select(by_row), used.texts(found.pairs).select(by_row), audit)


_Selection = tuple["_SelectedPairs", IntArray, dict[str, list[int]]]
_ScanRequest = tuple[DataTable, DataPart, int, Mapping[str, str]]
"""Table, part, seed and kept columns."""


def _scan_cache_key(
    rows: SourceRows, asked: tuple[DataTable, DataPart, int, Mapping[str, str]], tokenizer: Any, form: ChatFormat
) -> str | None:
    """The name under which what became of these rows is kept; None if they are few, or not to be told apart."""
    text = tokenizer_fingerprint(tokenizer)
    if not rows.fingerprint or len(rows.rows) < scan_cache.MIN_CACHED_ROWS or text is None:
        return None
    table, part, seed, keep = asked
    # where the rows came from is in their fingerprint
    keys = table.model_dump(mode="json", exclude={"train", "eval", "max_bad_share"}) | {
        "share": table.effective_eval_share
    }
    return scan_cache.scan_key(TOKEN_CACHE_VERSION, rows.fingerprint, text, repr(form), keys, part, seed, sorted(keep))


def _load_cached_scan(known: scan_cache.CachedScan | None) -> _Selection | None:
    """What `_select_pairs` has returned in an earlier run."""
    if known is None:
        return None
    used = _SelectedPairs()
    used.encoded = EncodedPairs.from_cache(known)
    used.positions = array("q", known.columns["place"].tobytes())
    used.truncated = {
        int(place): replace(Pair(**pair), prompt=tuple(pair["prompt"])) for place, pair in known.metadata["cut"]
    }
    used.repaired = known.metadata["repaired"]
    return used, known.columns["looked_at"], known.metadata["dropped"]


def _store_scan_results(
    name: str | None, used: "_SelectedPairs", looked_at: IntArray, dropped: dict[str, list[int]]
) -> None:
    if name is None:
        return
    columns = {**used.encoded.columns(), "place": np.array(used.positions, dtype=np.int64), "looked_at": looked_at}
    cut = [(place, asdict(pair)) for place, pair in used.truncated.items()]
    scan_cache.store_scan(name, columns, {"cut": cut, "repaired": used.repaired, "dropped": dropped}, used.encoded.ids)


def _select_pairs(
    mixture: Mixture,
    parsed: ParsedRows,
    order: IntArray,
    max_pairs: int | None,
    tokenizer: PreTrainedTokenizerBase,
    form: ChatFormat,
    table: DataTable,
    progress: ProgressCallback,
) -> _Selection:
    """Take usable pairs in `order` until there are enough: of each source, and in all.

    Returns the pairs, the places of all that were looked at, and the rows that gave none by reason.
    """
    used, looked_at = _SelectedPairs(), array("q")
    dropped = {reason: list(numbers) for reason, numbers in parsed.dropped.items()}
    left = mixture.source_limits(max_pairs)
    asked = _until_source_limits(order, mixture.source_P, left) if mixture.is_drawn else order.tolist()
    results = _encode_in_chunks(parsed.pairs, asked, tokenizer, form, table)
    for place, pair, result in track_progress(results, "tokenize", len(order), progress):
        source = mixture.source_P[place]
        if left[source] <= 0:
            continue
        looked_at.append(place)
        if isinstance(result, str):
            dropped.setdefault(result, []).append(pair.row)
            continue
        used.add(place, pair, *result, template_traits(tokenizer))
        left[source] -= 1
        if mixture.weights is None and len(used.encoded) == max_pairs:
            break
    return used, np.array(looked_at, dtype=np.int64), dropped


def _until_source_limits(order: IntArray, source_P: IntArray, left: Sequence[float]) -> Iterator[int]:
    """The places in `order` whose source has not yet given what it may; `left` changes while this is read."""
    return (place for place in order.tolist() if left[source_P[place]] > 0)


def _pairs_per_source(mixture: Mixture, source_U: IntArray) -> tuple[tuple[str, int, int], ...]:
    """Name, first row number and used pairs of each source of a mixture; nothing where there is one source only."""
    counts = np.bincount(source_U, minlength=len(mixture.names)).tolist()
    return tuple(zip(mixture.names, mixture.first_rows, counts, strict=True)) if len(counts) > 1 else ()


def _split_part(parsed: ParsedRows, part: DataPart) -> tuple[ParsedRows, BoolArray, int]:
    """The pairs of one part, which ones they are, and how many rows are the other part's, where a share is held out."""
    if parsed.is_eval_P is None:
        return parsed, np.ones(len(parsed.pairs), dtype=bool), 0
    mine_P = parsed.is_eval_P == (part == "eval")
    mine = parsed.select(mine_P)
    apart = len(np.setdiff1d(parsed.row_P, mine.row_P))
    if part == "train":
        return mine, mine_P, apart
    # a row that is no pair belongs to no side; the training part accounts for it
    return replace(mine, dropped={}), mine_P, apart + sum(map(len, parsed.dropped.values()))


class _SelectedPairs:
    """The pairs that are used, as they are found."""

    def __init__(self) -> None:
        self.encoded = EncodedPairs()
        self.positions = array("q")
        self.truncated = dict[int, Pair]()
        self.repaired: dict[str, list[int]] = {PROMPT_TRUNCATED: [], SYSTEM_FOLDED: [], CONTROL_AS_TEXT: []}

    def add(self, place: int, original: Pair, encoded: EncodedPair, pair: Pair, traits: TemplateTraits) -> None:
        """Take in the pair that was found at `place`, as it is encoded."""
        if pair is not original:
            self.truncated[len(self.positions)] = pair
            self.repaired[PROMPT_TRUNCATED].append(pair.row)
        answers: list[Message] = [{"role": "assistant", "content": each} for each in (pair.chosen, pair.rejected)]
        for what in list_repairs(traits, [*pair.prompt, *answers], pair.tools):
            self.repaired[what].append(pair.row)
        self.encoded.add(encoded)
        self.positions.append(place)

    def repairs(self, used: set[int]) -> dict[str, tuple[int, ...]]:
        """Numbers of the `used` rows by what was done to them, in the order in which it was first done."""
        done = [(what, sorted(row for row in rows if row in used)) for what, rows in self.repaired.items()]
        return {what: tuple(rows) for what, rows in sorted(done, key=lambda each: each[1][:1]) if rows}

    def texts(self, pairs: Sequence[Pair]) -> LazySequence[Pair]:
        """The pairs as text."""
        return LazySequence(
            len(self.positions), lambda index: self.truncated.get(index) or pairs[self.positions[index]]
        )


def _one_reason_per_row(dropped: Mapping[str, Sequence[int]], used: set[int]) -> dict[str, tuple[int, ...]]:
    """Each row under one reason at most, and under none if a pair of it is used."""
    counted, left_out = set(used), dict[str, tuple[int, ...]]()
    for reason, numbers in dropped.items():
        if new := sorted(set(numbers) - counted):
            left_out[reason] = tuple(new)
            counted |= set(new)
    return left_out


def _sampling_order(row_P: IntArray, rows: int, seed: int) -> IntArray:
    """The pairs in the order of the draw. `random.random()` is the one method Python keeps the same in all versions."""
    generator = random.Random(seed)  # noqa: S311 - a draw of samples, no secret
    draws = np.array([generator.random() for _ in range(rows)])
    return np.argsort(draws[row_P - 1], kind="stable")


_PairResult = tuple[EncodedPair, Pair] | str
"""An encoded pair with its text (whose prompt may have been cut), or the reason why there is none."""


def _encode_in_chunks(
    pairs: Sequence[Pair], order: Iterable[int], tokenizer: PreTrainedTokenizerBase, form: ChatFormat, table: DataTable
) -> Iterator[tuple[int, Pair, _PairResult]]:
    """Yield every pair in `order`, with its place among `pairs` and what became of it."""
    left = iter(order)
    while places := list(islice(left, ENCODE_CHUNK)):
        chunk = [pairs[place] for place in places]
        for place, pair, encoded in zip(places, chunk, _encode_cached(chunk, tokenizer, form), strict=True):
            if isinstance(encoded, str):
                yield place, pair, encoded
            elif pair_num_tokens(encoded) <= table.max_length:
                yield place, pair, (encoded, pair)
            elif table.overlong == "cut_prompt":
                yield place, pair, _truncate_and_encode(pair, tokenizer, form, table.max_length)
            else:
                yield place, pair, OVERLONG


def _encode_cached(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, form: ChatFormat
) -> list[EncodedPair | str]:
    """What an earlier run found for these pairs, or `encode_pairs`."""
    key = token_cache_key(pairs, tokenizer, form)
    known = load_tokens(key, pairs) if key else None
    if known is not None:
        return known
    results = encode_pairs(pairs, tokenizer, form)
    if key:
        with suppress(SourceError):  # a cache that cannot be written costs the next run time, and nothing else
            store_tokens(key, results)
    return results


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, form: ChatFormat
) -> list[EncodedPair | str]:
    """Encode pairs of any length together; for each, its ids or the reason why it has none."""
    chosen, rejected = ([_with_answer(pair, getattr(pair, name)) for pair in pairs] for name in ("chosen", "rejected"))
    tools = [pair.tools for pair in pairs]
    if any(tools) and not supports_tools(tokenizer):
        raise ModelError(
            "the data has a column tools, which the model's chat template does not read; name a model whose template "
            "does in model.name, or leave the column out"
        )
    try:
        found = tokenize_chats(tokenizer, [pair.prompt for pair in pairs], [*chosen, *rejected], 3 * tools)
    except (*TEMPLATE_ERRORS, InvalidRow, LimitExceeded) as error:
        if len(pairs) > 1:
            return [each for pair in pairs for each in encode_pairs([pair], tokenizer, form)]
        match error:
            case InvalidRow():
                return [str(error)]
            case LimitExceeded():
                raise ModelError(
                    f"row {pairs[0].row}: the model's chat template {error}; take the row out, or name another model"
                ) from error
            case _:
                return [f"chat template refuses it: {sanitize_text(str(error))}"]
    count = len(pairs)
    parts = zip(pairs, found[:count], found[count : 2 * count], found[2 * count :], strict=True)
    return [_encode_answers(pair, form, prompt, chosen, rejected) for pair, prompt, chosen, rejected in parts]


def _with_answer(pair: Pair, answer: str) -> list[Message]:
    return [*pair.prompt, {"role": "assistant", "content": answer}]


def _encode_answers(
    pair: Pair, form: ChatFormat, prompt: TokenIds, chosen: TokenIds, rejected: TokenIds
) -> EncodedPair | str:
    try:
        answers = answer_ids(form, prompt, chosen), answer_ids(form, prompt, rejected)
    except InvalidRow as unusable:
        return str(unusable)
    if answers[0] == answers[1]:
        return "equal answers"
    return EncodedPair(prompt, *answers, pair.row, digest_ids(prompt, *answers))


def pair_num_tokens(pair: EncodedPair) -> int:
    """Length of the prompt with the longer answer, in tokens; `data.max_length` limits it."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def _truncate_and_encode(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, form: ChatFormat, max_length: int
) -> _PairResult:
    """Cut the pair's prompt until it fits, and encode what is left."""

    def excess(shorter: Pair) -> int:
        encoded = encode_pairs([shorter], tokenizer, form)[0]
        if isinstance(encoded, str):
            raise InvalidRow(encoded)
        return pair_num_tokens(encoded) - max_length

    try:
        fitting = truncate_prompt(pair, tokenizer, excess)
    except InvalidRow as unusable:
        return str(unusable)
    encoded = encode_pairs([fitting], tokenizer, form)[0]
    return encoded if isinstance(encoded, str) else (encoded, fitting)


def _overlong_message(rows: SourceRows, over: Sequence[int], max_length: int) -> str:
    numbers = sorted(over)
    first = ", ".join(str(row) for row in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
    count = f"{len(numbers):,} pairs are" if len(numbers) > 1 else "1 pair is"
    return (
        f"{rows.name}: {count} longer than data.max_length = {max_length} tokens (row {first}); raise it, or set "
        'data.overlong to "drop" or "cut_prompt"'
    )


def _small_share_message(mixture: Mixture, source_U: IntArray, part: DataPart) -> str:
    counts = np.bincount(source_U, minlength=len(mixture.names))
    name = mixture.names[int(np.argmin(counts))]
    which, advice = (
        ("training", "leave its weight or it out")
        if part == "train"
        else ("held-out", "raise data.eval_share, or name the held-out pairs in data.eval")
    )
    return f"{name}: has {counts.min()} {which} pairs, too few for its share of the mixture; {advice}"


def _no_pairs_message(audit: Audit, part: DataPart, table: DataTable) -> str:
    if audit.other_split and not audit.dropped:
        which, advice = ("training", "lower") if part == "train" else ("held-out", "raise")
        return (
            f"{audit.source}: data.eval_share = {table.effective_eval_share} of its prompts leaves no {which} pair of its "
            f"{audit.other_split:,}; {advice} it, or name the held-out pairs in data.eval"
        )
    which = "its only row is no" if audit.rows == 1 else f"none of its {audit.rows:,} rows is a"
    return f"{audit.source}: {which} usable pair: {audit.reason_summary()}"
