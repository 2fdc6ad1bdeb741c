"""Bytes that are written once and read in pieces: in memory while they are few, in a file without a name beyond."""

import tempfile
import weakref
from typing import IO, Any

SPOOL_MEMORY_BYTES = 2**26
"""Bytes up to which they are kept in memory."""


class Spool:
    """The bytes of `file`, or what is added to a temporary one; open for as long as anything refers to it."""

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
        some: bytes = self.file.read(stop - start)
        return some
