"""A conversation with a model: its messages, the variants that reply, and how the history fits in the context."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qlora_dpo.data.dialogue import Message
from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.talk.fused_decoder import FusedDecoder, fused_decoder
from qlora_dpo.talk.generate import KVCache, TokenUsage, context_tokens, generate_stream, tokenize_prompt
from qlora_dpo.talk.sampling import SamplingParams
from qlora_dpo.talk.terminal import EscapeFilter

ModelVariant = Literal["tuned", "base", "model"]
Decoders = dict[ModelVariant, FusedDecoder | None]
"""The decoder of each variant that has replied; None for one that has to decode with the model's own forward."""


@dataclass(frozen=True)
class Reply:
    """A reply as it was shown; `ended` is False if it was stopped or cut off."""

    variant: ModelVariant
    text: str
    ended: bool


@dataclass
class Conversation:
    """The state of a chat. Every variant replies to each message; the first one's reply enters the history."""

    title: str
    model: Any
    tokenizer: Any
    device: Device
    settings: SamplingParams
    variants: tuple[ModelVariant, ...]
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    num_dropped: int = 0
    """Number of the oldest messages that no longer fit in the context."""
    draws: int = 0
    """Replies started so far; each is sampled with another seed, so that a retry gives another reply."""
    kv_caches: dict[ModelVariant, KVCache] = field(default_factory=dict)
    decoders: Decoders = field(default_factory=dict)
    last_prompt: list[Message] = field(default_factory=list)
    """The messages of the last prompt, up to the user's last message."""
    replies: list[Reply] = field(default_factory=list)
    """All replies to that prompt in the order they were shown: of both variants, and of retries."""
    usage: TokenUsage = field(default_factory=TokenUsage)
    """Token counts of the last reply."""
    beta: float | None = None
    """The beta that the adapter was trained with; None if it is unknown."""
    target: str = ""
    """The name by which the model can be opened again from any folder."""
    preference_file: Path | None = None
    """The file that the last preference pair went to."""

    @property
    def has_adapter(self) -> bool:
        """True if the model has an adapter that can be disabled."""
        return self.variants != ("model",)


def add_user_message(conversation: Conversation, text: str) -> str:
    """Add the user's message; return a note if old messages had to be dropped from the context for it.

    Raises RecipeError, and removes the message again, if it does not fit in the context by itself.
    """
    conversation.messages.append({"role": "user", "content": text})
    try:
        note = fit_to_context(conversation)
        if (prompt := _prompt_messages(conversation)) != conversation.last_prompt:
            conversation.last_prompt, conversation.replies = prompt, []
        return note
    except BaseException:
        conversation.messages.pop()
        raise


def fit_to_context(conversation: Conversation) -> str:
    """Drop the oldest messages until the rest and a reply fit in the context; return a note about it, or ""."""
    context = context_tokens(conversation.model)
    if context is None or context - conversation.settings.max_new_tokens >= _prompt_tokens(conversation):
        return ""
    max_prompt_tokens = context - conversation.settings.max_new_tokens
    before = conversation.num_dropped
    # A quarter is freed at once, since the whole history is computed anew each time that messages are dropped
    while (
        _prompt_tokens(conversation) > max_prompt_tokens * 3 // 4
        and conversation.num_dropped < len(conversation.messages) - 1
    ):
        conversation.num_dropped += 2
    if (tokens := _prompt_tokens(conversation)) > max_prompt_tokens:
        conversation.num_dropped = before
        raise RecipeError(
            f"this message makes {tokens} tokens and a reply may take {conversation.settings.max_new_tokens}, but the "
            f"model reads {context} at most; shorten the message, or set max_new_tokens lower"
        )
    return f"the model reads {context} tokens at most: it no longer sees the first {conversation.num_dropped} messages"


def stream_reply(conversation: Conversation, variant: ModelVariant, seed: int) -> Generator[str, None, bool]:
    """Yield the reply of `variant` in chunks free of terminal escapes; return True if the model ended it itself.

    The first variant's reply is kept in the history even if the generator is closed early; a message whose reply was
    stopped before its first character is removed.
    """
    escape_filter, chunks, ended = EscapeFilter(), list[str](), False
    kv_cache = conversation.kv_caches.setdefault(variant, KVCache())
    settings = SamplingParams(**{**vars(conversation.settings), "seed": seed})
    conversation.usage = TokenUsage()
    try:
        model, tokenizer = conversation.model, conversation.tokenizer
        ids = tokenize_prompt(tokenizer, _prompt_messages(conversation))
        with use_variant(model, conversation.device, variant):
            get_decoder = partial(variant_decoder, conversation.decoders, model, variant)
            stream = generate_stream(model, tokenizer, ids, settings, kv_cache, conversation.usage, get_decoder)
            while True:
                try:
                    chunk = escape_filter.feed(next(stream))
                except StopIteration as end:
                    ended = bool(end.value)
                    break
                if chunk:
                    chunks.append(chunk)
                    yield chunk
        if rest := escape_filter.flush():
            chunks.append(rest)
            yield rest
        return ended
    finally:
        _record_reply(conversation, Reply(variant, "".join(chunks), ended))


@contextmanager
def use_variant(model: Any, device: Device, variant: ModelVariant) -> Iterator[None]:
    """Run `model` as the variant inside the device's autocast: the base is the model with its adapter disabled."""
    with device.autocast(), adapter_disabled(model) if variant == "base" else nullcontext():
        yield


def variant_decoder(decoders: Decoders, model: Any, variant: ModelVariant) -> FusedDecoder | None:
    """The decoder of a variant, built in the first call; call it inside `use_variant`."""
    if variant not in decoders:
        decoders[variant] = fused_decoder(model)
    return decoders[variant]


def next_seed(conversation: Conversation) -> int:
    """The seed of the next reply; variants that reply to the same message share it."""
    conversation.draws += 1
    return (conversation.settings.seed + conversation.draws - 1) % 2**63


def undo_last_turn(conversation: Conversation) -> str | None:
    """Remove the last message and its reply; return the message, or None if the history is empty."""
    if not conversation.messages:
        return None
    question = conversation.messages[-2]["content"]
    del conversation.messages[-2:]
    conversation.num_dropped = 0
    return question


def clear_history(conversation: Conversation) -> None:
    """Empty the history; system prompt, settings and variants stay."""
    conversation.messages.clear()
    conversation.num_dropped = 0


def transcript(conversation: Conversation) -> list[Message]:
    """All messages, including those dropped from the context, with the system prompt first."""
    return [*_system(conversation), *conversation.messages]


def latest_replies(conversation: Conversation) -> list[Reply]:
    """The replies to the last message; empty if anything before them has changed."""
    messages = conversation.messages
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return conversation.replies if answered and _prompt_messages(conversation) == conversation.last_prompt else []


def _record_reply(conversation: Conversation, reply: Reply) -> None:
    """Add the reply to those of the last prompt and, if it is the first one, to the history."""
    if reply.text or reply.ended:
        conversation.replies.append(reply)
    if conversation.messages[-1]["role"] == "assistant":
        return
    if reply.text or reply.ended:
        conversation.messages.append({"role": "assistant", "content": reply.text})
    else:
        conversation.messages.pop()


def _prompt_messages(conversation: Conversation) -> list[Message]:
    """The messages that the model reads: up to the user's last one, without those that were dropped."""
    messages = conversation.messages
    end = len(messages) - (messages[-1]["role"] == "assistant")
    return [*_system(conversation), *messages[conversation.num_dropped : end]]


def _system(conversation: Conversation) -> list[Message]:
    return [{"role": "system", "content": conversation.system}] if conversation.system else []


def _prompt_tokens(conversation: Conversation) -> int:
    return len(tokenize_prompt(conversation.tokenizer, _prompt_messages(conversation)))
