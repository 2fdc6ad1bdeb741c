"""Runs something in a child process whose disk fails, or which dies, at one chosen file event."""

import errno
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal

Fault = Literal["killed", "torn", "full"]
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def forked() -> int:
    """Fork: 0 in the child, its pid in the parent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: torch has threads; none of them is used here
        return os.fork()


def struck(act: Callable[[], None], point: int, fault: Fault, below: Path, seed: int | None = None) -> bool:
    """Run `act` in a child process in which a `fault` strikes at the `point`-th file event `below` a folder.

    `killed`: the process ends before the event. `torn`: before that, files that were written but not flushed lose their
    second half, as after a power cut; with a `seed`, they end anywhere, or in zeros. `full`: this event and all later
    ones that write fail for lack of space. True if the event was reached.
    """
    child = forked()
    if not child:
        try:
            _Disk(point, fault, str(below), seed).watch()
            act()
        except BaseException as error:
            if fault == "full" and _is_full(error):
                os._exit(1)
            traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(77)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1, 9), f"the child ended with {code}"
    return code != 0


def points(every: int) -> Iterator[int]:
    """Numbers of file events to strike at: each `every`-th, from one on that QLORA_DPO_FAULT_SEED moves."""
    return count(1 + int(os.environ.get("QLORA_DPO_FAULT_SEED", "0")) % every, every)


def _is_full(error: BaseException | None) -> bool:
    """True for the error that `full` raises, however it was put into words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return False


class _Disk:
    """Counts what this process does to files below a folder, and strikes when its turn has come."""

    def __init__(self, point: int, fault: Fault, below: str, seed: int | None) -> None:
        self.point, self.fault, self.below, self.seed = point, fault, below, seed
        self.count, self.flushed = 0, set[str]()
        self.flush = os.fsync

    def watch(self) -> None:
        os.fsync = self._fsync
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITES)
        if opens or event in EVENTS:
            self._meet(str(arguments[0]), takes_space=opens or event == "os.mkdir")

    def _fsync(self, handle: int) -> None:
        path = str(Path(f"/proc/self/fd/{handle}").readlink())
        self._meet(path, takes_space=True)
        self.flush(handle)
        self.flushed.add(path)

    def _meet(self, path: str, *, takes_space: bool) -> None:
        if not path.startswith(self.below):
            return
        self.count += 1
        if self.fault == "full":
            if self.count >= self.point and takes_space:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        elif self.count == self.point:
            self.point = -1  # what follows is no longer watched
            if self.fault == "torn":
                self._tear()
            os._exit(9)

    def _tear(self) -> None:
        draw = random.Random(self.seed)
        for file in sorted(Path(self.below).rglob("*")):
            temporary = any(part.startswith(".") for part in file.relative_to(self.below).parts)
            if not file.is_file() or not temporary or str(file) in self.flushed:
                continue
            size = file.stat().st_size
            kept = size // 2 if self.seed is None else draw.randint(0, size)
            os.truncate(file, kept)
            if self.seed is not None and draw.random() < 0.5:
                os.truncate(file, size)  # what was not written reads as zeros
