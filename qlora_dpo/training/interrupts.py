"""Why a run stops between two steps or within one: it was asked to, its time is over, or another process has ended."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qlora_dpo.errors import ProcessEndedError
from qlora_dpo.model.distributed import processes

STOP_REQUESTED, TIME_OVER, PROCESS_ENDED = (
    " as asked",
    ", since the next step would end after --max-hours",
    ", since another process of this run has ended",
)
"""Why a run stops between two steps."""


@dataclass
class StopRequest:
    """Whether the run was asked to stop."""

    is_requested: bool = False


@contextmanager
def catch_stop_signals(log: Callable[[str], None]) -> Iterator[StopRequest]:
    """The first SIGINT or SIGTERM asks for a checkpoint after the micro-batch, or after the step if that is its last;
    the second stops at once.
    """
    stop = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request_stop(number: int, frame: Any) -> None:
        stop.is_requested = True
        for each, handler in before.items():
            signal.signal(each, handler)
        log("stopping and saving a checkpoint; once more stops at once")

    for number in before:
        signal.signal(number, request_stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # by now the end is certain, and no news
                signal.signal(number, handler)


def stop_reason(stop_requested: bool, time_over: bool) -> str:
    """Why all processes stop after this step, in words; empty if none was asked to and none has run out of time."""
    try:
        stop_requested, time_over = processes.all_reduce_any(stop_requested), processes.all_reduce_any(time_over)
    except ProcessEndedError:
        return PROCESS_ENDED
    return STOP_REQUESTED if stop_requested else TIME_OVER if time_over else ""
