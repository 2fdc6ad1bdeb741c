"""A write-ahead log of reference log-probabilities: a killed process loses only the batch in flight.

A record is a pair's digest (32 bytes), its two log-probabilities (float32, little-endian) and 8 bytes of BLAKE2b over
those 40. Each process locks and writes a journal of its own. About once a minute its entries are written as a file and
the journal is emptied. The records of a killed process's journal are used if their checksums match.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from qlora_dpo.files import translate_disk_errors
from qlora_dpo.preference.logp_table import DigestArray, LogpArray, LogpTable, make_logp_table

JOURNAL_SUFFIX = ".journal"
RECORD_DTYPE = np.dtype([("digest", "S32"), ("logp", "<f4", (2,)), ("check", "S8")])


def encode_records(digest_P: DigestArray, logp_P2: LogpArray) -> bytes:
    """The log-probabilities of P pairs as consecutive records."""
    record_P = np.zeros(len(digest_P), dtype=RECORD_DTYPE)
    record_P["digest"], record_P["logp"] = digest_P, logp_P2
    return b"".join(body + _checksum(body) for body in _bodies(record_P.tobytes()))


def decode_records(content: bytes) -> LogpTable:
    """The records of `content`; a damaged record, or one that is cut off at the end, is left out."""
    size = RECORD_DTYPE.itemsize
    num_complete = len(content) // size
    valid = [_checksum(body) == content[(n + 1) * size - 8 : (n + 1) * size] for n, body in enumerate(_bodies(content))]
    record_P = np.frombuffer(content, dtype=RECORD_DTYPE, count=num_complete)[np.array(valid, dtype=bool)]
    return make_logp_table(record_P["digest"], record_P["logp"])


def _bodies(content: bytes) -> Iterator[bytes]:
    """Each complete record without its checksum."""
    size = RECORD_DTYPE.itemsize
    return (content[start : start + size - 8] for start in range(0, len(content) - size + 1, size))


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).digest()


class LogpJournal:
    """The journal of this process in `folder`; the first `add` creates its file, `close` removes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self._handle = -1

    def add(self, digest_P: DigestArray, logp_P2: LogpArray) -> None:
        """Append entries. They survive a kill of this process at once, and a power cut once the system has flushed."""
        with translate_disk_errors(self.folder):
            while self.path is None:
                self._open()
            unwritten = encode_records(digest_P, logp_P2)
            while unwritten:
                unwritten = unwritten[os.write(self._handle, unwritten) :]

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handle, name = tempfile.mkstemp(suffix=JOURNAL_SUFFIX, dir=self.folder)
        with suppress(OSError):  # a file system without locks; then no run takes a journal for an orphaned one
            fcntl.flock(self._handle, fcntl.LOCK_SH)
        if Path(name).exists():
            self.path = Path(name)
        else:  # another run took it for an orphaned one before it was locked
            os.close(self._handle)

    def clear(self) -> None:
        """Empty the journal, whose entries are in a file by now."""
        if self.path is not None:
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)

    def close(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self.path = None


@contextmanager
def orphaned_journals(folder: Path) -> Iterator[dict[Path, LogpTable]]:
    """The entries of the journals in `folder` whose processes have ended, by path; locked meanwhile."""
    tables, handles = dict[Path, LogpTable](), list[int]()
    try:
        for path in sorted(folder.glob(f"*{JOURNAL_SUFFIX}")):
            try:
                handle = os.open(path, os.O_RDWR)
            except OSError:  # removed by its owner, or another user's
                continue
            handles.append(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its owner is running, or the file system has no locks
                continue
            tables[path] = decode_records(path.read_bytes())
        yield tables
    finally:
        for handle in handles:
            os.close(handle)
