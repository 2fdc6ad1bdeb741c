"""The terminal while a reply is written: escapes are stripped, keys are not echoed, Ctrl+C stops only the reply."""

import re
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from qlora_dpo.data.dialogue import sanitize_text

# An escape sequence without its end: a string such as a window title, a control sequence, or a lone ESC
UNFINISHED = re.compile(
    r"(?:(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*\x1b?"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*"
    r"|\x1b[ -/]*)\Z"
)
LONGEST_HELD = 1024  # characters; otherwise a string that the model never closes would hide the rest of its reply


@dataclass
class EscapeFilter:
    """Strips terminal escapes from text that arrives in chunks, including sequences that are split over two."""

    held: str = ""

    def feed(self, chunk: str) -> str:
        """Return the new text that can be shown by now."""
        text = self.held + chunk
        unfinished = UNFINISHED.search(text)
        cut = unfinished.start() if unfinished and len(text) - unfinished.start() <= LONGEST_HELD else len(text)
        self.held = text[cut:]
        return sanitize_text(text[:cut])

    def flush(self) -> str:
        """Return the text held back so far, at the end of the reply."""
        text, self.held = self.held, ""
        return sanitize_text(text)


@contextmanager
def catch_ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl+C sets; a second Ctrl+C raises KeyboardInterrupt."""
    stopped = threading.Event()

    def on_interrupt(signal_number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def no_echo() -> Iterator[None]:
    """Keep keys that are typed meanwhile for the next line, instead of echoing them into the reply."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
