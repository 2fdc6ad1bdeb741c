"""Loads one part of the data as token ids: the prompt, and each answer up to the chat template's end token."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from qlora_dpo.data.arrow_cache import cache_key, load_table
from qlora_dpo.data.audit import OVERLONG, Audit, part_quantiles
from qlora_dpo.data.dialogue import InvalidRow, Message, sanitize_text
from qlora_dpo.data.encoded import EncodedPair, TokenIds, digest_ids
from qlora_dpo.data.encoded_cache import (
    EncodedIndex,
    EncodedOrReason,
    EncodedRow,
    EncodedWriter,
    text_digest,
    tokenizer_key,
)
from qlora_dpo.data.mixture import Mixture, parse_sources
from qlora_dpo.data.pairs import PARSE_VERSION, BoolArray, IntArray, Pair, ParsedRows
from qlora_dpo.data.progress import ProgressCallback, no_progress, track_progress
from qlora_dpo.data.rows.tool_turns import NO_TOOL_TURNS, has_tool_turn, writes_tool_turns
from qlora_dpo.data.selection import (
    Selection,
    no_pairs_message,
    one_reason_per_row,
    overlong_message,
    small_share_message,
)
from qlora_dpo.data.sources import DataPart, SourceRows
from qlora_dpo.data.templates.chat_format import (
    ANSWER_MERGES,
    ChatFormat,
    answer_ids,
    detect_chat_format,
    prompt_ids_of,
)
from qlora_dpo.data.templates.chat_template import (
    TEMPLATE_ERRORS,
    clear_turn_cache,
    list_repairs,
    supports_tools,
    template_traits,
    tokenize_chats,
)
from qlora_dpo.data.templates.template_limits import LimitExceeded, infrequent_gc
from qlora_dpo.data.templates.template_marks import find_own_marks
from qlora_dpo.data.truncation import PROMPT_TRUNCATED, truncate_prompt
from qlora_dpo.errors import DataError, ModelError
from qlora_dpo.recipe.data import DataTable

THOUGHTS_CLOSED = (
    "answer has thoughts, and the prompt closes them: set model.chat_template_kwargs = { enable_thinking = true }"
)
THOUGHTS_TWICE = "answer has thoughts, before which the chat template writes an empty <think> block"
ENCODE_CHUNK = 1024
"""Pairs rendered and tokenized at once: enough for the tokenizer's threads, few enough to sample 50 pairs quickly."""

EQUAL_AS_WRITTEN = "answers that differ only in what the chat template leaves out, such as thoughts"


@dataclass(frozen=True)
class PairSet:
    """The usable pairs of one part of the data in the order of their rows, as ids and as text, and their audit."""

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
    *,
    supervised: bool = False,
) -> PairSet:
    """Read, check, sample and encode the pairs of `part`.

    `extra_columns` maps the columns whose text stays with each pair to the recipe keys that name them. With
    `supervised`, rows of questions and answers are read too, and become pairs without a rejected answer.

    With `max_train_samples` or `max_eval_samples`, every row gets a random number from `random.Random(seed)`, in
    the order of the rows; rows are then taken from the smallest number on until that many usable pairs are found, so
    the sample is the same on every machine, and a row that becomes unusable moves no other. Raises RecipeError,
    SourceError, DataError or ModelError, each one sentence.
    """
    form = detect_chat_format(tokenizer)
    mixture = parse_sources(table, part, extra_columns, progress, find_own_marks(tokenizer), supervised=supervised)
    every = mixture.parsed
    rows, (parsed, in_part_P, other_split) = mixture.rows, _split_part(every, part)
    mixture = replace(mixture, parsed=parsed, source_P=mixture.source_P[in_part_P])
    max_pairs = table.max_train_samples if part == "train" else table.max_eval_samples
    in_order = max_pairs is None and not mixture.is_drawn
    order = np.arange(len(parsed.pairs)) if in_order else _sampling_order(parsed.row_P, len(rows.rows), seed)
    encoder = _Encoder(tokenizer, form, table)
    key = _reading_key(rows, (table, part, seed, extra_columns), encoder, supervised)
    encoded = load_table(key)
    if encoded is None:
        encoded = encoder.encode_selected(key, mixture, order, max_pairs, progress)
    selection = Selection(encoded, table.max_length)
    clear_turn_cache()
    dropped = selection.dropped_rows(parsed.dropped)
    if table.overlong == "error" and OVERLONG in dropped:
        raise DataError(overlong_message(rows, dropped[OVERLONG], table.max_length))
    position_U = selection.positions()
    kept_U = mixture.select_shares(mixture.source_P[position_U], max_pairs)
    if not kept_U.any() and len(position_U):
        raise DataError(small_share_message(mixture, mixture.source_P[position_U], part))
    row_U = selection.encoded.row_numbers()[kept_U]
    used_rows = set(row_U.tolist())
    dropped_rows = one_reason_per_row(dropped, used_rows)
    seen = np.setdiff1d(selection.position_N, position_U[~kept_U])
    audit = Audit(
        source=rows.name,
        format=mixture.format,
        rows=len(rows.rows),
        used=len(row_U),
        dropped_at_parse=sum(map(len, parsed.dropped.values())),
        other_split=other_split,
        extra_pairs=len(row_U) - len(np.unique(row_U)),
        dropped=dropped_rows,
        not_sampled=len(np.unique(parsed.row_P)) - len(np.unique(parsed.row_P[seen])),
        repaired=selection.repaired_rows(used_rows),
        tokens=part_quantiles(selection.encoded.lengths()[kept_U]),
        first_location={reason: rows.location(numbers[0]) for reason, numbers in dropped_rows.items()},
        note=form.note,
        per_source=_pairs_per_source(mixture, mixture.source_P[position_U[kept_U]]),
    )
    if not len(row_U):
        if not audit.dropped and sum(map(len, every.dropped.values())) > len(every.pairs):
            raise DataError(_few_pairs_message(rows, every, part))
        raise DataError(no_pairs_message(audit, part, table))
    by_row = np.flatnonzero(kept_U)[np.argsort(row_U, kind="stable")]
    return PairSet(selection.encoded.pairs().select(by_row), selection.texts(parsed.pairs).select(by_row), audit)


def _reading_key(
    rows: SourceRows,
    selection: tuple[DataTable, DataPart, int, Mapping[str, str]],
    encoder: "_Encoder",
    supervised: bool,
) -> str | None:
    """The cache key of these rows' table; None if rows or tokenizer cannot be told from others."""
    if not rows.fingerprint or encoder.key is None:
        return None
    table, part, seed, extra_columns = selection
    # where the rows came from is in their fingerprint
    keys = table.model_dump(mode="json", exclude={"train", "eval", "max_bad_share"}) | {
        "share": table.effective_eval_share
    }
    parts = (PARSE_VERSION, rows.fingerprint, keys, part, seed, sorted(extra_columns), supervised)
    return f"{encoder.key}-{cache_key(*parts)}"


@dataclass(frozen=True)
class _Encoder:
    """A tokenizer with its chat format, and the table of the recipe that says how long a pair may be."""

    tokenizer: PreTrainedTokenizerBase
    form: ChatFormat
    table: DataTable

    @cached_property
    def key(self) -> str | None:
        """What the cache keys of this tokenizer begin with."""
        return tokenizer_key(self.tokenizer, self.form)

    def encode_selected(
        self, key: str | None, mixture: Mixture, order: IntArray, max_pairs: int | None, progress: ProgressCallback
    ) -> pa.Table:
        """Encode pairs in `order` until there are enough usable ones: of each source, and in all."""
        num_usable, remaining = 0, mixture.source_limits(max_pairs)
        positions = _until_source_limits(order, mixture.source_P, remaining) if mixture.is_drawn else order.tolist()
        writer = EncodedWriter(key)
        rows = self._encode(mixture.parsed.pairs, positions, writer)
        for row in track_progress(rows, "tokenize", len(order), progress):
            source = mixture.source_P[row.position]
            if remaining[source] <= 0:
                continue
            writer.append(row)
            if isinstance(row.result, str) or pair_num_tokens(row.result) > self.table.max_length:
                continue
            num_usable += 1
            remaining[source] -= 1
            if mixture.weights is None and num_usable == max_pairs:
                break
        return writer.finish()

    def _encode(self, pairs: Sequence[Pair], positions: Iterable[int], writer: EncodedWriter) -> Iterator[EncodedRow]:
        """Yield each pair at `positions` as it is encoded, and flush `writer` behind each chunk."""
        remaining, earlier = iter(positions), EncodedIndex(self.key)
        while chunk := list(islice(remaining, ENCODE_CHUNK)):
            chunk_pairs = [pairs[position] for position in chunk]
            texts = [text_digest(pair) for pair in chunk_pairs]
            results = self._encode_unknown(chunk_pairs, earlier.find(chunk_pairs, texts))
            for position, pair, text, result in zip(chunk, chunk_pairs, texts, results, strict=True):
                if isinstance(result, str) or pair_num_tokens(result) <= self.table.max_length:
                    yield self._row(position, pair, text, result)
                elif self.table.overlong == "cut_prompt":
                    yield self._truncated_row(position, pair, text)
                else:
                    yield self._row(position, pair, text, result)
            writer.flush()

    def _encode_unknown(
        self, pairs: Sequence[Pair], known: Sequence[EncodedOrReason | None]
    ) -> Iterator[EncodedOrReason]:
        """The `known` results, and those of `encode_pairs` for all other pairs."""
        unknown = [pair for pair, result in zip(pairs, known, strict=True) if result is None]
        results = iter(encode_pairs(unknown, self.tokenizer, self.form) if unknown else ())
        return (next(results) if result is None else result for result in known)

    def _row(self, position: int, pair: Pair, text: bytes, result: EncodedOrReason) -> EncodedRow:
        repairs = () if isinstance(result, str) else self._repairs(pair)
        return EncodedRow(position, pair, text, result, is_truncated=False, repairs=repairs)

    def _truncated_row(self, position: int, pair: Pair, text: bytes) -> EncodedRow:
        """Cut the pair's prompt until it fits, and encode what is left."""

        def excess(shorter: Pair) -> int:
            encoded = encode_pairs([shorter], self.tokenizer, self.form)[0]
            if isinstance(encoded, str):
                raise InvalidRow(encoded)
            return pair_num_tokens(encoded) - self.table.max_length

        try:
            fitting = truncate_prompt(pair, self.tokenizer, excess)
        except InvalidRow as unusable:
            return EncodedRow(position, pair, text, str(unusable), is_truncated=True, repairs=())
        result = encode_pairs([fitting], self.tokenizer, self.form)[0]
        repairs = () if isinstance(result, str) else (PROMPT_TRUNCATED, *self._repairs(fitting))
        return EncodedRow(position, fitting, text, result, is_truncated=True, repairs=repairs)

    def _repairs(self, pair: Pair) -> tuple[str, ...]:
        texts = filter(None, (pair.chosen, pair.rejected))
        answers: list[Message] = [{"role": "assistant", "content": text} for text in texts]
        return (*pair.repairs, *list_repairs(template_traits(self.tokenizer), [*pair.prompt, *answers], pair.tools))


def _until_source_limits(order: IntArray, source_P: IntArray, remaining: Sequence[float]) -> Iterator[int]:
    """Positions in `order` whose source still has pairs to give; `remaining` changes while this is read."""
    return (position for position in order.tolist() if remaining[source_P[position]] > 0)


def _pairs_per_source(mixture: Mixture, source_U: IntArray) -> tuple[tuple[str, int, int], ...]:
    """Name, first row number and used pairs of each source of a mixture; empty for a single source."""
    counts = np.bincount(source_U, minlength=len(mixture.names)).tolist()
    return tuple(zip(mixture.names, mixture.first_rows, counts, strict=True)) if len(counts) > 1 else ()


def _split_part(parsed: ParsedRows, part: DataPart) -> tuple[ParsedRows, BoolArray, int]:
    """The pairs of one part, their mask, and the number of rows of the other part, if a share is held out."""
    if parsed.is_eval_P is None:
        return parsed, np.ones(len(parsed.pairs), dtype=bool), 0
    in_part_P = parsed.is_eval_P == (part == "eval")
    selected = parsed.select(in_part_P)
    other_split = len(np.setdiff1d(parsed.row_P, selected.row_P))
    if part == "train":
        return selected, in_part_P, other_split
    # a row without a pair belongs to neither part; the training part counts it
    return replace(selected, dropped={}), in_part_P, other_split + sum(map(len, parsed.dropped.values()))


def _few_pairs_message(rows: SourceRows, parsed: ParsedRows, part: DataPart) -> str:
    """The error of a part that has no pair since most rows are none."""
    reason, numbers = max(parsed.dropped.items(), key=lambda item: len(item[1]))
    which, count = "held-out" if part == "eval" else "training", sum(map(len, parsed.dropped.values()))
    return (
        f"{rows.name}: {count:,} of its {len(rows.rows):,} rows are no usable pairs, and no other is a {which} pair; "
        f"most often: {reason} ({len(numbers):,}, first {rows.location(numbers[0])}); they are read as "
        f"{parsed.format.value}, the format of the first row that has one; data.format names another"
    )


def _sampling_order(row_P: IntArray, rows: int, seed: int) -> IntArray:
    """The pairs in sampling order. `random.random()` is the one method that Python keeps the same in all versions."""
    generator = random.Random(seed)  # noqa: S311 - sampling, not a secret
    draws = np.array([generator.random() for _ in range(rows)])
    return np.argsort(draws[row_P - 1], kind="stable")


def encode_pairs(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, form: ChatFormat
) -> list[EncodedPair | str]:
    """Encode pairs of any length in one batch; the ids of each, or the reason why it has none."""
    if any(has_tool_turn(pair.prompt) for pair in pairs) and not writes_tool_turns(tokenizer):
        others = [pair for pair in pairs if not has_tool_turn(pair.prompt)]
        results = iter(encode_pairs(others, tokenizer, form) if others else [])
        return [NO_TOOL_TURNS if has_tool_turn(pair.prompt) else next(results) for pair in pairs]
    chats = [_with_answer(pair, pair.chosen) for pair in pairs]
    chats += [_with_answer(pair, pair.rejected) for pair in pairs if pair.rejected]
    tools = [pair.tools for pair in pairs]
    tools_of_all = [*tools, *tools, *(pair.tools for pair in pairs if pair.rejected)]
    if any(tools) and not supports_tools(tokenizer):
        raise ModelError(
            "the data has a column tools, which the model's chat template does not read; name a model whose template "
            "does in model.name, or leave the column out"
        )
    try:
        chat_ids = tokenize_chats(tokenizer, [pair.prompt for pair in pairs], chats, tools_of_all)
    except (*TEMPLATE_ERRORS, InvalidRow, LimitExceeded) as error:
        if len(pairs) > 1:
            return [result for pair in pairs for result in encode_pairs([pair], tokenizer, form)]
        match error:
            case InvalidRow():
                return [str(error)]
            case LimitExceeded():
                raise ModelError(
                    f"row {pairs[0].row}: the model's chat template {error}; take the row out, or name another model"
                ) from error
            case _:
                return [f"chat template refuses it: {sanitize_text(str(error))}"]
    count, rejected_ids = len(pairs), iter(chat_ids[2 * len(pairs) :])
    encoded = [
        _encode_answers(pair, form, prompt, (chosen, next(rejected_ids)) if pair.rejected else (chosen,))
        for pair, prompt, chosen in zip(pairs, chat_ids[:count], chat_ids[count : 2 * count], strict=True)
    ]
    if "enable_thinking" not in str(tokenizer.chat_template):
        return encoded
    return [
        THOUGHTS_CLOSED if result == ANSWER_MERGES and "</think>" in pair.chosen + pair.rejected else result
        for pair, result in zip(pairs, encoded, strict=True)
    ]


def _with_answer(pair: Pair, answer: str) -> list[Message]:
    return [*pair.prompt, {"role": "assistant", "content": answer}]


def _encode_answers(pair: Pair, form: ChatFormat, prompt: TokenIds, chats: tuple[TokenIds, ...]) -> EncodedPair | str:
    """The pair of a prompt and the chats with its answers; a single chat has no rejected answer."""
    asked, prompt = prompt, prompt_ids_of(form, prompt, chats)
    if prompt != asked and any(answer.lstrip().startswith("<think>") for answer in (pair.chosen, pair.rejected)):
        return THOUGHTS_TWICE
    try:
        chosen, *others = (answer_ids(form, prompt, chat) for chat in chats)
    except InvalidRow as unusable:
        return str(unusable)
    if chosen in others:
        return "equal answers" if pair.chosen == pair.rejected else EQUAL_AS_WRITTEN
    rejected = others[0] if others else ()
    return EncodedPair(prompt, chosen, rejected, pair.row, digest_ids(prompt, chosen, rejected))


def pair_num_tokens(pair: EncodedPair) -> int:
    """Tokens of the prompt with the longer answer; at most `data.max_length`."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
