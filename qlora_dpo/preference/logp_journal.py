"""Keeps each answer of the reference as soon as it is there, so that a kill costs the batch in flight and no more.

A record is a pair's digest (32 bytes), its two log-probabilities (float32, little-endian) and 8 bytes of BLAKE2b over
those 40. A journal belongs to one process, which holds a lock on it; what it held is written as a whole file about once
a minute, and it starts anew. Of one that a killed process has left, the records that verify are used.
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
    """The records of some answers, one after another."""
    record_P = np.zeros(len(digest_P), dtype=RECORD_DTYPE)
    record_P["digest"], record_P["logp"] = digest_P, logp_P2
    return b"".join(body + _check(body) for body in _bodies(record_P.tobytes()))


def decode_records(content: bytes) -> LogpTable:
    """What the records of `content` say; one that is damaged, or cut off at the end, is left out."""
    size = RECORD_DTYPE.itemsize
    whole = len(content) // size
    right = [_check(body) == content[(n + 1) * size - 8 : (n + 1) * size] for n, body in enumerate(_bodies(content))]
    record_P = np.frombuffer(content, dtype=RECORD_DTYPE, count=whole)[np.array(right, dtype=bool)]
    return make_logp_table(record_P["digest"], record_P["logp"])


def _bodies(content: bytes) -> Iterator[bytes]:
    size = RECORD_DTYPE.itemsize
    return (content[start : start + size - 8] for start in range(0, len(content) - size + 1, size))


def _check(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).digest()


class LogpJournal:
    """The journal of this process in `folder`; its file is made with the first answer and removed by `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self._handle = -1

    def add(self, digest_P: DigestArray, logp_P2: LogpArray) -> None:
        """Append some answers: they outlive this process, and a power cut if the system has written them by then."""
        with translate_disk_errors(self.folder):
            while self.path is None:
                self._open()
            left = encode_records(digest_P, logp_P2)
            while left:
                left = left[os.write(self._handle, left) :]

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handle, name = tempfile.mkstemp(suffix=JOURNAL_SUFFIX, dir=self.folder)
        with suppress(OSError):  # a file system without locks; then nobody takes the file for one that was left
            fcntl.flock(self._handle, fcntl.LOCK_SH)
        if Path(name).exists():
            self.path = Path(name)
        else:  # another run took it for one that was left before it was locked
            os.close(self._handle)

    def clear(self) -> None:
        """Forget all answers, which are in a file of their own by now."""
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
    """The journals in `folder` whose processes have ended, each with what it says; locked meanwhile."""
    found, handles = dict[Path, LogpTable](), list[int]()
    try:
        for path in sorted(folder.glob(f"*{JOURNAL_SUFFIX}")):
            try:
                handle = os.open(path, os.O_RDWR)
            except OSError:  # removed by its owner, or of another user
                continue
            handles.append(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its owner lives, or the file system has no locks
                continue
            found[path] = decode_records(path.read_bytes())
        yield found
    finally:
        for handle in handles:
            os.close(handle)
