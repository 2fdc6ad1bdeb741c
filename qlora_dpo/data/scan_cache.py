"""Keeps what a long reading found in one file, so that the next run on the same rows neither parses nor tokenizes.

A file is named by what was read and by the SHA-256 of its content; one that has another content is never used. It is a
safetensors file, written and read in pieces, so that it may be larger than memory.
"""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.spool import Spool
from qlora_dpo.errors import SourceError
from qlora_dpo.files import cache_home, file_sha256, translate_disk_errors

MIN_CACHED_ROWS = 10_000
"""Rows from which on a reading is kept: fewer are read in a second."""
IDS_TENSOR = "ids"
WRITE_CHUNK_BYTES = 2**20
SAFETENSORS_DTYPES = {"I32": np.int32, "I64": np.int64, "U8": np.uint8}

ColumnArrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class CachedScan:
    """What was kept: numbers by name, facts as JSON has them, and token ids, which stay in the file."""

    columns: ColumnArrays
    metadata: Any
    ids: Spool
    ids_offset: int
    """Where in `ids` the first token id stands, in bytes."""


def scan_key(*parts: Any) -> str:
    """The name of a reading by everything that decides what it finds, as JSON can tell it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_scan(name: str | None) -> CachedScan | None:
    """What was kept under `name`; None if nothing was, or if no file of it is whole."""
    if name is None:
        return None
    for path in sorted(_cache_folder().glob(f"{name}.*.safetensors")):
        with suppress(OSError):
            if file_sha256(path) == path.name.split(".")[1]:
                return _read(path)
    return None


def store_scan(name: str | None, columns: ColumnArrays, metadata: Any, ids: Spool | None = None) -> None:
    """Keep a reading under `name`; a cache that cannot be written costs the next run time, and nothing else."""
    if name is not None:
        with suppress(SourceError):
            _write(name, columns, metadata, ids)


def _cache_folder() -> Path:
    return cache_home() / "read"


def _write(name: str, columns: ColumnArrays, facts: Any, ids: Spool | None) -> None:
    kinds = {np.dtype(kind): word for word, kind in SAFETENSORS_DTYPES.items()}
    tensors = [(column, kinds[values.dtype], values.shape, values.nbytes) for column, values in columns.items()]
    if ids is not None:
        tensors.append((IDS_TENSOR, "I32", (ids.num_bytes // 4,), ids.num_bytes))
    ends = list(accumulate((size for *_, size in tensors), initial=0))
    header: dict[str, Any] = {
        column: {"dtype": kind, "shape": list(shape), "data_offsets": list(place)}
        for (column, kind, shape, _), place in zip(tensors, pairwise(ends), strict=True)
    }
    head = json.dumps({"__metadata__": {"facts": json.dumps(facts)}, **header}).encode()
    head += b" " * (-len(head) % 8)
    with translate_disk_errors(_cache_folder()):
        _cache_folder().mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=_cache_folder())
        try:
            content = hashlib.sha256()
            with os.fdopen(handle, "wb") as file:
                for piece in chain((struct.pack("<Q", len(head)), head), _column_bytes(columns), _ids_chunks(ids)):
                    content.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).rename(_cache_folder() / f"{name}.{content.hexdigest()}.safetensors")
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _column_bytes(columns: ColumnArrays) -> Iterator[bytes]:
    return (np.ascontiguousarray(values).tobytes() for values in columns.values())


def _ids_chunks(ids: Spool | None) -> Iterator[bytes]:
    if ids is not None:
        for start in range(0, ids.num_bytes, WRITE_CHUNK_BYTES):
            yield ids.read(start, min(start + WRITE_CHUNK_BYTES, ids.num_bytes))


def _read(path: Path) -> CachedScan:
    file = Spool(path.open("rb"))
    (size,) = struct.unpack("<Q", file.read(0, 8))
    header = json.loads(file.read(8, 8 + size))
    facts = json.loads(header.pop("__metadata__")["facts"])
    columns, first = dict[str, NDArray[Any]](), 8 + size
    for column, tensor in header.items():
        start, stop = (8 + size + place for place in tensor["data_offsets"])
        if column == IDS_TENSOR:
            first = start
        else:
            values = np.frombuffer(file.read(start, stop), dtype=SAFETENSORS_DTYPES[tensor["dtype"]])
            columns[column] = values.reshape(tensor["shape"])
    return CachedScan(columns, facts, file, first)
