"""A lock on a run folder: one process at a time may write there, and its name is in the lock file."""

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
    """Hold the lock of `folder`, which is created if it does not exist.

    The kernel releases the lock when its owner dies, however it dies; `log` then gets a sentence that names that owner.
    Raises RunError, naming the owner, if a living process holds the lock.
    """
    with translate_disk_errors(folder):
        handle = _acquire(folder)
    try:
        if previous := _lock_owner(handle):
            log(f"{folder}: taken over from {previous}, which ended without leaving")
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with translate_disk_errors(folder):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(owner).encode(), 0)
        yield
    finally:
        # removed while it is still locked, so that no process waits for a file that is already deleted
        (folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(handle)


def _acquire(folder: Path) -> int:
    """Open and lock the lock file of `folder`; returns its file descriptor."""
    path = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another run failed and has just removed its empty folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # its owner may have removed the file after it was opened here
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
    """The process that wrote the lock file, as a phrase; empty if the file is empty or damaged."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(owner['pid'])} on {str(owner['host'])[:64]} (since {str(owner['since'])[:32]})"
    except (ValueError, KeyError, TypeError):
        return ""
