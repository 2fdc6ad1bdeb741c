"""Why a run stops between two steps or within one: it was asked to, its time is over, or another process has ended."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qlora_dpo.errors import ProcessEndedError
from qlora_dpo.model.distributed import processes

ASKED, OVER, ENDED = (
    " as asked",
    ", since the next step would end after --max-hours",
    ", since another process of this run has ended",
)
"""Why a run stops between two steps."""


@dataclass
class Stop:
    """Whether the run was asked to stop."""

    asked: bool = False


@contextmanager
def stop_when_asked(say: Callable[[str], None]) -> Iterator[Stop]:
    """The first SIGINT or SIGTERM asks for a checkpoint after the micro-batch, or after the step if that is its last;
    the second stops at once.
    """
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        stop.asked = True
        for each, handler in before.items():
            signal.signal(each, handler)
        say("stopping and saving a checkpoint; once more stops at once")

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # by now the end is certain, and no news
                signal.signal(number, handler)


def why_stop(asked: bool, over: bool) -> str:
    """Why all processes stop after this step, in words; empty if none was asked to and none has run out of time."""
    try:
        asked, over = processes.any_of(asked), processes.any_of(over)
    except ProcessEndedError:
        return ENDED
    return ASKED if asked else OVER if over else ""
