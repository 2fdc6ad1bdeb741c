"""Lets a command end its work although nobody reads its output any more, as in `qlora-dpo runs | head -1`."""

import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


class _LastingPipe(io.FileIO):
    """A pipe that swallows what is written after its reader has closed it, and remembers that."""

    was_closed = False

    def write(self, data: Any) -> int:
        """Write all of `data`, or nothing at all once the reader is gone."""
        left = memoryview(data).cast("B")
        size = left.nbytes
        try:
            while left.nbytes:
                left = left[super().write(left) or 0 :]
        except BrokenPipeError:
            self.was_closed = True
            with Path(os.devnull).open("wb") as sink:
                os.dup2(sink.fileno(), self.fileno())
        return size


@contextmanager
def lasting_output() -> Iterator[Callable[[], bool]]:
    """Inside the block, stdout and stderr may be closed, or be pipes whose reader ends early.

    Yields a function that flushes stdout and says whether its reader has gone before it had read all.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield _is_reader_gone
    finally:
        for stream, former in zip((sys.stdout, sys.stderr), before, strict=True):
            if stream is not former:
                stream.flush()
        sys.stdout, sys.stderr = before


def _is_reader_gone() -> bool:
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _LastingPipe) and raw.was_closed


def _lasting(stream: TextIO | None) -> TextIO:
    """`stream`, or one that takes its place if it is closed or a pipe of this process."""
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    is_own = stream is sys.__stdout__ or stream is sys.__stderr__
    if not is_own or not _is_pipe(stream):
        return stream
    stream.flush()
    pipe = _LastingPipe(stream.fileno(), "wb", closefd=False)
    encoding, errors = stream.encoding, stream.errors
    if stream is sys.__stderr__:
        # no buffer: a signal handler that says something would find it in use, which Python refuses ("reentrant call")
        unbuffered: Any = pipe
        return io.TextIOWrapper(unbuffered, encoding, errors, write_through=True)
    return io.TextIOWrapper(io.BufferedWriter(pipe), encoding, errors)


def _is_pipe(stream: TextIO) -> bool:
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
