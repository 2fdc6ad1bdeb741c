"""Faults are planted in memory: hundreds of saves are flushed, which a disk takes its time for."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_MEMORY = Path("/dev/shm")
ROOM = 2**30
"""Bytes that have to be free in it; containers often have 64 MB."""


def in_memory() -> bool:
    return SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= ROOM


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """As pytest has it, but in shared memory where there is room."""
    if not in_memory():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="qlora-dpo-", dir=SHARED_MEMORY, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
