"""Arrow columns made from and read into numpy by their buffers, without a copy of lists.

pyarrow's own conversions (`pa.array`, `to_numpy`) import pandas where it is installed: 0.4 s and 50 MB per process.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

TOKEN_IDS = pa.list_(pa.int32())


def number_array(values: Sequence[int] | NDArray[Any], dtype: Any = np.int64) -> pa.Array:
    """Integers of `dtype`, none of them null."""
    numbers = np.ascontiguousarray(values, dtype=dtype)
    return pa.Array.from_buffers(
        getattr(pa, numbers.dtype.name)(), len(numbers), [None, pa.py_buffer(numbers.tobytes())]
    )


def binary_array(values: Sequence[bytes], width: int) -> pa.Array:
    """Byte strings of `width` bytes each."""
    return pa.Array.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(b"".join(values))])


def string_array(values: Sequence[str | None]) -> pa.Array:
    """Strings, or null."""
    texts = [(value or "").encode() for value in values]
    is_valid = np.packbits([value is not None for value in values], bitorder="little")
    buffers = [is_valid.tobytes(), _offsets(texts).tobytes(), b"".join(texts)]
    return pa.Array.from_buffers(pa.string(), len(texts), [pa.py_buffer(buffer) for buffer in buffers])


def token_ids_array(lists: Sequence[Sequence[int]]) -> pa.Array:
    """Lists of token ids."""
    offsets = _offsets(lists)
    ids = np.fromiter((token for ids in lists for token in ids), np.int32, count=int(offsets[-1]))
    buffers = [None, pa.py_buffer(offsets.tobytes())]
    return pa.Array.from_buffers(TOKEN_IDS, len(lists), buffers, children=[number_array(ids, np.int32)])


def read_numbers(table: pa.Table, name: str) -> NDArray[Any]:
    """An integer column (N)."""
    return _read_fixed(table, name, np.dtype(str(table.schema.field(name).type)))


def read_binary(table: pa.Table, name: str) -> NDArray[np.bytes_]:
    """A column of byte strings of one width (N); numpy leaves out zeros at the end of an item."""
    return _read_fixed(table, name, np.dtype(f"S{table.schema.field(name).type.byte_width}"))


def valid_rows(table: pa.Table, name: str) -> NDArray[np.int64]:
    """The rows in which a column is not null."""
    masks = [np.zeros(0, dtype=bool)]
    for chunk in table[name].chunks:
        bitmap = chunk.buffers()[0]
        if bitmap is None or chunk.null_count == 0:
            masks.append(np.ones(len(chunk), dtype=bool))
        else:
            bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
            masks.append(bits[chunk.offset : chunk.offset + len(chunk)].astype(bool))
    return np.flatnonzero(np.concatenate(masks))


def token_id_chunks(column: pa.ChunkedArray) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """The offsets and the ids of each chunk of a column of token id lists; both stay where Arrow has them."""
    chunks = list[tuple[NDArray[np.int32], NDArray[np.int32]]]()
    for chunk in column.chunks:
        _, offsets, _, ids = (np.frombuffer(buffer or b"", dtype=np.int32) for buffer in chunk.buffers())
        chunks.append((offsets[chunk.offset : chunk.offset + len(chunk) + 1], ids))
    return chunks


def _read_fixed(table: pa.Table, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    parts = [np.zeros(0, dtype=dtype)]
    for chunk in table[name].chunks:
        if len(chunk):
            start = dtype.itemsize * chunk.offset
            parts.append(np.frombuffer(chunk.buffers()[1], dtype=dtype, count=len(chunk), offset=start))
    return np.concatenate(parts)


def _offsets(items: Sequence[Any]) -> NDArray[np.int32]:
    """Where each item starts, in items of its own, and where the last one ends."""
    offsets: NDArray[np.int32] = np.cumsum([0, *map(len, items)]).astype(np.int32)
    return offsets
