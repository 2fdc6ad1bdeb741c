"""The text of a data file, read a line at a time: in memory if it is small, else from disk.

This stays beside the Arrow tables of the cache: JSON lines larger than memory are parsed when a row is read, and errors
name a row by its line, so the file itself is read; a gzipped one is decompressed into a temporary file.
"""

import tempfile
import weakref
from typing import IO, Any

SPOOL_MEMORY_BYTES = 2**26
"""Largest text that is kept in memory, in bytes."""


class Spool:
    """The bytes of `file`, or of a temporary file that `append` fills; it is closed with the last reference to it."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self.file: Any = file or tempfile.SpooledTemporaryFile(SPOOL_MEMORY_BYTES)  # noqa: SIM115 - closed by the next line
        weakref.finalize(self, self.file.close)
        self.num_bytes = 0

    def append(self, data: bytes) -> None:
        """Append `data`."""
        self.file.seek(self.num_bytes)
        self.num_bytes += self.file.write(data)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`."""
        self.file.seek(start)
        data: bytes = self.file.read(stop - start)
        return data
