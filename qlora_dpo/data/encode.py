"""Pairs become token ids: the prompt, and each answer from where the prompt ends to the template's end token."""

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_dpo.data.audit import OVERLONG, Audit, quantiles
from qlora_dpo.data.chat_format import ChatFormat, answer_ids, chat_format
from qlora_dpo.data.chat_template import AS_TEXT, FOLDED, REFUSALS, Habits, habits, ids_together, repairs
from qlora_dpo.data.dialogue import Message, Unusable, printable
from qlora_dpo.data.encoded import EncodedPair, EncodedPairs, Ids, digest
from qlora_dpo.data.encoded_cache import keep, key_of, look_up
from qlora_dpo.data.lazily import Lazily
from qlora_dpo.data.limits import TooMuch
from qlora_dpo.data.overlong import cut_prompt
from qlora_dpo.data.pairs import Found, Numbers, Pair, Reading, find_pairs
from qlora_dpo.data.sources import Part, Rows, read_rows
from qlora_dpo.errors import DataError, ModelError, SourceError
from qlora_dpo.recipe_data import DataTable

CUT = "prompt cut at the front"
CHUNK = 1024
"""Pairs rendered and tokenized at once: enough to keep the tokenizer's threads busy, few enough to draw 50 quickly."""


@dataclass(frozen=True)
class PairSet:
    """The usable pairs of one part of the data in the order of their rows, as ids and as text, and their account."""

    encoded: Sequence[EncodedPair]
    pairs: Sequence[Pair]
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
    found, apart = _own(find_pairs(rows, keep, reading, table.held_out_share), part)
    wanted = table.max_train_samples if part == "train" else table.max_eval_samples
    order = np.arange(len(found.pairs)) if wanted is None else _drawn(found.row_P, len(rows.rows), seed)
    used = _Used()
    dropped = {reason: list(numbers) for reason, numbers in found.dropped.items()}
    looked_at = 0
    for place, pair, result in _results(found.pairs, order, tokenizer, form, table):
        looked_at += 1
        if isinstance(result, str):
            dropped.setdefault(result, []).append(pair.row)
            continue
        used.add(place, pair, *result, habits(tokenizer))
        if len(used.encoded) == wanted:
            break
    if table.overlong == "error" and OVERLONG in dropped:
        raise DataError(_too_long(rows, dropped[OVERLONG], table.max_length))
    numbers = used.encoded.rows()
    left_out = _once(dropped, set(numbers.tolist()))
    drawn = np.unique(found.row_P[order[:looked_at]])
    audit = Audit(
        source=rows.name,
        shape=found.shape.value,
        rows=len(rows.rows),
        used=len(numbers),
        at_reading=sum(map(len, found.dropped.values())),
        apart=apart,
        further=len(numbers) - len(np.unique(numbers)),
        dropped=left_out,
        not_drawn=len(np.unique(found.row_P)) - len(drawn),
        repaired=used.repairs(),
        tokens=dict(zip(("prompt", "chosen", "rejected"), map(quantiles, used.encoded.lengths().T), strict=True)),
        first={reason: rows.place(numbers[0]) for reason, numbers in left_out.items()},
        note=form.note,
    )
    if not len(numbers):
        raise DataError(_none_usable(audit))
    by_row = np.argsort(numbers, kind="stable")
    return PairSet(used.encoded.pairs().only(by_row), used.texts(found.pairs).only(by_row), audit)


def _own(found: Found, part: Part) -> tuple[Found, int]:
    """The pairs of one part, and how many rows are the other part's, where a share of the prompts is held out."""
    if found.held_P is None:
        return found, 0
    mine = found.only(found.held_P == (part == "eval"))
    apart = len(np.setdiff1d(found.row_P, mine.row_P))
    if part == "train":
        return mine, apart
    # a row that is no pair belongs to no side; the training part accounts for it
    return replace(mine, dropped={}), apart + sum(map(len, found.dropped.values()))


class _Used:
    """The pairs that are used, as they are found."""

    def __init__(self) -> None:
        self.encoded = EncodedPairs()
        self.places = array("q")
        self.cut = dict[int, Pair]()
        self.repaired: dict[str, list[int]] = {CUT: [], FOLDED: [], AS_TEXT: []}

    def add(self, place: int, found: Pair, encoded: EncodedPair, pair: Pair, own: Habits) -> None:
        """Take in the pair that was found at `place`, as it is encoded."""
        if pair is not found:
            self.cut[len(self.places)] = pair
            self.repaired[CUT].append(pair.row)
        answers: list[Message] = [{"role": "assistant", "content": each} for each in (pair.chosen, pair.rejected)]
        for what in repairs(own, [*pair.prompt, *answers]):
            self.repaired[what].append(pair.row)
        self.encoded.add(encoded)
        self.places.append(place)

    def repairs(self) -> dict[str, tuple[int, ...]]:
        """Numbers of the used rows by what was done to them, in the order in which it was first done."""
        done = [(what, tuple(sorted(rows))) for what, rows in self.repaired.items() if rows]
        return dict(sorted(done, key=lambda each: each[1][0]))

    def texts(self, pairs: Sequence[Pair]) -> Lazily[Pair]:
        """The pairs as text."""
        return Lazily(len(self.places), lambda index: self.cut.get(index) or pairs[self.places[index]])


def _once(dropped: Mapping[str, Sequence[int]], used: set[int]) -> dict[str, tuple[int, ...]]:
    """Each row under one reason at most, and under none if a pair of it is used."""
    counted, left_out = set(used), dict[str, tuple[int, ...]]()
    for reason, numbers in dropped.items():
        if new := sorted(set(numbers) - counted):
            left_out[reason] = tuple(new)
            counted |= set(new)
    return left_out


def _drawn(row_P: Numbers, rows: int, seed: int) -> Numbers:
    """The pairs in the order of the draw. `random.random()` is the one method Python keeps the same in all versions."""
    generator = random.Random(seed)  # noqa: S311 - a draw of samples, no secret
    draws = np.array([generator.random() for _ in range(rows)])
    return np.argsort(draws[row_P - 1], kind="stable")


Result = tuple[EncodedPair, Pair] | str
"""An encoded pair with its text (whose prompt may have been cut), or the reason why there is none."""


def _results(
    pairs: Sequence[Pair], order: Numbers, tokenizer: PreTrainedTokenizerBase, form: ChatFormat, table: DataTable
) -> Iterator[tuple[int, Pair, Result]]:
    """Yield every pair in `order`, with its place among `pairs` and what became of it."""
    for start in range(0, len(order), CHUNK):
        places = order[start : start + CHUNK].tolist()
        chunk = [pairs[place] for place in places]
        for place, pair, encoded in zip(places, chunk, _encoded_once(chunk, tokenizer, form), strict=True):
            if isinstance(encoded, str):
                yield place, pair, encoded
            elif tokens(encoded) <= table.max_length:
                yield place, pair, (encoded, pair)
            elif table.overlong == "cut_prompt":
                yield place, pair, _cut(pair, tokenizer, form, table.max_length)
            else:
                yield place, pair, OVERLONG


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
        found = ids_together(tokenizer, [pair.prompt for pair in pairs], [*chosen, *rejected])
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
    parts = zip(pairs, found[:count], found[count : 2 * count], found[2 * count :], strict=True)
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
