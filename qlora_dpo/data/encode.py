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
from qlora_dpo.data.audit import OVERLONG, Audit, quantiles
from qlora_dpo.data.chat_format import ChatFormat, answer_ids, chat_format
from qlora_dpo.data.chat_template import (
    AS_TEXT,
    FOLDED,
    REFUSALS,
    Habits,
    forget_turns,
    habits,
    ids_together,
    reads_tools,
    repairs,
)
from qlora_dpo.data.dialogue import Message, Unusable, printable
from qlora_dpo.data.encoded import EncodedPair, EncodedPairs, Ids, digest
from qlora_dpo.data.lazy_sequence import Lazily
from qlora_dpo.data.mixture import Mixture, find_all
from qlora_dpo.data.pairs import Flags, Found, Numbers, Pair
from qlora_dpo.data.progress import Watch, unwatched, watched
from qlora_dpo.data.sources import Part, Rows
from qlora_dpo.data.template_limits import TooMuch, few_collections
from qlora_dpo.data.token_cache import FORMAT, keep, key_of, look_up, tokenizer_text
from qlora_dpo.data.truncation import cut_prompt
from qlora_dpo.errors import DataError, ModelError, SourceError
from qlora_dpo.recipe.data import DataTable

CUT = "prompt cut at the front"
CHUNK = 1024
"""Pairs rendered and tokenized at once: enough to keep the tokenizer's threads busy, few enough to draw 50 quickly."""


@dataclass(frozen=True)
class PairSet:
    """The usable pairs of one part of the data in the order of their rows, as ids and as text, and their account."""

    encoded: Sequence[EncodedPair]
    pairs: Sequence[Pair]
    audit: Audit


@few_collections()
def load_pairs(
    table: DataTable,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    keep: Mapping[str, str] = MappingProxyType({}),
    watch: Watch = unwatched,
) -> PairSet:
    """Read, check, draw and encode the pairs of `part`; `keep` names columns that stay with each pair as text,
    and the keys of the recipe that ask for them; `watch` is told how far it is.

    With `max_train_samples` or `max_eval_samples`, every row gets a random number from `random.Random(seed)`, in
    the order of the rows; rows are then taken from the smallest number on until that many usable pairs are found, so
    the draw is the same on every machine and a row that becomes unusable moves no other. Raises RecipeError,
    SourceError, DataError or ModelError, each one sentence.
    """
    form = chat_format(tokenizer)
    mixture = find_all(table, part, keep, watch)
    rows, (found, mine_P, apart) = mixture.rows, _own(mixture.found, part)
    mixture = replace(mixture, source_P=mixture.source_P[mine_P])
    wanted = table.max_train_samples if part == "train" else table.max_eval_samples
    in_order = wanted is None and not mixture.is_drawn
    order = np.arange(len(found.pairs)) if in_order else _drawn(found.row_P, len(rows.rows), seed)
    name = _name(mixture.rows, (table, part, seed, keep), tokenizer, form)
    known = scan_cache.recall(name)
    used, looked_at, dropped = _recalled(known) or _looked_at(
        mixture, found, order, wanted, tokenizer, form, table, watch
    )
    forget_turns()
    if known is None:
        _kept_for_later(name, used, looked_at, dropped)
    if table.overlong == "error" and OVERLONG in dropped:
        raise DataError(_too_long(rows, dropped[OVERLONG], table.max_length))
    places = np.array(used.places, dtype=np.int64)
    kept_U = mixture.kept(mixture.source_P[places], wanted)
    if not kept_U.any() and len(places):
        raise DataError(_no_share(mixture, mixture.source_P[places], part))
    numbers = used.encoded.rows()[kept_U]
    left_out = _once(dropped, set(numbers.tolist()))
    seen = np.setdiff1d(looked_at, places[~kept_U])
    audit = Audit(
        source=rows.name,
        shape=mixture.shape,
        rows=len(rows.rows),
        used=len(numbers),
        at_reading=sum(map(len, found.dropped.values())),
        apart=apart,
        further=len(numbers) - len(np.unique(numbers)),
        dropped=left_out,
        not_drawn=len(np.unique(found.row_P)) - len(np.unique(found.row_P[seen])),
        repaired=used.repairs(set(numbers.tolist())),
        tokens=dict(
            zip(("prompt", "chosen", "rejected"), map(quantiles, used.encoded.lengths()[kept_U].T), strict=True)
        ),
        first={reason: rows.place(numbers[0]) for reason, numbers in left_out.items()},
        note=form.note,
        parts=_parts(mixture, mixture.source_P[places[kept_U]]),
    )
    if not len(numbers):
        raise DataError(_none_usable(audit, part, table))
    by_row = np.flatnonzero(kept_U)[np.argsort(numbers, kind="stable")]
    return PairSet(used.encoded.pairs().only(by_row), used.texts(found.pairs).only(by_row), audit)


Looked = tuple["_Used", Numbers, dict[str, list[int]]]
Asked = tuple[DataTable, Part, int, Mapping[str, str]]
"""Table, part, seed and kept columns."""


def _name(
    rows: Rows, asked: tuple[DataTable, Part, int, Mapping[str, str]], tokenizer: Any, form: ChatFormat
) -> str | None:
    """The name under which what became of these rows is kept; None if they are few, or not to be told apart."""
    text = tokenizer_text(tokenizer)
    if not rows.fingerprint or len(rows.rows) < scan_cache.MANY or text is None:
        return None
    table, part, seed, keep = asked
    # where the rows came from is in their fingerprint
    keys = table.model_dump(mode="json", exclude={"train", "eval", "max_bad_share"}) | {"share": table.held_out_share}
    return scan_cache.name_of(FORMAT, rows.fingerprint, text, repr(form), keys, part, seed, sorted(keep))


def _recalled(known: scan_cache.Kept | None) -> Looked | None:
    """What `_looked_at` has returned in an earlier run."""
    if known is None:
        return None
    used = _Used()
    used.encoded = EncodedPairs.kept(known)
    used.places = array("q", known.columns["place"].tobytes())
    used.cut = {int(place): replace(Pair(**pair), prompt=tuple(pair["prompt"])) for place, pair in known.facts["cut"]}
    used.repaired = known.facts["repaired"]
    return used, known.columns["looked_at"], known.facts["dropped"]


def _kept_for_later(name: str | None, used: "_Used", looked_at: Numbers, dropped: dict[str, list[int]]) -> None:
    if name is None:
        return
    columns = {**used.encoded.columns(), "place": np.array(used.places, dtype=np.int64), "looked_at": looked_at}
    cut = [(place, asdict(pair)) for place, pair in used.cut.items()]
    scan_cache.keep(name, columns, {"cut": cut, "repaired": used.repaired, "dropped": dropped}, used.encoded.ids)


def _looked_at(
    mixture: Mixture,
    found: Found,
    order: Numbers,
    wanted: int | None,
    tokenizer: PreTrainedTokenizerBase,
    form: ChatFormat,
    table: DataTable,
    watch: Watch,
) -> Looked:
    """Take usable pairs in `order` until there are enough: of each source, and in all.

    Returns the pairs, the places of all that were looked at, and the rows that gave none by reason.
    """
    used, looked_at = _Used(), array("q")
    dropped = {reason: list(numbers) for reason, numbers in found.dropped.items()}
    left = mixture.limits(wanted)
    asked = _enough_left(order, mixture.source_P, left) if mixture.is_drawn else order.tolist()
    results = _results(found.pairs, asked, tokenizer, form, table)
    for place, pair, result in watched(results, "tokenize", len(order), watch):
        source = mixture.source_P[place]
        if left[source] <= 0:
            continue
        looked_at.append(place)
        if isinstance(result, str):
            dropped.setdefault(result, []).append(pair.row)
            continue
        used.add(place, pair, *result, habits(tokenizer))
        left[source] -= 1
        if mixture.weights is None and len(used.encoded) == wanted:
            break
    return used, np.array(looked_at, dtype=np.int64), dropped


def _enough_left(order: Numbers, source_P: Numbers, left: Sequence[float]) -> Iterator[int]:
    """The places in `order` whose source has not yet given what it may; `left` changes while this is read."""
    return (place for place in order.tolist() if left[source_P[place]] > 0)


def _parts(mixture: Mixture, source_U: Numbers) -> tuple[tuple[str, int, int], ...]:
    """Name, first row number and used pairs of each source of a mixture; nothing where there is one source only."""
    counts = np.bincount(source_U, minlength=len(mixture.names)).tolist()
    return tuple(zip(mixture.names, mixture.first_rows, counts, strict=True)) if len(counts) > 1 else ()


def _own(found: Found, part: Part) -> tuple[Found, Flags, int]:
    """The pairs of one part, which ones they are, and how many rows are the other part's, where a share is held out."""
    if found.held_P is None:
        return found, np.ones(len(found.pairs), dtype=bool), 0
    mine_P = found.held_P == (part == "eval")
    mine = found.only(mine_P)
    apart = len(np.setdiff1d(found.row_P, mine.row_P))
    if part == "train":
        return mine, mine_P, apart
    # a row that is no pair belongs to no side; the training part accounts for it
    return replace(mine, dropped={}), mine_P, apart + sum(map(len, found.dropped.values()))


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
        for what in repairs(own, [*pair.prompt, *answers], pair.tools):
            self.repaired[what].append(pair.row)
        self.encoded.add(encoded)
        self.places.append(place)

    def repairs(self, used: set[int]) -> dict[str, tuple[int, ...]]:
        """Numbers of the `used` rows by what was done to them, in the order in which it was first done."""
        done = [(what, sorted(row for row in rows if row in used)) for what, rows in self.repaired.items()]
        return {what: tuple(rows) for what, rows in sorted(done, key=lambda each: each[1][:1]) if rows}

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
    pairs: Sequence[Pair], order: Iterable[int], tokenizer: PreTrainedTokenizerBase, form: ChatFormat, table: DataTable
) -> Iterator[tuple[int, Pair, Result]]:
    """Yield every pair in `order`, with its place among `pairs` and what became of it."""
    left = iter(order)
    while places := list(islice(left, CHUNK)):
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
    tools = [pair.tools for pair in pairs]
    if any(tools) and not reads_tools(tokenizer):
        raise ModelError(
            "the data has a column tools, which the model's chat template does not read; name a model whose template "
            "does in model.name, or leave the column out"
        )
    try:
        found = ids_together(tokenizer, [pair.prompt for pair in pairs], [*chosen, *rejected], 3 * tools)
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


def _no_share(mixture: Mixture, source_U: Numbers, part: Part) -> str:
    counts = np.bincount(source_U, minlength=len(mixture.names))
    name = mixture.names[int(np.argmin(counts))]
    which, advice = (
        ("training", "leave its weight or it out")
        if part == "train"
        else ("held-out", "raise data.eval_share, or name the held-out pairs in data.eval")
    )
    return f"{name}: has {counts.min()} {which} pairs, too few for its share of the mixture; {advice}"


def _none_usable(audit: Audit, part: Part, table: DataTable) -> str:
    if audit.apart and not audit.dropped:
        which, advice = ("training", "lower") if part == "train" else ("held-out", "raise")
        return (
            f"{audit.source}: data.eval_share = {table.held_out_share} of its prompts leaves no {which} pair of its "
            f"{audit.apart:,}; {advice} it, or name the held-out pairs in data.eval"
        )
    which = "its only row is no" if audit.rows == 1 else f"none of its {audit.rows:,} rows is a"
    return f"{audit.source}: {which} usable pair: {audit.reasons()}"
