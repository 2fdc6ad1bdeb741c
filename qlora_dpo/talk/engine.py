"""Serves one loaded model to many clients: a bounded queue and round-robin decoding, one token per reply at a time."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qlora_dpo.data.dialogue import Message, sanitize_text
from qlora_dpo.errors import ModelError, QloraDpoError, RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.talk.conversation import Decoders, ModelVariant, use_variant, variant_decoder
from qlora_dpo.talk.generate import KVCache, TokenUsage, context_tokens, generate_stream, tokenize_prompt
from qlora_dpo.talk.sampling import SamplingParams
from qlora_dpo.talk.stop_strings import StopStringFilter
from qlora_dpo.talk.terminal import EscapeFilter

MAX_QUEUED = 64
"""Requests that wait; the next one is refused with status 429."""
MAX_CONCURRENT = 4
"""Replies that take turns, token by token, so that a short one need not wait for the end of a long one."""
MAX_KV_CACHES = 8
"""Conversations whose key-value caches are kept, so that only the new part of their next request is computed."""
REQUEST_TIMEOUT_SECONDS = 600.0
"""Counted from the moment a request enters the queue. A reply that takes longer is cut off; a request that has not
been started is refused."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextChunk:
    """New text of a reply."""

    text: str


@dataclass(frozen=True)
class ReplyFinished:
    """The reply is complete; `reason` is OpenAI's finish_reason, "stop" or "length"."""

    reason: str
    usage: TokenUsage


@dataclass(frozen=True)
class ReplyFailed:
    """The reply ends here; `status` is HTTP's: 400 for a bad request, 500 and above for a failure of the server."""

    status: int
    message: str
    code: str


Event = TextChunk | ReplyFinished | ReplyFailed


@dataclass
class GenerationRequest:
    """A request to generate one reply. `emit` receives its events and is called from the model's thread."""

    variant: ModelVariant
    messages: Sequence[Message]
    sampling: SamplingParams
    clip_to_context: bool
    """True if the reply may be shorter than sampling.max_new_tokens where the context ends before."""
    stop_strings: Sequence[str]
    emit: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set once nobody waits for the reply any more."""
    queued_at: float = field(default_factory=time.monotonic)


class RequestQueue:
    """Waiting requests, first come first served, at most `max_size` of them."""

    def __init__(self, max_size: int = MAX_QUEUED) -> None:
        self.max_size = max_size
        self.closed = False
        self._requests: deque[GenerationRequest] = deque()
        self._change = threading.Condition()

    def try_put(self, request: GenerationRequest) -> bool:
        """Append the request; False if the queue is full or closed. Cancelled requests are dropped first."""
        with self._change:
            self._requests = deque(waiting for waiting in self._requests if not waiting.cancelled.is_set())
            if self.closed or len(self._requests) >= self.max_size:
                return False
            self._requests.append(request)
            self._change.notify()
            return True

    def get(self, seconds: float) -> GenerationRequest | None:
        """The first request that is not cancelled; None if none arrives within `seconds`."""
        with self._change:
            if not self._requests:
                self._change.wait(seconds)
            while self._requests:
                request = self._requests.popleft()
                if not request.cancelled.is_set():
                    return request
            return None

    def close(self) -> list[GenerationRequest]:
        """Accept no more requests, and return those that were waiting."""
        with self._change:
            self.closed = True
            waiting, self._requests = list(self._requests), deque()
            return waiting

    def __len__(self) -> int:
        """Number of waiting requests."""
        return len(self._requests)


@dataclass
class _Reply:
    """A reply that is being generated."""

    request: GenerationRequest
    chunks: Generator[str, None, bool]
    usage: TokenUsage
    kv_cache: KVCache
    stop_filter: StopStringFilter
    escape_filter: EscapeFilter = field(default_factory=EscapeFilter)


@dataclass
class Engine:
    """The model and its clients. `run` works in the calling thread; everything else is safe from any thread.

    Failures of the server itself, unlike bad requests, are logged as errors.
    """

    model: Any
    tokenizer: Any
    device: Device
    queue: RequestQueue = field(default_factory=RequestQueue)
    max_concurrent: int = MAX_CONCURRENT
    timeout_seconds: float = REQUEST_TIMEOUT_SECONDS
    _kv_caches: list[tuple[ModelVariant, KVCache]] = field(default_factory=list)
    _decoders: Decoders = field(default_factory=dict)

    def run(self, stopping: threading.Event) -> None:
        """Generate replies until `stopping` is set; requests that are unfinished then fail with status 503."""
        active: list[_Reply] = []
        try:
            while not stopping.is_set():
                self._admit(active)
                # Sorted, so that the adapter is switched once for all replies of a variant
                for reply in sorted(active, key=lambda reply: reply.request.variant):
                    if not self._advance(reply):
                        active.remove(reply)
        finally:
            failure = ReplyFailed(503, "the server is shutting down", "shutting_down")
            for request in (*(reply.request for reply in active), *self.queue.close()):
                request.emit(failure)

    def _admit(self, active: list[_Reply]) -> None:
        while len(active) < self.max_concurrent:
            request = self.queue.get(0 if active else 0.2)
            if request is None:
                return
            if (reply := self._start_reply(request)) is not None:
                active.append(reply)

    def _start_reply(self, request: GenerationRequest) -> _Reply | None:
        """The reply to `request`, without its first token; None if it fails, which is emitted."""
        try:
            if time.monotonic() - request.queued_at > self.timeout_seconds:
                request.emit(ReplyFailed(503, "the server was too busy to begin in time; ask again", "too_busy"))
                return None
            ids = tokenize_prompt(self.tokenizer, request.messages)
            sampling = sampling_within_context(request, len(ids), context_tokens(self.model))
            kv_cache, usage = self._take_kv_cache(request.variant, ids), TokenUsage(prompt_tokens=len(ids))
            get_decoder = partial(variant_decoder, self._decoders, self.model, request.variant)
            chunks = generate_stream(self.model, self.tokenizer, ids, sampling, kv_cache, usage, get_decoder)
            return _Reply(request, chunks, usage, kv_cache, StopStringFilter(request.stop_strings))
        except Exception as error:  # one client's failure does not stop the others' replies
            request.emit(self._failure_for(error, begun=False))
            return None

    def _advance(self, reply: _Reply) -> bool:
        """Generate one more token; False if the reply has ended."""
        request = reply.request
        try:
            if request.cancelled.is_set():
                return self._store_kv_cache(reply)
            late = time.monotonic() - request.queued_at > self.timeout_seconds
            with use_variant(self.model, self.device, request.variant):
                text = "" if late else reply.stop_filter.feed(reply.escape_filter.feed(next(reply.chunks)))
            if text:
                request.emit(TextChunk(text))
            if not (late or reply.stop_filter.found):
                return True
            reason = "stop" if reply.stop_filter.found else "length"
        except StopIteration as end:
            reason = "stop" if end.value else "length"
        except Exception as error:
            self._kv_caches.clear()  # in case memory ran out
            request.emit(self._failure_for(error, begun=True))
            return False
        rest = reply.stop_filter.feed(reply.escape_filter.flush()) + reply.stop_filter.flush()
        if rest:
            request.emit(TextChunk(rest))
        request.emit(ReplyFinished("stop" if reply.stop_filter.found else reason, reply.usage))
        return self._store_kv_cache(reply)

    def _take_kv_cache(self, variant: ModelVariant, ids: Sequence[int]) -> KVCache:
        """Take the stored cache that shares the longest prefix with `ids`; a new one if none shares any."""

        def shared_prefix(kv_cache: KVCache) -> int:
            pairs = zip(kv_cache.ids, ids, strict=False)
            return next(
                (index for index, (cached, new) in enumerate(pairs) if cached != new),
                min(len(kv_cache.ids), len(ids)),
            )

        candidates = [entry for entry in self._kv_caches if entry[0] == variant and shared_prefix(entry[1])]
        if not candidates:
            return KVCache()
        best = max(candidates, key=lambda entry: shared_prefix(entry[1]))
        self._kv_caches = [entry for entry in self._kv_caches if entry is not best]
        return best[1]

    def _store_kv_cache(self, reply: _Reply) -> bool:
        """Store the cache of a finished reply and drop old ones beyond MAX_KV_CACHES or one context of tokens.

        Returns False, since the reply has ended.
        """
        reply.chunks.close()
        self._kv_caches.insert(0, (reply.request.variant, reply.kv_cache))
        max_tokens, tokens, kept = context_tokens(self.model) or 2**13, 0, list[tuple[ModelVariant, KVCache]]()
        for entry in self._kv_caches[:MAX_KV_CACHES]:
            tokens += len(entry[1].ids)
            if tokens <= max_tokens:
                kept.append(entry)
        self._kv_caches = kept
        return False

    def _failure_for(self, error: Exception, begun: bool) -> ReplyFailed:
        match error:
            case RecipeError():
                return ReplyFailed(400, str(error), "invalid_request")
            case ModelError() if not begun:
                return ReplyFailed(400, str(error), "refused_by_template")
            case QloraDpoError():
                logger.error(sanitize_text(f"a reply failed: {error}"))
                return ReplyFailed(500, str(error), "failed")
            case _:
                logger.error(sanitize_text(f"a reply failed: {type(error).__name__}: {error}"))
                return ReplyFailed(500, "the reply failed; the server's terminal says why", "failed")


def sampling_within_context(request: GenerationRequest, prompt_tokens: int, context: int | None) -> SamplingParams:
    """The request's sampling parameters, with max_new_tokens cut to the context where the request allows that.

    Raises RecipeError if prompt and reply do not fit in `context` tokens.
    """
    max_new_tokens = request.sampling.max_new_tokens
    if context is None or prompt_tokens + max_new_tokens <= context:
        return request.sampling
    if request.clip_to_context and prompt_tokens < context:
        return SamplingParams(**{**vars(request.sampling), "max_new_tokens": context - prompt_tokens})
    reply = "" if request.clip_to_context else f" and a reply may take {max_new_tokens}"
    raise RecipeError(
        f"the messages make {prompt_tokens} tokens{reply}, but the model reads {context} at most; send less"
    )
