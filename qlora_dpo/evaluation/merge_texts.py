"""Chooses texts to compare two models on: held-out pairs of the run, else its samples, else a few sentences."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.data.encode import encode_pairs, load_pairs
from qlora_dpo.data.encoded import EncodedPair, digest_ids, have_rejected, without_rejected
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.evaluation.merge_chats import TrainedChat, select_chats
from qlora_dpo.files import text_lines
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.objective import Sft
from qlora_dpo.recipe.tables import is_local_path

MAX_PAIRS = 64
MAX_TOKENS = 6_000
"""Tokens in both sequences of all pairs: three float32 passes of a 135M model take a minute on two cores, and a KL over
a thousand answer tokens has two significant digits."""

FALLBACK_SENTENCES = (
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
"""Beginnings with two continuations each, for an adapter whose data are unknown."""


@dataclass(frozen=True)
class ComparisonTexts:
    """Pairs to compare two models on; `why_no_accuracy` is empty if they are the run's held-out pairs."""

    encoded: Sequence[EncodedPair]
    name: str
    why_no_accuracy: str = ""
    chats: Sequence[TrainedChat] = ()
    """Held-out chats whose tokens the written model's own template must give."""


def load_comparison_texts(folder: Path, recipe: Recipe | None, tokenizer: Any) -> ComparisonTexts:
    """Held-out pairs of the run, up to `MAX_PAIRS` and about `MAX_TOKENS`; if there are none, the next best texts."""
    why = "the adapter comes without a recipe"
    if recipe is not None:
        count = min(recipe.data.max_eval_samples or MAX_PAIRS, MAX_PAIRS)
        table = recipe.data.model_copy(update={"max_eval_samples": count})
        try:
            supervised = isinstance(recipe.objective, Sft)
            heldout = load_pairs(table, "eval", tokenizer, recipe.train.seed, supervised=supervised)
        except QloraDpoError as error:
            why = f"the held-out pairs cannot be read ({_strip_folders(str(error), recipe)})"
        else:
            pairs = sample_within_tokens(heldout.encoded, recipe.train.seed)
            chats = select_chats(heldout, tokenizer)
            if not have_rejected(pairs):
                answers = [without_rejected(pair) for pair in pairs]
                why = "the held-out rows have one answer each"
                return ComparisonTexts(answers, f"{len(pairs)} held-out answers of the run", why, chats)
            return ComparisonTexts(pairs, f"{len(pairs)} held-out pairs of the run", chats=chats)
    if sampled := _load_samples(folder / "samples.jsonl", tokenizer):
        return ComparisonTexts(sampled, f"{len(sampled)} sample prompts of the run", why)
    return ComparisonTexts(_encode_sentences(tokenizer), f"{len(FALLBACK_SENTENCES)} built-in sentences", why)


def _strip_folders(text: str, recipe: Recipe) -> str:
    """`text` without the folders of the recipe's data, since it goes into a card that others read."""
    for name in (recipe.data.train, recipe.data.eval, *(source.source for source in recipe.data.mix or ())):
        if name is not None and is_local_path(name):
            text = text.replace(name, Path(name).name)
    return text


def sample_within_tokens(pairs: Sequence[EncodedPair], seed: int) -> list[EncodedPair]:
    """Pairs drawn at random until `MAX_TOKENS` are reached; at least one."""
    sample: list[EncodedPair] = []
    tokens = 0
    order = random.Random(seed).sample(pairs, len(pairs))  # noqa: S311 - a draw of samples, no secret
    for pair in order:
        tokens += 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
        if sample and tokens > MAX_TOKENS:
            break
        sample.append(pair)
    return sample


def _load_samples(file: Path, tokenizer: Any) -> list[EncodedPair]:
    """The prompts of samples.jsonl with the answers of tuned and base model as pairs; empty if there are none."""
    if not file.is_file():
        return []
    try:
        records = [json.loads(line) for line in text_lines(file.read_text(encoding="utf-8"))[:MAX_PAIRS]]
        pairs = [
            Pair(prompt=tuple(record["prompt"]), chosen=record["tuned"], rejected=record["base"], row=row, extra={})
            for row, record in enumerate(records, start=1)
        ]
        results = encode_pairs(pairs, tokenizer, detect_chat_format(tokenizer))
    except (QloraDpoError, ValueError, KeyError, TypeError):
        return []
    return sample_within_tokens([result for result in results if isinstance(result, EncodedPair)], seed=0)


def _encode_sentences(tokenizer: Any) -> list[EncodedPair]:
    pairs = []
    for row, (start, *ends) in enumerate(FALLBACK_SENTENCES, start=1):
        prompt = tuple(tokenizer(start).input_ids)
        first, second = (tuple(tokenizer(end, add_special_tokens=False).input_ids) for end in ends)
        pairs.append(EncodedPair(prompt, first, second, row, digest_ids(prompt, first, second)))
    return pairs
