"""The terminal while a reply is written: text made harmless, keys not echoed into it, Ctrl+C stops only the reply."""

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

# An escape sequence that has begun and not ended: a string such as a window title, a control sequence, or a lone ESC
UNFINISHED = re.compile(
    r"(?:(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*\x1b?"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*"
    r"|\x1b[ -/]*)\Z"
)
LONGEST_HELD = 1024  # characters; a model that opens a string and never closes it must not silence itself


@dataclass
class EscapeFilter:
    """Strips terminal escapes from text that arrives in pieces, also where a sequence is split between two."""

    held: str = ""

    def feed(self, piece: str) -> str:
        """Return what of the text so far can be shown and has not been."""
        text = self.held + piece
        begun = UNFINISHED.search(text)
        cut = begun.start() if begun and len(text) - begun.start() <= LONGEST_HELD else len(text)
        self.held = text[cut:]
        return sanitize_text(text[:cut])

    def rest(self) -> str:
        """Return what was held back, for the text has ended."""
        text, self.held = self.held, ""
        return sanitize_text(text)


@contextmanager
def catch_ctrl_c() -> Iterator[threading.Event]:
    """While open, the first Ctrl+C sets the event that is yielded, and a second one raises KeyboardInterrupt."""
    stopped = threading.Event()

    def note(signal_number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def no_echo() -> Iterator[None]:
    """While open, keys typed at a terminal wait for the next line instead of showing up inside the reply."""
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
