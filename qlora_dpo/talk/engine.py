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
from qlora_dpo.model.lora import adapter_off
from qlora_dpo.talk.conversation import Voice
from qlora_dpo.talk.generate import Memory, Tally, context_tokens, prompt_ids, stream
from qlora_dpo.talk.sampling import Settings
from qlora_dpo.talk.stop_strings import Stops
from qlora_dpo.talk.terminal import Printable

WAITING = 64
"""Questions in the line; one more is told to come again later."""
TOGETHER = 4
"""Replies that take turns, token by token: a short one need not wait for the end of a long one."""
REMEMBERED = 8
"""Conversations whose key-value caches are kept, so that their next question costs its new part only."""
MOST_SECONDS = 600.0
"""From the moment a question enters the line; a reply that takes longer is cut off, a question is given back."""


@dataclass(frozen=True)
class Piece:
    """New text of a reply."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The reply is whole: `reason` is "stop" or "length", as OpenAI calls them."""

    reason: str
    tally: Tally


@dataclass(frozen=True)
class Failed:
    """There will be no more of the reply; `status` is HTTP's: 400 for what was asked, 500 and up for us."""

    status: int
    message: str
    code: str


Event = Piece | Ended | Failed


@dataclass
class Question:
    """A question on its way through the line; `tell` is called from the model's thread."""

    voice: Voice
    messages: Sequence[Message]
    settings: Settings
    room: bool
    """True if the reply may be as long as there is room for, up to settings.max_new_tokens."""
    stops: Sequence[str]
    tell: Callable[[Event], None]
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the reply any more."""
    since: float = field(default_factory=time.monotonic)


class Line:
    """Questions that wait, first come first served, up to a number of them."""

    def __init__(self, most: int = WAITING) -> None:
        self.most = most
        self.closed = False
        self._questions: deque[Question] = deque()
        self._change = threading.Condition()

    def enter(self, question: Question) -> bool:
        """Join the line; False if it is full or closed. Those whose client has gone make room."""
        with self._change:
            self._questions = deque(each for each in self._questions if not each.gone.is_set())
            if self.closed or len(self._questions) >= self.most:
                return False
            self._questions.append(question)
            self._change.notify()
            return True

    def next(self, seconds: float) -> Question | None:
        """The first question that somebody still waits for; None if none comes within `seconds`."""
        with self._change:
            if not self._questions:
                self._change.wait(seconds)
            while self._questions:
                question = self._questions.popleft()
                if not question.gone.is_set():
                    return question
            return None

    def close(self) -> list[Question]:
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
    question: Question
    pieces: Generator[str, None, bool]
    tally: Tally
    memory: Memory
    clean: Printable = field(default_factory=Printable)
    stops: Stops = field(default_factory=Stops)


@dataclass
class Engine:
    """The model and those who talk to it. `work` runs in the thread that calls it; all else is safe from any thread."""

    model: Any
    tokenizer: Any
    device: Device
    line: Line = field(default_factory=Line)
    together: int = TOGETHER
    most_seconds: float = MOST_SECONDS
    complain: Callable[[str], None] = lambda sentence: None
    """Told of failures that are ours and not the client's."""
    _memories: list[tuple[Voice, Memory]] = field(default_factory=list)

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
            over = Failed(503, "the server is shutting down", "shutting_down")
            for question in (*(each.question for each in active), *self.line.close()):
                question.tell(over)

    def _admit(self, active: list[_Reply]) -> None:
        while len(active) < self.together:
            question = self.line.next(0 if active else 0.2)
            if question is None:
                return
            if (reply := self._begun(question)) is not None:
                active.append(reply)

    def _begun(self, question: Question) -> _Reply | None:
        """The reply to `question`, about to begin; None if there can be none, which is told."""
        try:
            if time.monotonic() - question.since > self.most_seconds:
                question.tell(Failed(503, "the server was too busy to begin in time; ask again", "too_busy"))
                return None
            ids = prompt_ids(self.tokenizer, question.messages)
            settings = fitted(question, len(ids), context_tokens(self.model))
            memory, tally = self._recalled(question.voice, ids), Tally(prompt=len(ids))
            pieces = stream(self.model, self.tokenizer, ids, settings, memory, tally)
            return _Reply(question, pieces, tally, memory, stops=Stops(question.stops))
        except Exception as error:  # whatever it is, the others are still answered
            question.tell(self._explained(error, begun=False))
            return None

    def _advance(self, reply: _Reply) -> bool:
        """One token more; False if that was the end of the reply."""
        question = reply.question
        try:
            if question.gone.is_set():
                return self._put_away(reply)
            late = time.monotonic() - question.since > self.most_seconds
            with ExitStack() as around:
                around.enter_context(self.device.autocast())
                if question.voice == "base":
                    around.enter_context(adapter_off(self.model))
                piece = "" if late else reply.stops.feed(reply.clean.feed(next(reply.pieces)))
            if piece:
                question.tell(Piece(piece))
            if not (late or reply.stops.found):
                return True
            reason = "stop" if reply.stops.found else "length"
        except StopIteration as end:
            reason = "stop" if end.value else "length"
        except Exception as error:
            self._memories.clear()  # memory may be what was missing
            question.tell(self._explained(error, begun=True))
            return False
        rest = reply.stops.feed(reply.clean.rest()) + reply.stops.rest()
        if rest:
            question.tell(Piece(rest))
        question.tell(Ended("stop" if reply.stops.found else reason, reply.tally))
        return self._put_away(reply)

    def _recalled(self, voice: Voice, ids: Sequence[int]) -> Memory:
        """Take the memory that holds most of `ids` out of those kept; a new one if none holds anything."""

        def shared(memory: Memory) -> int:
            pairs = zip(memory.ids, ids, strict=False)
            return next(
                (place for place, (one, other) in enumerate(pairs) if one != other), min(len(memory.ids), len(ids))
            )

        own = [entry for entry in self._memories if entry[0] == voice and shared(entry[1])]
        if not own:
            return Memory()
        best = max(own, key=lambda entry: shared(entry[1]))
        self._memories = [entry for entry in self._memories if entry is not best]
        return best[1]

    def _put_away(self, reply: _Reply) -> bool:
        """Keep the memory of a reply that is over, and of the older ones as many as REMEMBERED and one context hold."""
        reply.pieces.close()
        self._memories.insert(0, (reply.question.voice, reply.memory))
        most, held, kept = context_tokens(self.model) or 2**13, 0, list[tuple[Voice, Memory]]()
        for entry in self._memories[:REMEMBERED]:
            held += len(entry[1].ids)
            if held <= most:
                kept.append(entry)
        self._memories = kept
        return False

    def _explained(self, error: Exception, begun: bool) -> Failed:
        match error:
            case RecipeError():
                return Failed(400, str(error), "invalid_request")
            case ModelError() if not begun:
                return Failed(400, str(error), "refused_by_template")
            case QloraDpoError():
                self.complain(f"a reply failed: {error}")
                return Failed(500, str(error), "failed")
            case _:
                self.complain(f"a reply failed: {type(error).__name__}: {error}")
                return Failed(500, "the reply failed; the server's terminal says why", "failed")


def fitted(question: Question, prompt: int, context: int | None) -> Settings:
    """The settings of a reply to `prompt` tokens; raise RecipeError if prompt and reply do not fit the context."""
    wanted = question.settings.max_new_tokens
    if context is None or prompt + wanted <= context:
        return question.settings
    if question.room and prompt < context:
        return Settings(**{**vars(question.settings), "max_new_tokens": context - prompt})
    reply = "" if question.room else f" and a reply may take {wanted}"
    raise RecipeError(f"the messages make {prompt} tokens{reply}, but the model reads {context} at most; send less")
