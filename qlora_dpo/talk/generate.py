"""Generates text: greedy completions of many prompts in batches, and one reply streamed token by token.

In names: R rows of a batch, T tokens, V vocabulary.
"""

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import TopPLogitsWarper

from qlora_dpo.data.dialogue import InvalidRow, Message
from qlora_dpo.data.templates.chat_template import TEMPLATE_ERRORS, render_chats, tokenize_chats, tokenize_texts
from qlora_dpo.data.templates.template_limits import LimitExceeded
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.talk.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated completion; `tokens` does not count its end token, `ended` is False if it was cut off."""

    text: str
    tokens: int
    ended: bool
    ids: tuple[int, ...] = field(default=(), compare=False)
    """Its token ids, including the end token."""


def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch_tokens: int = 16_384,
) -> list[Completion]:
    """Complete every prompt greedily, in the order of `prompts`.

    Each token is the likeliest one: sampling, repetition penalties and length rules of the model's generation config
    are not applied. Prompts of similar length share a batch of at most `batch_tokens` tokens, completions included;
    a finished row leaves the batch. The default is large because on a CPU a step of 68 rows costs only about twice a
    step of one. A model without a key-value cache runs all of the text for each token, prompts of one length together.
    Call it inside the device's autocast. Raises ModelError if the chat template cannot write a prompt.
    """
    encoded = [tokenize_prompt(tokenizer, prompt) for prompt in prompts]
    stop_ids = stop_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id or 0
    completions: list[list[int]] = [[] for _ in prompts]
    training = model.training
    model.eval()
    try:
        padded = _supports_dynamic_cache(model)
        for batch in _batches([len(ids) for ids in encoded], max_new_tokens, batch_tokens, padded=padded):
            rows = _greedy(model, [encoded[index] for index in batch], stop_ids, pad, max_new_tokens)
            for index, ids in zip(batch, rows, strict=True):
                completions[index] = ids
    finally:
        model.train(training)
    return [_completion(tokenizer, ids, stop_ids) for ids in completions]


@dataclass
class KVCache:
    """The key-value cache of one conversation and model variant, and the tokens it holds."""

    past: DynamicCache | None = None
    """None before the first token, and always for a model without such a cache."""
    ids: list[int] = field(default_factory=list)


@dataclass
class TokenUsage:
    """Token counts of a reply so far: its prompt, the cached part of the prompt, and the reply itself."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


def generate_stream(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    settings: SamplingParams,
    kv_cache: KVCache,
    usage: TokenUsage | None = None,
) -> Generator[str, None, bool]:
    """Yield the reply to the prompt `ids` in chunks of whole characters; return True if the model ended it itself.

    Only tokens that `kv_cache` does not hold are run, so a longer conversation costs its new part. Closing the
    generator stops the reply; the tokens until then stay in `kv_cache`. The model must be in evaluation mode. `usage`
    is updated as the reply grows.
    """
    usage = TokenUsage() if usage is None else usage
    stop_ids = stop_token_ids(model, tokenizer)
    generator = torch.Generator().manual_seed(settings.seed)
    decoder = _IncrementalDecoder(tokenizer)
    new_ids = _reuse_prefix(kv_cache, model, ids)
    usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens = len(ids), len(ids) - len(new_ids), 0
    for _ in range(settings.max_new_tokens):
        token = _sample(_next_logits(model, new_ids, kv_cache), settings, generator)
        if token in stop_ids:
            yield from decoder.flush()
            return True
        usage.completion_tokens += 1
        yield from decoder.add(token)
        new_ids = [token]
    yield from decoder.flush()
    return False


def tokenize_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation, up to where the assistant's next message begins."""
    with _template_errors(tokenizer):
        return list(tokenize_chats(tokenizer, [messages], ())[0])


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a reply: eos of tokenizer and generation config, and the chat template's own end token."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos_ids = configured if isinstance(configured, list) else [configured]
    chat: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with _template_errors(tokenizer):
        after = tokenize_texts(tokenizer, [render_chats(tokenizer, [chat], answered=True)[0].rpartition("!")[2]])[0]
    # white space may come first, and a tokenizer may begin every text with a mark of its own
    template_ids = [token for token in after if token in tokenizer.added_tokens_decoder][:1]
    return frozenset(token for token in (tokenizer.eos_token_id, *eos_ids, *template_ids) if token is not None)


@contextmanager
def _template_errors(tokenizer: Any) -> Iterator[None]:
    """Turn errors of a chat template into ModelError or RecipeError with a sentence."""
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
    """The model's longest context, in tokens; None if its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _supports_dynamic_cache(model: Any) -> bool:
    """False for a model that has no key-value cache (GPT-1), or one of a class of its own (MiniMax, RWKV)."""
    plain = unwrap_peft(model)
    return _cache_name(plain) in signature(type(plain).forward).parameters and plain._supports_default_dynamic_cache()


def _empty_cache(model: Any) -> DynamicCache | None:
    """None for a model without such a cache: all of its text is run for each token."""
    return DynamicCache(config=model.config) if _supports_dynamic_cache(model) else None


def _batches(
    lengths: Sequence[int], max_new_tokens: int, batch_tokens: int, *, padded: bool = True
) -> Iterator[list[int]]:
    """Indices of prompts by rising length, in batches of `batch_tokens` with padding and completions.

    Without padding, the prompts of a batch have one length.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        is_full = (len(batch) + 1) * (lengths[index] + max_new_tokens) > batch_tokens
        if batch and (is_full or not (padded or lengths[index] == lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def _greedy(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], pad: int, max_new_tokens: int
) -> list[list[int]]:
    """Continue left-padded `prompts` with their likeliest tokens, including the end token."""
    longest = max(len(prompt) for prompt in prompts)
    device = model.get_input_embeddings().weight.device
    ids_RT = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask_RT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    position_RT = (mask_RT.cumsum(-1) - 1).clamp(min=0)
    past = _empty_cache(model)
    is_recurrent = getattr(unwrap_peft(model), "_is_stateful", False) and not _takes_positions(model)
    completions: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for count in range(max_new_tokens):
        # Once the prompt was run, a recurrent state is past all padding; FalconMamba would mask its new tokens by it
        mask = {} if is_recurrent and count else {"attention_mask": mask_RT}
        chosen_R = _last_logits(model, ids_RT, past, position_ids=position_RT, **mask).argmax(-1)
        for row, token in zip(live, chosen_R.tolist(), strict=True):
            completions[row].append(token)
        unfinished = [index for index, row in enumerate(live) if completions[row][-1] not in stop_ids]
        if not unfinished:
            break
        if len(unfinished) < len(live):
            if past is not None:
                past.batch_select_indices(torch.tensor(unfinished, device=device))
            live = [live[index] for index in unfinished]
        new_R1 = chosen_R[unfinished, None]
        mask_RT = torch.cat([mask_RT[unfinished], torch.ones_like(new_R1)], dim=-1)
        if past is None:
            ids_RT, position_RT = torch.cat([ids_RT[unfinished], new_R1], dim=-1), mask_RT.cumsum(-1) - 1
        else:
            ids_RT, position_RT = new_R1, position_RT[unfinished, -1:] + 1
    return completions


def _completion(tokenizer: Any, ids: list[int], stop_ids: Collection[int]) -> Completion:
    ended = bool(ids) and ids[-1] in stop_ids
    text_ids = ids[:-1] if ended else ids
    return Completion(tokenizer.decode(text_ids, skip_special_tokens=True), len(text_ids), ended, tuple(ids))


def _reuse_prefix(kv_cache: KVCache, model: Any, ids: Sequence[int]) -> list[int]:
    """Crop `kv_cache` to the prefix it shares with `ids`; return the other ids, which are never empty."""
    shared = 0
    while shared < min(len(kv_cache.ids), len(ids) - 1) and kv_cache.ids[shared] == ids[shared]:
        shared += 1
    surplus = len(kv_cache.ids) - shared
    # Sliding windows and recurrent states cannot be restored by dropping their last entries
    croppable = kv_cache.past is not None and all(type(layer) is DynamicLayer for layer in kv_cache.past.layers)
    if kv_cache.past is None or (surplus and not croppable):
        kv_cache.past, kv_cache.ids, shared = _empty_cache(model), [], 0
    elif surplus:
        kv_cache.past.crop(-surplus)
        kv_cache.ids = kv_cache.ids[:shared]
    return list(ids[shared:])


@torch.no_grad()
def _next_logits(model: Any, new_ids: list[int], kv_cache: KVCache) -> Tensor:
    """Run `new_ids` after the tokens in `kv_cache`; return the next token's logits (V,), float32 on the CPU."""
    past, kv_cache.past = kv_cache.past, None  # an interrupted forward pass leaves an empty cache, not a torn one
    cached_ids, kv_cache.ids = kv_cache.ids, []
    ids = [*cached_ids, *new_ids]
    start = 0 if past is None else len(cached_ids)
    ids_RT = torch.tensor([ids[start:]], device=model.get_input_embeddings().weight.device)
    position_RT = torch.arange(start, len(ids), device=ids_RT.device)[None]
    logits_RV = _last_logits(model, ids_RT, past, position_ids=position_RT)
    kv_cache.past, kv_cache.ids = past, ids
    return logits_RV[0].float().cpu()


def _last_logits(model: Any, ids_RT: Tensor, past: DynamicCache | None, **padding: Tensor) -> Tensor:
    """The next token's logits (R, V) after `ids_RT`, which follow what `past` holds."""
    if not _takes_positions(model):
        padding.pop("position_ids", None)
    cache = {"use_cache": False} if past is None else {"use_cache": True, _cache_name(model): past}
    logits_RV: Tensor = model(input_ids=ids_RT, logits_to_keep=1, **cache, **padding).logits[:, -1]
    return logits_RV


def _takes_positions(model: Any) -> bool:
    """Whether the model is told the positions of its tokens; those of recurrent layers alone, and BLOOM, are not."""
    return "position_ids" in signature(type(unwrap_peft(model)).forward).parameters


def _cache_name(model: Any) -> str:
    """The keyword of the key-value cache: `cache` since transformers 5.24, which warns about the older name."""
    return "cache" if "cache" in signature(type(unwrap_peft(model)).forward).parameters else "past_key_values"


def _sample(logits_V: Tensor, settings: SamplingParams, generator: torch.Generator) -> int:
    if logits_V.isnan().any():
        raise ModelError("the model's output is not a number; its weights or its compute dtype are broken")
    if settings.temperature == 0:
        return int(logits_V.argmax())
    scores_RV = logits_V[None] / settings.temperature
    if settings.top_p < 1:
        scores_RV = TopPLogitsWarper(settings.top_p)(None, scores_RV)
    return int(torch.multinomial(scores_RV.softmax(-1), 1, generator=generator))


class _IncrementalDecoder:
    """Turns tokens into text as they arrive; holds back tokens that end inside a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Tokens of the last chunk, as context: some decoders treat the first token of a text differently
        self.shown: list[int] = []
        self.held: list[int] = []

    def add(self, token: int) -> Iterator[str]:
        """Yield the new complete characters, if there are any."""
        self.held.append(token)
        text = self._new_text()
        # U+FFFD at the end stands for the bytes of an incomplete character
        if text and not text.endswith("\ufffd"):
            self.shown, self.held = self.held, []
            yield text

    def flush(self) -> Iterator[str]:
        """Yield the text held back so far, at the end of the reply."""
        if text := self._new_text():
            yield text

    def _new_text(self) -> str:
        before = self.tokenizer.decode(self.shown, skip_special_tokens=True)
        both: str = self.tokenizer.decode(self.shown + self.held, skip_special_tokens=True)
        return both[len(before) :]
