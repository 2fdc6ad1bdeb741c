"""The texts on which two models are compared: held-out pairs of the run, else its samples, else a few sentences."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.data.chat_format import chat_format
from qlora_dpo.data.encode import encode, load_pairs
from qlora_dpo.data.encoded import EncodedPair, digest
from qlora_dpo.data.pairs import Pair
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.tables import is_local

MOST_PAIRS = 64
MOST_TOKENS = 6_000
"""Of both sequences of all pairs: three float32 passes of a 135M model take a minute on two cores, and a
KL over a thousand answer tokens has two good digits."""

SENTENCES = (
    (
        "The library opens at nine",
        " and closes at six, so there is time for a walk.",
        " because the keys were lost again.",
    ),
    ("To cook rice,", " rinse it, add twice as much water and let it simmer.", " you should first buy a bigger house."),
    (
        "Water boils at a lower temperature",
        " on a mountain, since the air is thinner there.",
        " than most people think it is.",
    ),
    ("She asked him where the station was,", " and he pointed down the street.", " but it had been closed for years."),
)
"""Beginnings with two ways to go on, for an adapter that nothing else is known of."""


@dataclass(frozen=True)
class Texts:
    """Pairs to compare two models on. `why_no_accuracy` is empty if they are the run's held-out pairs."""

    encoded: Sequence[EncodedPair]
    name: str
    why_no_accuracy: str = ""


def texts_for(folder: Path, recipe: Recipe | None, tokenizer: Any) -> Texts:
    """Held-out pairs of the run, at most `MOST_PAIRS` and about `MOST_TOKENS`; without them the next best texts."""
    why = "the adapter comes without a recipe"
    if recipe is not None:
        wanted = min(recipe.data.max_eval_samples or MOST_PAIRS, MOST_PAIRS)
        table = recipe.data.model_copy(update={"max_eval_samples": wanted})
        try:
            encoded = load_pairs(table, "eval", tokenizer, recipe.train.seed).encoded
        except QloraDpoError as error:
            why = f"the held-out pairs cannot be read ({_without_folders(str(error), recipe)})"
        else:
            some = within_budget(encoded, recipe.train.seed)
            return Texts(some, f"{len(some)} held-out pairs of the run")
    if sampled := _samples(folder / "samples.jsonl", tokenizer):
        return Texts(sampled, f"{len(sampled)} sample prompts of the run", why)
    return Texts(_sentences(tokenizer), f"{len(SENTENCES)} built-in sentences", why)


def _without_folders(text: str, recipe: Recipe) -> str:
    """`text` without the folders that the recipe's data lies in: it goes into a card that others read."""
    for name in (recipe.data.train, recipe.data.eval, *(each.source for each in recipe.data.mix or ())):
        if name is not None and is_local(name):
            text = text.replace(name, Path(name).name)
    return text


def within_budget(pairs: Sequence[EncodedPair], seed: int) -> list[EncodedPair]:
    """Pairs in the order of a draw until `MOST_TOKENS` are reached; always at least one."""
    taken: list[EncodedPair] = []
    tokens = 0
    order = random.Random(seed).sample(pairs, len(pairs))  # noqa: S311 - a draw of samples, no secret
    for pair in order:
        tokens += 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
        if taken and tokens > MOST_TOKENS:
            break
        taken.append(pair)
    return taken


def _samples(file: Path, tokenizer: Any) -> list[EncodedPair]:
    """The prompts of samples.jsonl, each with the tuned and the base model's answer; empty if there are none."""
    if not file.is_file():
        return []
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:MOST_PAIRS]]
        pairs = [
            Pair(prompt=tuple(each["prompt"]), chosen=each["tuned"], rejected=each["base"], row=row, extra={})
            for row, each in enumerate(records, start=1)
        ]
        results = encode(pairs, tokenizer, chat_format(tokenizer))
    except (QloraDpoError, ValueError, KeyError, TypeError):
        return []
    return within_budget([result for result in results if isinstance(result, EncodedPair)], seed=0)


def _sentences(tokenizer: Any) -> list[EncodedPair]:
    pairs = []
    for row, (start, *ends) in enumerate(SENTENCES, start=1):
        prompt = tuple(tokenizer(start).input_ids)
        first, second = (tuple(tokenizer(end, add_special_tokens=False).input_ids) for end in ends)
        pairs.append(EncodedPair(prompt, first, second, row, digest(prompt, first, second)))
    return pairs
