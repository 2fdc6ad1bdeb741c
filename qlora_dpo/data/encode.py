"""Pairs become token ids: the prompt, and each answer from where the prompt ends to the template's end token."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from qlora_dpo.data.audit import OVERLONG, Audit, quantiles
from qlora_dpo.data.chat_format import ChatFormat, answer_ids, chat_format
from qlora_dpo.data.chat_template import REFUSALS, chat_ids, habits, repairs
from qlora_dpo.data.dialogue import Message, Unusable, printable
from qlora_dpo.data.encoded import EncodedPair, Ids, digest
from qlora_dpo.data.encoded_cache import keep, key_of, look_up
from qlora_dpo.data.limits import TooMuch
from qlora_dpo.data.overlong import cut_prompt
from qlora_dpo.data.pairs import Found, Pair, Reading, find_pairs
from qlora_dpo.data.sources import Part, Rows, read_rows
from qlora_dpo.errors import DataError, ModelError, SourceError
from qlora_dpo.recipe_data import DataTable

CUT = "prompt cut at the front"
CHUNK = 1024
"""Pairs rendered and tokenized at once: enough to keep the tokenizer's threads busy, few enough to draw 50 quickly."""


@dataclass(frozen=True)
class PairSet:
    """The usable pairs of one part of the data in the order of their rows, as ids and as text, and their account."""

    encoded: list[EncodedPair]
    pairs: list[Pair]
    audit: Audit


def load_pairs(
    table: DataTable,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    keep: Mapping[str, str] = MappingProxyType({}),
) -> PairSet:
    """Read, check, draw and encode the pairs of `part`; `keep` names columns that stay with each pair as text,
    and the keys of the recipe that ask for them.

    With `max_train_samples` or `max_eval_samples`, every row gets a random number from `random.Random(seed)`, in
    the order of the rows; rows are then taken from the smallest number on until that many usable pairs are found, so
    the draw is the same on every machine and a row that becomes unusable moves no other. Raises RecipeError,
    SourceError, DataError or ModelError, each one sentence.
    """
    form = chat_format(tokenizer)
    rows = read_rows(table, part)
    reading = Reading(table.format, table.columns, table.ranked_pairs == "all")
    found = find_pairs(rows, keep, reading)
    apart = set[int]()
    if table.held_out_share is not None:
        mine = [pair for pair in found.pairs if is_held_out(pair, table.held_out_share) == (part == "eval")]
        apart = {pair.row for pair in found.pairs} - {pair.row for pair in mine}
        if part == "eval":  # a row that is no pair belongs to no side; the training part accounts for it
            apart |= {row for numbers in found.dropped.values() for row in numbers}
        found = Found(found.shape, mine, found.dropped if part == "train" else {})
    wanted = table.max_train_samples if part == "train" else table.max_eval_samples
    order = found.pairs if wanted is None else _drawn(found.pairs, len(rows.rows), seed)
    used: list[tuple[EncodedPair, Pair]] = []
    dropped = {reason: list(numbers) for reason, numbers in found.dropped.items()}
    looked_at = 0
    for pair, result in _results(order, tokenizer, form, table):
        looked_at += 1
        if isinstance(result, str):
            dropped.setdefault(result, []).append(pair.row)
            continue
        used.append(result)
        if len(used) == wanted:
            break
    if table.overlong == "error" and OVERLONG in dropped:
        raise DataError(_too_long(rows, dropped[OVERLONG], table.max_length))
    used.sort(key=lambda both: both[0].row)
    left_out = _once(dropped, {pair.row for pair, _ in used})
    audit = Audit(
        source=rows.name,
        shape=found.shape.value,
        rows=len(rows.rows),
        used=len(used),
        at_reading=sum(map(len, found.dropped.values())),
        apart=len(apart),
        further=len(used) - len({pair.row for pair, _ in used}),
        dropped=left_out,
        not_drawn=len({pair.row for pair in order} - {pair.row for pair in order[:looked_at]}),
        repaired=_repaired([pair for _, pair in used], {pair.row: pair for pair in found.pairs}, tokenizer),
        tokens=_lengths([each for each, _ in used]),
        first={reason: rows.place(numbers[0]) for reason, numbers in left_out.items()},
        note=form.note,
    )
    if not used:
        raise DataError(_none_usable(audit))
    return PairSet([each for each, _ in used], [each for _, each in used], audit)


def is_held_out(pair: Pair, share: float) -> bool:
    """True for the share of all prompts that is held out: it depends on the prompt's text alone."""
    text = json.dumps(pair.prompt, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") < share * 2**64


def _once(dropped: Mapping[str, Sequence[int]], used: set[int]) -> dict[str, tuple[int, ...]]:
    """Each row under one reason at most, and under none if a pair of it is used."""
    counted, left_out = set(used), dict[str, tuple[int, ...]]()
    for reason, numbers in dropped.items():
        if new := sorted(set(numbers) - counted):
            left_out[reason] = tuple(new)
            counted |= set(new)
    return left_out


def _repaired(
    used: Sequence[Pair], before: dict[int, Pair], tokenizer: PreTrainedTokenizerBase
) -> dict[str, tuple[int, ...]]:
    """Numbers of the used rows by what was done to them."""
    own, done = habits(tokenizer), dict[str, list[int]]()
    for pair in used:
        if pair.prompt != before[pair.row].prompt:
            done.setdefault(CUT, []).append(pair.row)
        texts: list[Message] = [
            *pair.prompt,
            *({"role": "assistant", "content": each} for each in (pair.chosen, pair.rejected)),
        ]
        for what in repairs(own, texts):
            done.setdefault(what, []).append(pair.row)
    return {what: tuple(rows) for what, rows in done.items()}


def _drawn(pairs: Sequence[Pair], rows: int, seed: int) -> list[Pair]:
    """`pairs` in the order of the draw. `random.random()` is the one method Python keeps the same in all versions."""
    generator = random.Random(seed)  # noqa: S311 - a draw of samples, no secret
    draws = [generator.random() for _ in range(rows)]
    return sorted(pairs, key=lambda pair: draws[pair.row - 1])


Result = tuple[EncodedPair, Pair] | str
"""An encoded pair with its text (whose prompt may have been cut), or the reason why there is none."""


def _results(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, form: ChatFormat, table: DataTable
) -> Iterator[tuple[Pair, Result]]:
    """Yield every pair in order with what became of it."""
    for start in range(0, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        for pair, encoded in zip(chunk, _encoded_once(chunk, tokenizer, form), strict=True):
            if isinstance(encoded, str):
                yield pair, encoded
            elif tokens(encoded) <= table.max_length:
                yield pair, (encoded, pair)
            elif table.overlong == "cut_prompt":
                yield pair, _cut(pair, tokenizer, form, table.max_length)
            else:
                yield pair, OVERLONG


def _encoded_once(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, form: ChatFormat
) -> list[EncodedPair | str]:
    """What an earlier run found for these pairs, or `encode`."""
    key = key_of(pairs, tokenizer, form)
    known = look_up(key, pairs) if key else None
    if known is not None:
        return known
    results = encode(pairs, tokenizer, form)
    if key:
        with suppress(SourceError):  # a cache that cannot be written costs the next run time, and nothing else
            keep(key, results)
    return results


def encode(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, form: ChatFormat) -> list[EncodedPair | str]:
    """Encode pairs of any length together; for each, its ids or the reason why it has none."""
    chosen, rejected = ([_whole(pair, getattr(pair, name)) for pair in pairs] for name in ("chosen", "rejected"))
    try:
        prompts = chat_ids(tokenizer, [pair.prompt for pair in pairs], answered=False)
        answered = chat_ids(tokenizer, [*chosen, *rejected], answered=True)
    except (*REFUSALS, Unusable, TooMuch) as error:
        if len(pairs) > 1:
            return [each for pair in pairs for each in encode([pair], tokenizer, form)]
        match error:
            case Unusable():
                return [str(error)]
            case TooMuch():
                raise ModelError(
                    f"row {pairs[0].row}: the model's chat template {error}; take the row out, or name another model"
                ) from error
            case _:
                return [f"chat template refuses it: {printable(str(error))}"]
    count = len(pairs)
    parts = zip(pairs, prompts, answered[:count], answered[count:], strict=True)
    return [_encoded(pair, form, prompt, chosen, rejected) for pair, prompt, chosen, rejected in parts]


def _whole(pair: Pair, answer: str) -> list[Message]:
    return [*pair.prompt, {"role": "assistant", "content": answer}]


def _encoded(pair: Pair, form: ChatFormat, prompt: Ids, chosen: Ids, rejected: Ids) -> EncodedPair | str:
    try:
        answers = answer_ids(form, prompt, chosen), answer_ids(form, prompt, rejected)
    except Unusable as unusable:
        return str(unusable)
    if answers[0] == answers[1]:
        return "equal answers"
    return EncodedPair(prompt, *answers, pair.row, digest(prompt, *answers))


def tokens(pair: EncodedPair) -> int:
    """Length of the prompt with the longer answer, in tokens; `data.max_length` limits it."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def _cut(pair: Pair, tokenizer: PreTrainedTokenizerBase, form: ChatFormat, max_length: int) -> Result:
    """Cut the pair's prompt until it fits, and encode what is left."""

    def excess(shorter: Pair) -> int:
        encoded = encode([shorter], tokenizer, form)[0]
        if isinstance(encoded, str):
            raise Unusable(encoded)
        return tokens(encoded) - max_length

    try:
        fitting = cut_prompt(pair, tokenizer, excess)
    except Unusable as unusable:
        return str(unusable)
    encoded = encode([fitting], tokenizer, form)[0]
    return encoded if isinstance(encoded, str) else (encoded, fitting)


def _lengths(encoded: Sequence[EncodedPair]) -> dict[str, tuple[int, int, int]]:
    return {
        "prompt": quantiles([len(pair.prompt) for pair in encoded]),
        "chosen": quantiles([len(pair.chosen) for pair in encoded]),
        "rejected": quantiles([len(pair.rejected) for pair in encoded]),
    }


def _too_long(rows: Rows, over: Sequence[int], max_length: int) -> str:
    numbers = sorted(over)
    first = ", ".join(str(row) for row in numbers[:5]) + (", ..." if len(numbers) > 5 else "")
    count = f"{len(numbers):,} pairs are" if len(numbers) > 1 else "1 pair is"
    return (
        f"{rows.name}: {count} longer than data.max_length = {max_length} tokens (row {first}); raise it, or set "
        'data.overlong to "drop" or "cut_prompt"'
    )


def _none_usable(audit: Audit) -> str:
    which = "its only row is no" if audit.rows == 1 else f"none of its {audit.rows:,} rows is a"
    return f"{audit.source}: {which} usable pair: {audit.reasons()}"
