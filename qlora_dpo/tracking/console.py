"""Writes what the package logs to stderr: the message alone, above the progress bars while they are drawn."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PACKAGE_LOGGER = logging.getLogger("qlora_dpo")


class LineDisplay(Protocol):
    """A display that redraws part of the terminal, so that lines have to be printed through it."""

    def print_line(self, text: str) -> None:
        """Print one line above what is redrawn."""


class ConsoleHandler(logging.Handler):
    """Writes messages without level, logger name and time; secrets and terminal control characters are removed."""

    def __init__(self) -> None:
        super().__init__()
        self.displays: list[LineDisplay] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message of `record` through the display opened last, or directly to stderr if none is open."""
        try:
            text = record.getMessage()
            if self.displays:
                self.displays[-1].print_line(text)
            else:
                print_line(text)
        except Exception:  # as every handler of the standard library does: logging never ends a run
            self.handleError(record)


_HANDLER = ConsoleHandler()


def install_handler() -> None:
    """Show messages of the package from level INFO on. Calling it again changes nothing.

    Messages still propagate to the root logger, where a program that uses this package may collect them.
    """
    if _HANDLER not in PACKAGE_LOGGER.handlers:
        PACKAGE_LOGGER.addHandler(_HANDLER)
        PACKAGE_LOGGER.setLevel(logging.INFO)


def silence() -> None:
    """Write nothing from now on, not even errors: for ranks above 0, which would repeat what rank 0 writes."""
    PACKAGE_LOGGER.setLevel(logging.CRITICAL + 1)


@contextmanager
def console_logging(*, silent: bool = False) -> Iterator[None]:
    """Inside the block messages are shown, or with `silent` not written at all; then logging is as it was before."""
    level, was_installed = PACKAGE_LOGGER.level, _HANDLER in PACKAGE_LOGGER.handlers
    if silent:
        silence()
    else:
        install_handler()
    try:
        yield
    finally:
        PACKAGE_LOGGER.setLevel(level)
        if not was_installed:
            PACKAGE_LOGGER.removeHandler(_HANDLER)


def open_display(display: LineDisplay) -> None:
    """Print messages through `display` until `close_display`."""
    _HANDLER.displays.append(display)


def close_display(display: LineDisplay) -> None:
    """Print messages as before `display` was opened; does nothing if it is not open."""
    if display in _HANDLER.displays:
        _HANDLER.displays.remove(display)


def printable(text: str) -> str:
    """`text` without secrets and without anything that could control the terminal."""
    # imported here, since the command line installs the handler before it knows whether anything is logged
    from qlora_dpo.data.dialogue import sanitize_text
    from qlora_dpo.redact import redact_secrets

    return sanitize_text(redact_secrets(text))


def print_line(text: str) -> None:
    """Write `text` as one line to stderr, without secrets and control characters."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()
