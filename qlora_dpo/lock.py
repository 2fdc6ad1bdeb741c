"""Lets one process at a time into a run directory, and says who is in it."""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from qlora_dpo.errors import RunError
from qlora_dpo.files import translate_disk_errors

LOCK_FILE = ".lock"


@contextmanager
def lock_folder(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes out of `folder`, which is made if it is not there.

    The kernel drops the lock when its owner dies, however it dies; then `log` is told from whom it was taken over.
    Raises RunError, which names the owner, if a process that lives holds it.
    """
    with translate_disk_errors(folder):
        handle = _acquire(folder)
    try:
        if before := _lock_owner(handle):
            log(f"{folder}: taken over from {before}, which ended without leaving")
        me = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with translate_disk_errors(folder):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(me).encode(), 0)
        yield
    finally:
        # removed while it is still held, so that nobody waits on a file that is no longer there
        (folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(handle)


def _acquire(folder: Path) -> int:
    """The open lock file of `folder`, locked."""
    path = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another run that failed has just removed its empty folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the file may have been removed by its owner between opening and locking it
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        except BlockingIOError as error:
            owner = _lock_owner(handle) or "another process"
            os.close(handle)
            raise RunError(
                f"{folder}: is in use by {owner}; wait for it, or name another folder with -o DIR"
            ) from error
        except FileNotFoundError:
            pass
        os.close(handle)


def _lock_owner(handle: int) -> str:
    """Who wrote the lock file, in words; empty if nobody did."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(owner['pid'])} on {str(owner['host'])[:64]} (since {str(owner['since'])[:32]})"
    except (ValueError, KeyError, TypeError):
        return ""
