"""Samples a model's answers to many prompts, and keeps each as soon as it is complete."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.model.memory import free_bytes
from qlora_dpo.on_policy.journal import Journal
from qlora_dpo.on_policy.prompts import AskedPrompt
from qlora_dpo.talk.generate import context_tokens, sample_completions, tokenize_prompt
from qlora_dpo.talk.sampling import SamplingParams

MAX_BATCH_TOKENS = 2**16
MAX_ROWS = {"cpu": 64, "cuda": 512}
"""Answers that are decoded at once: more are hardly faster, and what is not complete is lost when the process ends."""
CACHE_SHARE = 0.25
"""Share of the free memory that the key-value cache of a batch may take."""


@dataclass(frozen=True)
class SampledAnswer:
    """An answer of the model; `ended` is False if it reached the limit of tokens."""

    text: str
    tokens: int
    ended: bool


def recorded_answers(journal: Journal, prompt: AskedPrompt) -> list[SampledAnswer]:
    """The answers to `prompt`; none if it was too long for the model."""
    return [SampledAnswer(**answer) for answer in journal.records[prompt.digest]]


def sample_answers(
    opened: OpenedModel,
    prompts: Sequence[AskedPrompt],
    copies: int,
    settings: SamplingParams,
    journal: Journal,
    advance: Callable[[int], None] = lambda prompts: None,
) -> None:
    """Have the model answer each prompt that `journal` lacks `copies` times; `advance` receives the number of new ones.

    A prompt that leaves no room for an answer in the model's context gets none.
    """
    model: Any = opened.model
    model.eval()
    limit = context_tokens(model)
    missing = [prompt for prompt in prompts if prompt.digest not in journal.records]
    encoded, kept = list[list[int]](), list[AskedPrompt]()
    for prompt in missing:
        ids = tokenize_prompt(opened.tokenizer, prompt.messages)
        if limit is not None and len(ids) + settings.max_new_tokens > limit:
            journal.append(prompt.digest, [])
            advance(1)
        else:
            encoded.append(ids)
            kept.append(prompt)
    if not kept:
        return
    batch_tokens = min(MAX_BATCH_TOKENS, int(CACHE_SHARE * free_bytes(opened.device) / _cache_bytes_per_token(model)))
    seeds = [prompt.digest for prompt in kept]
    with opened.device.autocast():
        for indices, completions in sample_completions(
            model, opened.tokenizer, encoded, copies, settings, seeds, batch_tokens, MAX_ROWS[opened.device.type]
        ):
            for index, of_prompt in zip(indices, completions, strict=True):
                answers = [
                    {"text": answer.text, "tokens": answer.tokens, "ended": answer.ended} for answer in of_prompt
                ]
                journal.append(kept[index].digest, answers)
            advance(len(indices))


def _cache_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values of a token in all layers, in float32, which no cache exceeds."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * 4 * int(config.num_hidden_layers) * int(kv_heads) * int(head_dim)
