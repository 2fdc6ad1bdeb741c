"""A conversation with a model: what was said, who answers next, and how the history is kept inside the context."""

from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora_dpo.data.dialogue import Message
from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.talk.generate import KVCache, TokenUsage, context_tokens, generate_stream, tokenize_prompt
from qlora_dpo.talk.sampling import SamplingParams
from qlora_dpo.talk.terminal import EscapeFilter

ModelVariant = Literal["tuned", "base", "model"]


@dataclass(frozen=True)
class Reply:
    """An answer as it was shown; `ended` is False if it was stopped or cut off."""

    voice: ModelVariant
    text: str
    ended: bool


@dataclass
class Conversation:
    """All that a chat needs between two lines; `voices` answer each message, and the first one's reply is kept."""

    title: str
    model: Any
    tokenizer: Any
    device: Device
    settings: SamplingParams
    variants: tuple[ModelVariant, ...]
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    num_dropped: int = 0
    """How many of the oldest messages the model no longer reads."""
    draws: int = 0
    """Replies begun so far; each is sampled with a seed of its own, so that a retry says something else."""
    kv_caches: dict[ModelVariant, KVCache] = field(default_factory=dict)
    last_prompt: list[Message] = field(default_factory=list)
    """What the model read when it was asked last, up to the question."""
    replies: list[Reply] = field(default_factory=list)
    """All answers to that, in the order in which they were shown: of both voices, and of retries."""
    tally: TokenUsage = field(default_factory=TokenUsage)
    """Of the last reply."""
    beta: float | None = None
    """What the adapter was trained with; None if that is not known."""
    target: str = ""
    """The model as it can be opened again from anywhere."""
    preference_file: Path | None = None
    """The file that the last preference pair went to."""

    @property
    def has_adapter(self) -> bool:
        """True if there is an adapter that can be switched off."""
        return self.variants != ("model",)


def add_user_message(conversation: Conversation, text: str) -> str:
    """Add the user's message and return a note if old messages had to be left out for it.

    Raises RecipeError, and takes the message back, if it does not fit the model's context by itself.
    """
    conversation.messages.append({"role": "user", "content": text})
    try:
        note = fit_to_context(conversation)
        if (read := _read(conversation)) != conversation.last_prompt:
            conversation.last_prompt, conversation.replies = read, []
        return note
    except BaseException:
        conversation.messages.pop()
        raise


def fit_to_context(conversation: Conversation) -> str:
    """Leave out the oldest messages until the rest and a reply fit the context; return a note about it, or ""."""
    context = context_tokens(conversation.model)
    if context is None or context - conversation.settings.max_new_tokens >= _tokens(conversation):
        return ""
    room = context - conversation.settings.max_new_tokens
    before = conversation.num_dropped
    # A quarter of the room is freed at once: each time something is left out, the whole history is read again
    while _tokens(conversation) > room * 3 // 4 and conversation.num_dropped < len(conversation.messages) - 1:
        conversation.num_dropped += 2
    if (tokens := _tokens(conversation)) > room:
        conversation.num_dropped = before
        raise RecipeError(
            f"this message makes {tokens} tokens and a reply may take {conversation.settings.max_new_tokens}, but the "
            f"model reads {context} at most; shorten the message, or set max_new_tokens lower"
        )
    return f"the model reads {context} tokens at most: it no longer sees the first {conversation.num_dropped} messages"


def stream_reply(conversation: Conversation, voice: ModelVariant, seed: int) -> Generator[str, None, bool]:
    """Yield the answer of `voice` to the last question, free of terminal escapes; return True if it came to its end.

    The first voice's answer is kept in the history, also when the generator is closed early; a question whose
    answer was stopped before its first word is taken back.
    """
    clean, said, ended = EscapeFilter(), list[str](), False
    memory = conversation.kv_caches.setdefault(voice, KVCache())
    settings = SamplingParams(**{**vars(conversation.settings), "seed": seed})
    conversation.tally = TokenUsage()
    try:
        ids = tokenize_prompt(conversation.tokenizer, _read(conversation))
        with ExitStack() as around:
            around.enter_context(conversation.device.autocast())
            if voice == "base":
                around.enter_context(adapter_disabled(conversation.model))
            pieces = generate_stream(
                conversation.model, conversation.tokenizer, ids, settings, memory, conversation.tally
            )
            while True:
                try:
                    piece = clean.feed(next(pieces))
                except StopIteration as end:
                    ended = bool(end.value)
                    break
                if piece:
                    said.append(piece)
                    yield piece
        if rest := clean.rest():
            said.append(rest)
            yield rest
        return ended
    finally:
        _keep(conversation, Reply(voice, "".join(said), ended))


def next_seed(conversation: Conversation) -> int:
    """The seed of the next reply; voices that answer the same question share it."""
    conversation.draws += 1
    return (conversation.settings.seed + conversation.draws - 1) % 2**63


def undo_last_turn(conversation: Conversation) -> str | None:
    """Take back the last question and its answer; return the question, or None if nothing was said."""
    if not conversation.messages:
        return None
    question = conversation.messages[-2]["content"]
    del conversation.messages[-2:]
    conversation.num_dropped = 0
    return question


def clear_history(conversation: Conversation) -> None:
    """Forget what was said; system prompt, settings and voices stay."""
    conversation.messages.clear()
    conversation.num_dropped = 0


def transcript(conversation: Conversation) -> list[Message]:
    """The whole conversation, also what the model no longer reads, with the system prompt first."""
    return [*_system(conversation), *conversation.messages]


def latest_replies(conversation: Conversation) -> list[Reply]:
    """The answers to the last question, as long as nothing before them has changed."""
    messages = conversation.messages
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return conversation.replies if answered and _read(conversation) == conversation.last_prompt else []


def _keep(conversation: Conversation, said: Reply) -> None:
    if said.text or said.ended:
        conversation.replies.append(said)
    if conversation.messages[-1]["role"] == "assistant":
        return
    if said.text or said.ended:
        conversation.messages.append({"role": "assistant", "content": said.text})
    else:
        conversation.messages.pop()


def _read(conversation: Conversation) -> list[Message]:
    """What the model reads: up to the last question, without what was left out."""
    messages = conversation.messages
    upto = len(messages) - (messages[-1]["role"] == "assistant")
    return [*_system(conversation), *messages[conversation.num_dropped : upto]]


def _system(conversation: Conversation) -> list[Message]:
    return [{"role": "system", "content": conversation.system}] if conversation.system else []


def _tokens(conversation: Conversation) -> int:
    return len(tokenize_prompt(conversation.tokenizer, _read(conversation)))
