"""Generates text: greedy answers to many prompts at once, and one reply streamed token by token.

In names: R rows of a batch, T tokens, V vocabulary.
"""

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import TopPLogitsWarper

from qlora_dpo.data.chat_template import TEMPLATE_ERRORS, chat_ids, render_chats, tokenize_texts
from qlora_dpo.data.dialogue import InvalidRow, Message
from qlora_dpo.data.template_limits import LimitExceeded
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.talk.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated answer; `tokens` counts it without its end token, `ended` is False if it was cut off."""

    text: str
    tokens: int
    ended: bool
    ids: tuple[int, ...] = field(default=(), compare=False)
    """Its tokens, end token included."""


def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch_tokens: int = 16_384,
) -> list[Completion]:
    """Answer every prompt greedily, in the order of `prompts`.

    Each token is the likeliest one: sampling, repetition penalties and length rules of the model's generation config
    are not applied. Prompts of like length share a batch of at most `batch_tokens` tokens, answers included, and a
    finished row leaves it. The default is large because on a CPU a step of 68 rows costs only about twice a step of
    one. Call it inside the device's autocast. Raises ModelError if a prompt cannot be written in the chat template.
    """
    encoded = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    ends = stop_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id or 0
    produced: list[list[int]] = [[] for _ in prompts]
    training = model.training
    model.eval()
    try:
        for batch in _batches([len(ids) for ids in encoded], max_new_tokens, batch_tokens):
            rows = _greedy(model, [encoded[index] for index in batch], ends, pad, max_new_tokens)
            for index, ids in zip(batch, rows, strict=True):
                produced[index] = ids
    finally:
        model.train(training)
    return [_answer(tokenizer, ids, ends) for ids in produced]


@dataclass
class KVCache:
    """The key-value cache of one speaker, and the tokens it holds."""

    past: DynamicCache | None = None
    ids: list[int] = field(default_factory=list)


@dataclass
class TokenUsage:
    """What a reply has cost so far, in tokens: the prompt, how much of it was in memory, and the reply."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


def generate_stream(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    settings: SamplingParams,
    memory: KVCache,
    tally: TokenUsage | None = None,
) -> Generator[str, None, bool]:
    """Yield the reply to prompt `ids` as it grows, in whole characters; return True if the model ended it itself.

    Only tokens that `memory` does not hold yet are run, so a longer conversation costs its new part. Closing the
    generator stops the reply; what was said until then stays in `memory`. The model must be in evaluation mode.
    `tally` is kept up to date as the reply grows.
    """
    tally = TokenUsage() if tally is None else tally
    ends = stop_token_ids(model, tokenizer)
    generator = torch.Generator().manual_seed(settings.seed)
    text = _IncrementalDecoder(tokenizer)
    new = _reuse_prefix(memory, model, ids)
    tally.prompt_tokens, tally.cached_tokens, tally.completion_tokens = len(ids), len(ids) - len(new), 0
    for _ in range(settings.max_new_tokens):
        token = _draw(_next_logits(model, new, memory), settings, generator)
        if token in ends:
            yield from text.rest()
            return True
        tally.completion_tokens += 1
        yield from text.add(token)
        new = [token]
    yield from text.rest()
    return False


def tokenize_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation up to where the assistant's next message begins."""
    with _template_errors(tokenizer):
        return list(chat_ids(tokenizer, [messages], answered=False)[0])


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: tokenizer's and generation config's, and what the chat template puts after one."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    asked: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with _template_errors(tokenizer):
        after = tokenize_texts(tokenizer, [render_chats(tokenizer, [asked], answered=True)[0].rpartition("!")[2]])[0]
    special = [each for each in after[:1] if each in tokenizer.added_tokens_decoder]
    return frozenset(each for each in (tokenizer.eos_token_id, *several, *special) if each is not None)


@contextmanager
def _template_errors(tokenizer: Any) -> Iterator[None]:
    """Turn what a chat template can do wrong into a sentence about it."""
    if tokenizer.chat_template is None:
        raise ModelError("this model's tokenizer has no chat template; take an instruction-tuned model to talk to")
    try:
        yield
    except TEMPLATE_ERRORS as error:
        raise ModelError(f"the model's chat template refuses this conversation: {error}") from error
    except LimitExceeded as error:
        raise ModelError(f"the model's chat template {error}; take another model") from error
    except InvalidRow as error:
        raise RecipeError(f"this message cannot be asked: its {error}; leave that out") from error


def context_tokens(model: Any) -> int | None:
    """The longest text, in tokens, that the model's positions reach; None if it names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _batches(lengths: Sequence[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts by rising length, as many at a time as fit `batch_tokens` with padding and answers."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda each: lengths[each]):
        if batch and (len(batch) + 1) * (lengths[index] + max_new_tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def _greedy(
    model: Any, prompts: Sequence[Sequence[int]], ends: Collection[int], pad: int, max_new_tokens: int
) -> list[list[int]]:
    """Continue left-padded `prompts` with their likeliest tokens, end token included."""
    longest = max(len(prompt) for prompt in prompts)
    device = model.get_input_embeddings().weight.device
    ids_RT = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    seen_RT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    position_RT = (seen_RT.cumsum(-1) - 1).clamp(min=0)
    past = DynamicCache(config=model.config)
    produced: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        chosen_R = _last_logits(model, ids_RT, past, attention_mask=seen_RT, position_ids=position_RT).argmax(-1)
        for row, token in zip(live, chosen_R.tolist(), strict=True):
            produced[row].append(token)
        stay = [place for place, row in enumerate(live) if produced[row][-1] not in ends]
        if not stay:
            break
        if len(stay) < len(live):
            past.batch_select_indices(torch.tensor(stay, device=device))
            live = [live[place] for place in stay]
        ids_RT = chosen_R[stay, None]
        seen_RT = torch.cat([seen_RT[stay], torch.ones_like(ids_RT)], dim=-1)
        position_RT = position_RT[stay, -1:] + 1
    return produced


def _answer(tokenizer: Any, ids: list[int], ends: Collection[int]) -> Completion:
    ended = bool(ids) and ids[-1] in ends
    said = ids[:-1] if ended else ids
    return Completion(tokenizer.decode(said, skip_special_tokens=True), len(said), ended, tuple(ids))


def _reuse_prefix(memory: KVCache, model: Any, ids: Sequence[int]) -> list[int]:
    """Cut `memory` back to what it shares with `ids` and return the rest, which is never empty."""
    shared = 0
    while shared < min(len(memory.ids), len(ids) - 1) and memory.ids[shared] == ids[shared]:
        shared += 1
    surplus = len(memory.ids) - shared
    # Sliding windows and recurrent states cannot be taken back by dropping their last entries
    plain = memory.past is not None and all(type(layer) is DynamicLayer for layer in memory.past.layers)
    if memory.past is None or (surplus and not plain):
        memory.past, memory.ids, shared = DynamicCache(config=model.config), [], 0
    elif surplus:
        memory.past.crop(-surplus)
        memory.ids = memory.ids[:shared]
    return list(ids[shared:])


@torch.no_grad()
def _next_logits(model: Any, new: list[int], memory: KVCache) -> Tensor:
    """Run `new` tokens after those in `memory` and return the next token's logits (V,), float32 on the CPU."""
    past, memory.past = memory.past, None  # a forward that is interrupted leaves an empty memory, not a torn one
    held, memory.ids = memory.ids, []
    ids_RT = torch.tensor([new], device=model.get_input_embeddings().weight.device)
    logits_RV = _last_logits(model, ids_RT, past)
    memory.past, memory.ids = past, [*held, *new]
    return logits_RV[0].float().cpu()


def _last_logits(model: Any, ids_RT: Tensor, past: DynamicCache | None, **padding: Tensor) -> Tensor:
    output = model(input_ids=ids_RT, use_cache=True, logits_to_keep=1, **{_cache_name(model): past}, **padding)
    logits_RV: Tensor = output.logits[:, -1]
    return logits_RV


def _cache_name(model: Any) -> str:
    """What the model calls its key-value cache: `cache` since transformers 5.24, which warns of the name before."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    return "cache" if "cache" in signature(type(whole).forward).parameters else "past_key_values"


def _draw(logits_V: Tensor, settings: SamplingParams, generator: torch.Generator) -> int:
    if logits_V.isnan().any():
        raise ModelError("the model's output is not a number; its weights or its compute dtype are broken")
    if settings.temperature == 0:
        return int(logits_V.argmax())
    scores_RV = logits_V[None] / settings.temperature
    if settings.top_p < 1:
        scores_RV = TopPLogitsWarper(settings.top_p)(None, scores_RV)
    return int(torch.multinomial(scores_RV.softmax(-1), 1, generator=generator))


class _IncrementalDecoder:
    """Tokens on their way to becoming text; holds back those that end inside a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.shown: list[int] = []  # the tokens of the last piece: some decoders treat a text's first token differently
        self.held: list[int] = []

    def add(self, token: int) -> Iterator[str]:
        """Yield the new whole characters, if there are any."""
        self.held.append(token)
        text = self._new()
        # U+FFFD at the end stands for bytes of a character that is not complete yet
        if text and not text.endswith("\ufffd"):
            self.shown, self.held = self.held, []
            yield text

    def rest(self) -> Iterator[str]:
        """Yield what was held back, for there will be no more."""
        if text := self._new():
            yield text

    def _new(self) -> str:
        before = self.tokenizer.decode(self.shown, skip_special_tokens=True)
        both: str = self.tokenizer.decode(self.shown + self.held, skip_special_tokens=True)
        return both[len(before) :]
