"""Generates text: greedy completions of many prompts in batches, and one reply streamed token by token.

In names: R rows of a batch, T tokens, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import TopPLogitsWarper

from qlora_dpo.data.dialogue import InvalidRow, Message
from qlora_dpo.data.templates.chat_template import TEMPLATE_ERRORS, render_chats, tokenize_chats, tokenize_texts
from qlora_dpo.data.templates.template_limits import LimitExceeded
from qlora_dpo.errors import ModelError, RecipeError, is_out_of_memory
from qlora_dpo.talk.decode import decode_batch, empty_cache, last_logits, prompt_batches, supports_dynamic_cache
from qlora_dpo.talk.fused_decoder import FusedDecoder, fused_decoder
from qlora_dpo.talk.sampling import SamplingParams

GetDecoder = Callable[[], FusedDecoder | None]
"""Returns the decoder of a model, built in the first call; None for a model that has to decode with its own forward."""
NOT_A_NUMBER = "the model's output is not a number; its weights or its compute dtype are broken"


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
        padded, decoder = supports_dynamic_cache(model), fused_decoder(model, len(prompts)) if prompts else None
        for batch in prompt_batches([len(ids) for ids in encoded], max_new_tokens, batch_tokens, padded=padded):
            in_batch = [encoded[index] for index in batch]
            rows = decode_batch(model, in_batch, stop_ids, pad, max_new_tokens, _likeliest, decoder=decoder)
            for index, ids in zip(batch, rows, strict=True):
                completions[index] = ids
    finally:
        model.train(training)
    return [_completion(tokenizer, ids, stop_ids) for ids in completions]


def sample_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    copies: int,
    settings: SamplingParams,
    seeds: Sequence[str],
    batch_tokens: int,
    max_rows: int = 256,
) -> Iterator[tuple[list[int], list[list[Completion]]]]:
    """Sample `copies` completions of each prompt; yields a batch at a time, the prompts' indices and completions.

    The random numbers of a completion come from settings.seed, its prompt's own of `seeds` and its number, so they do
    not depend on which prompts share its batch of at most `batch_tokens` tokens, completions included, and `max_rows`
    completions. After an out-of-memory error a batch is tried again in halves. Call it inside the device's autocast,
    the model in evaluation mode.
    """
    stop_ids = stop_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id or 0
    decoder = fused_decoder(model, min(len(prompts) * copies, max_rows))
    batches = prompt_batches(
        [len(ids) for ids in prompts],
        settings.max_new_tokens,
        max(batch_tokens // copies, 1),
        padded=supports_dynamic_cache(model),
    )
    size = max(max_rows // copies, 1)
    waiting = [batch[start : start + size] for batch in batches for start in range(0, len(batch), size)][::-1]
    while waiting:
        batch = waiting.pop()
        uniform_RT = torch.stack(
            [
                torch.rand(
                    settings.max_new_tokens,
                    generator=_generator(settings.seed, seeds[index], copy),
                    dtype=torch.float64,
                )
                for index in batch
                for copy in range(copies)
            ]
        )
        choose = partial(_sample_rows, settings, uniform_RT)
        try:
            in_batch = [prompts[index] for index in batch]
            rows = decode_batch(model, in_batch, stop_ids, pad, settings.max_new_tokens, choose, copies, decoder)
        except Exception as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            waiting += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
            continue
        completions = [_completion(tokenizer, ids, stop_ids) for ids in rows]
        yield batch, [completions[start : start + copies] for start in range(0, len(completions), copies)]


def _generator(*parts: object) -> torch.Generator:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _sample_rows(
    settings: SamplingParams, uniform_RT: Tensor, logits_RV: Tensor, rows: Sequence[int], count: int
) -> Tensor:
    """The token of each row at which its cumulative probability passes the row's uniform random number."""
    if logits_RV.isnan().any():
        raise ModelError(NOT_A_NUMBER)
    if settings.temperature == 0:
        return logits_RV.argmax(-1)
    cumulative_RV = _probabilities(logits_RV.float(), settings).cumsum(-1, dtype=torch.float64)
    uniform_R1 = uniform_RT[list(rows), count, None].to(cumulative_RV.device)
    return torch.searchsorted(cumulative_RV, uniform_R1 * cumulative_RV[:, -1:], right=True)[:, 0]


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
    get_decoder: GetDecoder | None = None,
) -> Generator[str, None, bool]:
    """Yield the reply to the prompt `ids` in chunks of whole characters; return True if the model ended it itself.

    Only tokens that `kv_cache` does not hold are run, so a longer conversation costs its new part. Closing the
    generator stops the reply; the tokens until then stay in `kv_cache`. The model must be in evaluation mode. `usage`
    is updated as the reply grows. The decoder of `get_decoder` has the weights of `model`, and takes over after the
    first token, so that this token need not wait until the decoder is built.
    """
    usage = TokenUsage() if usage is None else usage
    stop_ids = stop_token_ids(model, tokenizer)
    generator = torch.Generator().manual_seed(settings.seed)
    text = _IncrementalDecoder(tokenizer)
    new_ids = _reuse_prefix(kv_cache, model, ids)
    usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens = len(ids), len(ids) - len(new_ids), 0
    with closing(_logits_stream(model, new_ids, settings.max_new_tokens, kv_cache, get_decoder)) as logits:
        logits_V = next(logits)
        while True:
            token = _sample(logits_V, settings, generator)
            if token in stop_ids:
                yield from text.flush()
                return True
            usage.completion_tokens += 1
            yield from text.add(token)
            if usage.completion_tokens == settings.max_new_tokens:
                yield from text.flush()
                return False
            logits_V = logits.send(token)


def _logits_stream(
    model: Any, new_ids: list[int], most: int, kv_cache: KVCache, get_decoder: GetDecoder | None
) -> Generator[Tensor, int, None]:
    """Yield the next token's logits (V,) after `new_ids`, and after each token that is sent; all stay in `kv_cache`."""
    token = yield _next_logits(model, new_ids, kv_cache)
    decoder = None if get_decoder is None else get_decoder()
    if decoder is None:
        while True:
            token = yield _next_logits(model, [token], kv_cache)
    cache, decoded = decoder.cache([(kv_cache.past, [len(kv_cache.ids)])], 1, most), list[int]()
    slot_R = torch.zeros(1, dtype=torch.long)
    try:
        while True:
            decoded.append(token)
            token = yield decoder.next_logits(torch.tensor([token]), cache, slot_R)[0]
    finally:
        past, kv_cache.past = kv_cache.past, None
        ids, kv_cache.ids = [*kv_cache.ids, *decoded[: cache.count]], []  # without a token whose step was interrupted
        cache.append_completion(past)
        kv_cache.past, kv_cache.ids = past, ids


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


def _likeliest(logits_RV: Tensor, rows: Sequence[int], count: int) -> Tensor:
    return logits_RV.argmax(-1)


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
        kv_cache.past, kv_cache.ids, shared = empty_cache(model), [], 0
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
    logits_RV = last_logits(model, ids_RT, past, position_ids=position_RT)
    kv_cache.past, kv_cache.ids = past, ids
    return logits_RV[0].float().cpu()


def _sample(logits_V: Tensor, settings: SamplingParams, generator: torch.Generator) -> int:
    if logits_V.isnan().any():
        raise ModelError(NOT_A_NUMBER)
    if settings.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(_probabilities(logits_V[None], settings), 1, generator=generator))


def _probabilities(logits_RV: Tensor, settings: SamplingParams) -> Tensor:
    """What tokens are drawn with (R, V), by temperature and top_p."""
    scores_RV = logits_RV / settings.temperature
    if settings.top_p < 1:
        scores_RV = TopPLogitsWarper(settings.top_p)(None, scores_RV)
    return scores_RV.softmax(-1)


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
