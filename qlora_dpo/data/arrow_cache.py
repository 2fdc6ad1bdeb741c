"""Arrow files in the cache folder, memory-mapped: rows that were parsed and tokenized once are not read again.

A file is an Arrow IPC stream named `KEY.SHA256.arrow` by everything that decides its content and by that content, so a
damaged file is never used. While it is written it is `KEY.RANDOM.part`; after a kill, its complete record batches can
still be read.
"""

import hashlib
import json
import os
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from qlora_dpo.files import cache_home, file_sha256

MIN_CACHED_ROWS = 10_000
"""Rows from which the result of parsing is cached: fewer are parsed in a second."""
MAX_PART_SECONDS = 86_400
"""Age beyond which an unfinished file of the same key is removed: its writer is gone."""


def arrow_cache_dir() -> Path:
    """The folder of the files; several processes may write to it at once."""
    return cache_home() / "pairs"


def cache_key(*parts: Any) -> str:
    """SHA-256 of values that JSON can express."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_table(key: str | None) -> pa.Table | None:
    """The table that was stored under `key`, memory-mapped; None if there is none, or only damaged ones."""
    if key is None:
        return None
    for path in sorted(arrow_cache_dir().glob(f"{key}.*.arrow")):
        with suppress(OSError, pa.ArrowException):
            if file_sha256(path) == path.name.split(".")[1]:
                return _map_table(path)
    return None


def store_table(key: str | None, table: pa.Table) -> None:
    """Store `table` under `key`; a cache that cannot be written costs the next run time, and nothing else."""
    if key is not None:
        writer = TableWriter(key, table.schema)
        for batch in table.to_batches():
            writer.write(batch)
        writer.finish()


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The complete and valid record batches at the start of a file, memory-mapped."""
    with suppress(OSError, pa.ArrowException), pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            batch.validate(full=True)
            yield batch


class TableWriter:
    """Writes record batches to a file in the cache, or to a temporary one without a key or a writable cache."""

    def __init__(self, key: str | None, schema: pa.Schema) -> None:
        self._key, self._schema = key, schema
        self._unwritten = list[pa.RecordBatch]()
        """Batches behind the first one that the disk had no room for."""
        self._path = _new_file(key)
        if self._path.parent != arrow_cache_dir():
            weakref.finalize(self, self._path.unlink, missing_ok=True)
        self._file = pa.OSFile(str(self._path), "wb")
        self._stream: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch; it is in the file when this returns, or in memory once the disk is full."""
        if not self._unwritten:
            with suppress(OSError):
                self._stream = self._stream or pa.ipc.new_stream(self._file, self._schema)
                self._stream.write_batch(batch)
                return
        self._unwritten.append(batch)

    def finish(self) -> pa.Table:
        """Close the file, give it its final name, and map it."""
        try:
            self._stream = self._stream or pa.ipc.new_stream(self._file, self._schema)
            self._stream.close()
            self._file.close()
            is_complete = not self._unwritten
        except OSError:
            is_complete = False
        if not is_complete:
            written = list(read_batches(self._path))
            self._path.unlink(missing_ok=True)
            return pa.Table.from_batches([*written, *self._unwritten], self._schema)
        table = _map_table(self._path)
        if self._key is None or self._path.parent != arrow_cache_dir():
            self._path.unlink(missing_ok=True)  # the mapping keeps the content
        else:
            with suppress(OSError):
                _publish(self._path, self._key)
        return table


def _map_table(path: Path) -> pa.Table:
    # buffers keep the mapping alive when the file is closed, so that no file descriptor stays open
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def _new_file(key: str | None) -> Path:
    """An empty file for `key` in the cache; a temporary one if there is no key or no such folder can be written."""
    if key is not None:
        with suppress(OSError):
            arrow_cache_dir().mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f"{key}.", suffix=".part", dir=arrow_cache_dir())
            os.close(handle)
            return Path(name)
    handle, name = tempfile.mkstemp(suffix=".arrow")
    os.close(handle)
    return Path(name)


def _publish(path: Path, key: str) -> None:
    """Flush a finished file to the disk, rename it, and remove what earlier writers of its key left behind."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.chmod(0o644)
    path.rename(path.parent / f"{key}.{file_sha256(path)}.arrow")
    for part in path.parent.glob(f"{key}.*.part"):
        if time.time() - part.stat().st_mtime > MAX_PART_SECONDS:
            part.unlink(missing_ok=True)
