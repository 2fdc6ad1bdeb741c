"""One loaded model that answers many: a bounded line of questions, a few replies at once, each a token at a time."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from qlora_dpo.data.dialogue import Message
from qlora_dpo.errors import ModelError, QloraDpoError, RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.talk.conversation import ModelVariant
from qlora_dpo.talk.generate import KVCache, TokenUsage, context_tokens, generate_stream, tokenize_prompt
from qlora_dpo.talk.sampling import SamplingParams
from qlora_dpo.talk.stop_strings import StopStringFilter
from qlora_dpo.talk.terminal import EscapeFilter

MAX_QUEUED = 64
"""Questions in the line; one more is told to come again later."""
MAX_CONCURRENT = 4
"""Replies that take turns, token by token: a short one need not wait for the end of a long one."""
MAX_KV_CACHES = 8
"""Conversations whose key-value caches are kept, so that their next question costs its new part only."""
REQUEST_TIMEOUT_SECONDS = 600.0
"""From the moment a question enters the line; a reply that takes longer is cut off, a question is given back."""


@dataclass(frozen=True)
class TextChunk:
    """New text of a reply."""

    text: str


@dataclass(frozen=True)
class ReplyFinished:
    """The reply is whole: `reason` is "stop" or "length", as OpenAI calls them."""

    reason: str
    tally: TokenUsage


@dataclass(frozen=True)
class ReplyFailed:
    """There will be no more of the reply; `status` is HTTP's: 400 for what was asked, 500 and up for us."""

    status: int
    message: str
    code: str


Event = TextChunk | ReplyFinished | ReplyFailed


@dataclass
class GenerationRequest:
    """A question on its way through the line; `tell` is called from the model's thread."""

    voice: ModelVariant
    messages: Sequence[Message]
    settings: SamplingParams
    clip_to_context: bool
    """True if the reply may be as long as there is room for, up to settings.max_new_tokens."""
    stops: Sequence[str]
    emit: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the reply any more."""
    since: float = field(default_factory=time.monotonic)


class RequestQueue:
    """Questions that wait, first come first served, up to a number of them."""

    def __init__(self, most: int = MAX_QUEUED) -> None:
        self.max_size = most
        self.closed = False
        self._questions: deque[GenerationRequest] = deque()
        self._change = threading.Condition()

    def try_put(self, question: GenerationRequest) -> bool:
        """Join the line; False if it is full or closed. Those whose client has gone make room."""
        with self._change:
            self._questions = deque(each for each in self._questions if not each.cancelled.is_set())
            if self.closed or len(self._questions) >= self.max_size:
                return False
            self._questions.append(question)
            self._change.notify()
            return True

    def get(self, seconds: float) -> GenerationRequest | None:
        """The first question that somebody still waits for; None if none comes within `seconds`."""
        with self._change:
            if not self._questions:
                self._change.wait(seconds)
            while self._questions:
                question = self._questions.popleft()
                if not question.cancelled.is_set():
                    return question
            return None

    def close(self) -> list[GenerationRequest]:
        """Let nobody in any more, and return those who waited."""
        with self._change:
            self.closed = True
            left, self._questions = list(self._questions), deque()
            return left

    def __len__(self) -> int:
        """How many wait."""
        return len(self._questions)


@dataclass
class _Reply:
    question: GenerationRequest
    pieces: Generator[str, None, bool]
    tally: TokenUsage
    memory: KVCache
    clean: EscapeFilter = field(default_factory=EscapeFilter)
    stops: StopStringFilter = field(default_factory=StopStringFilter)


@dataclass
class Engine:
    """The model and those who talk to it. `work` runs in the thread that calls it; all else is safe from any thread."""

    model: Any
    tokenizer: Any
    device: Device
    queue: RequestQueue = field(default_factory=RequestQueue)
    max_concurrent: int = MAX_CONCURRENT
    most_seconds: float = REQUEST_TIMEOUT_SECONDS
    log_error: Callable[[str], None] = lambda sentence: None
    """Told of failures that are ours and not the client's."""
    _memories: list[tuple[ModelVariant, KVCache]] = field(default_factory=list)

    def work(self, stopping: threading.Event) -> None:
        """Answer questions until `stopping` is set; then tell those who wait that there will be no answer."""
        active: list[_Reply] = []
        try:
            while not stopping.is_set():
                self._admit(active)
                # The adapter is switched once for all replies of a voice
                for reply in sorted(active, key=lambda each: each.question.voice):
                    if not self._advance(reply):
                        active.remove(reply)
        finally:
            over = ReplyFailed(503, "the server is shutting down", "shutting_down")
            for question in (*(each.question for each in active), *self.queue.close()):
                question.emit(over)

    def _admit(self, active: list[_Reply]) -> None:
        while len(active) < self.max_concurrent:
            question = self.queue.get(0 if active else 0.2)
            if question is None:
                return
            if (reply := self._start_reply(question)) is not None:
                active.append(reply)

    def _start_reply(self, question: GenerationRequest) -> _Reply | None:
        """The reply to `question`, about to begin; None if there can be none, which is told."""
        try:
            if time.monotonic() - question.since > self.most_seconds:
                question.emit(ReplyFailed(503, "the server was too busy to begin in time; ask again", "too_busy"))
                return None
            ids = tokenize_prompt(self.tokenizer, question.messages)
            settings = settings_within_context(question, len(ids), context_tokens(self.model))
            memory, tally = self._take_kv_cache(question.voice, ids), TokenUsage(prompt_tokens=len(ids))
            pieces = generate_stream(self.model, self.tokenizer, ids, settings, memory, tally)
            return _Reply(question, pieces, tally, memory, stops=StopStringFilter(question.stops))
        except Exception as error:  # whatever it is, the others are still answered
            question.emit(self._failure_for(error, begun=False))
            return None

    def _advance(self, reply: _Reply) -> bool:
        """One token more; False if that was the end of the reply."""
        question = reply.question
        try:
            if question.cancelled.is_set():
                return self._store_kv_cache(reply)
            late = time.monotonic() - question.since > self.most_seconds
            with ExitStack() as around:
                around.enter_context(self.device.autocast())
                if question.voice == "base":
                    around.enter_context(adapter_disabled(self.model))
                piece = "" if late else reply.stops.feed(reply.clean.feed(next(reply.pieces)))
            if piece:
                question.emit(TextChunk(piece))
            if not (late or reply.stops.found):
                return True
            reason = "stop" if reply.stops.found else "length"
        except StopIteration as end:
            reason = "stop" if end.value else "length"
        except Exception as error:
            self._memories.clear()  # memory may be what was missing
            question.emit(self._failure_for(error, begun=True))
            return False
        rest = reply.stops.feed(reply.clean.rest()) + reply.stops.flush()
        if rest:
            question.emit(TextChunk(rest))
        question.emit(ReplyFinished("stop" if reply.stops.found else reason, reply.tally))
        return self._store_kv_cache(reply)

    def _take_kv_cache(self, voice: ModelVariant, ids: Sequence[int]) -> KVCache:
        """Take the memory that holds most of `ids` out of those kept; a new one if none holds anything."""

        def shared(memory: KVCache) -> int:
            pairs = zip(memory.ids, ids, strict=False)
            return next(
                (place for place, (one, other) in enumerate(pairs) if one != other), min(len(memory.ids), len(ids))
            )

        own = [entry for entry in self._memories if entry[0] == voice and shared(entry[1])]
        if not own:
            return KVCache()
        best = max(own, key=lambda entry: shared(entry[1]))
        self._memories = [entry for entry in self._memories if entry is not best]
        return best[1]

    def _store_kv_cache(self, reply: _Reply) -> bool:
        """Keep the memory of a reply that is over, and of the older ones as many as REMEMBERED and one context hold."""
        reply.pieces.close()
        self._memories.insert(0, (reply.question.voice, reply.memory))
        most, held, kept = context_tokens(self.model) or 2**13, 0, list[tuple[ModelVariant, KVCache]]()
        for entry in self._memories[:MAX_KV_CACHES]:
            held += len(entry[1].ids)
            if held <= most:
                kept.append(entry)
        self._memories = kept
        return False

    def _failure_for(self, error: Exception, begun: bool) -> ReplyFailed:
        match error:
            case RecipeError():
                return ReplyFailed(400, str(error), "invalid_request")
            case ModelError() if not begun:
                return ReplyFailed(400, str(error), "refused_by_template")
            case QloraDpoError():
                self.log_error(f"a reply failed: {error}")
                return ReplyFailed(500, str(error), "failed")
            case _:
                self.log_error(f"a reply failed: {type(error).__name__}: {error}")
                return ReplyFailed(500, "the reply failed; the server's terminal says why", "failed")


def settings_within_context(question: GenerationRequest, prompt: int, context: int | None) -> SamplingParams:
    """The settings of a reply to `prompt` tokens; raise RecipeError if prompt and reply do not fit the context."""
    wanted = question.settings.max_new_tokens
    if context is None or prompt + wanted <= context:
        return question.settings
    if question.clip_to_context and prompt < context:
        return SamplingParams(**{**vars(question.settings), "max_new_tokens": context - prompt})
    reply = "" if question.clip_to_context else f" and a reply may take {wanted}"
    raise RecipeError(f"the messages make {prompt} tokens{reply}, but the model reads {context} at most; send less")
