"""Why a run stops before its last step, and what it leaves behind: signals, the deadline, a rank that has ended."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from qlora_dpo.errors import Interrupted, ProcessEndedError, RunError
from qlora_dpo.files import cache_home
from qlora_dpo.model.distributed import processes
from qlora_dpo.training.checkpoint.save import newest_valid

logger = logging.getLogger(__name__)


class StopReason(Enum):
    """Why a run stops after a step, as the end of a sentence that begins with "stopped after step 3"."""

    REQUESTED = " as asked"
    DEADLINE = ", since the next step would end after --max-hours"
    PROCESS_ENDED = ", since another process of this run has ended"


@dataclass
class StopRequest:
    """Whether a signal has asked the run to stop."""

    is_requested: bool = False


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """The first SIGINT or SIGTERM requests a stop with a checkpoint, the second one stops at once.

    The run stops after the current micro-batch, or after the step if that is its last.
    """
    stop = StopRequest()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        stop.is_requested = True
        for handled, handler in handlers.items():
            signal.signal(handled, handler)
        logger.info("stopping and saving a checkpoint; once more stops at once")

    for number in handlers:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # set where the end is certain, and a signal is no news
                signal.signal(number, handler)


def stop_reason(requested: bool, past_deadline: bool) -> StopReason | None:
    """Why all ranks stop after this step; None if no rank has to. A collective."""
    try:
        requested, past_deadline = processes.all_reduce_any(requested), processes.all_reduce_any(past_deadline)
    except ProcessEndedError:
        return StopReason.PROCESS_ENDED
    if requested:
        return StopReason.REQUESTED
    return StopReason.DEADLINE if past_deadline else None


@contextmanager
def explain_interrupt(folder: Path) -> Iterator[None]:
    """Turn Ctrl+C and SIGTERM into Interrupted with a sentence about the run in `folder`.

    Between the first step and the last, the loop itself handles them and saves a checkpoint.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(_what_is_left(folder)) from stop


def _what_is_left(folder: Path) -> str:
    try:
        newest, _ = newest_valid(folder)
        return f"{folder}: stopped; {newest} is saved, --resume goes on from there"
    except RunError:
        pass
    if (folder / "run.json").is_file():
        return f"{folder}: stopped after the last step; the adapter is saved, the report is not"
    return (
        "stopped before the first checkpoint; what was read and what the reference answered is kept in "
        f"{cache_home()}, and the same command goes on from there"
    )
