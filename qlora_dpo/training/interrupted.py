"""What a run that is stopped outside of its steps leaves behind, and how to go on from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_dpo.errors import Interrupted, RunError
from qlora_dpo.files import cache_home
from qlora_dpo.training.checkpoint.save import newest_valid


@contextmanager
def explain_interrupt(folder: Path) -> Iterator[None]:
    """Turn Ctrl+C and SIGTERM into Interrupted with a sentence about the run in `folder`.

    Between the first step and the last the loop itself sees to them, and saves a checkpoint.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(_interrupt_message(folder)) from stop


def _interrupt_message(folder: Path) -> str:
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
