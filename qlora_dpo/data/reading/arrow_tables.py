"""Reads Arrow tables: Parquet and Arrow files, and the folders that `datasets` writes with `save_to_disk`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.reading.file_rows import Row
from qlora_dpo.errors import DataError

ARROW_BLOCK_ROWS = 512
"""Rows of an Arrow table that are converted to Python objects at once when they are read in order."""
_READ_AGAIN = "copy or download the file again"


def arrow_rows(table: pa.Table) -> LazySequence[Row]:
    """The rows of an Arrow table; rows that are read in order are converted a block at a time."""
    start, block = 0, list[Row]()

    def make(index: int) -> Row:
        nonlocal start, block
        if not start <= index < start + len(block):
            # a single row for random access, since converting a row takes much longer than finding it
            size = ARROW_BLOCK_ROWS if index in (0, start + len(block)) else 1
            start, block = index, table.slice(index, size).to_pylist()
        return block[index - start]

    return LazySequence(table.num_rows, make)


def read_parquet(name: str, file: IO[bytes]) -> pa.Table:
    """The table of a Parquet file; raises DataError if it is damaged."""
    try:
        table = pq.ParquetFile(file).read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        if "UTF8" in str(error):
            raise DataError(
                f"{name}: holds text that is not UTF-8; write the Parquet file again from UTF-8 text"
            ) from error
        raise DataError(f"{name}: is not Parquet data, or is damaged; {_READ_AGAIN}") from error
    return table


def read_arrow(name: str, file: IO[bytes]) -> pa.Table:
    """The table of an Arrow file or stream; raises DataError if it is damaged."""
    try:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        table = (pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name}: is not Arrow data, or is damaged; {_READ_AGAIN}") from error
    return table


def checked_table(name: str, table: pa.Table) -> tuple[pa.Table, tuple[str, ...]]:
    """`table` with the times that Python cannot hold as text, and a sentence about each such column.

    Raises DataError if two columns, or two fields of one column, have the same name: only one could be read.
    """
    _check_names(name, table.schema, "column")
    notes = []
    for position, field in enumerate(table.schema):
        if not _holds_times(field.type):
            continue
        try:
            for chunk in table.column(position).chunks:
                chunk.to_pylist()
        except Exception:  # OverflowError, ValueError or KeyError: a year above 9999, nanoseconds, an unknown zone
            as_text = _times_as_text(table.column(position))
            table = table.set_column(position, field.name, as_text)
            notes.append(f'{name}: the times in "{field.name}" are read as text, since Python cannot hold all of them')
    return table, tuple(notes)


def _check_names(name: str, fields: Any, what: str) -> None:
    names = [field.name for field in fields]
    if twice := [each for each in dict.fromkeys(names) if names.count(each) > 1]:
        raise DataError(
            f'{name}: has two {what}s called "{twice[0]}", of which only one could be read; give them different names'
        )
    for field in fields:
        inner = field.type
        while pa.types.is_list(inner) or pa.types.is_large_list(inner) or pa.types.is_fixed_size_list(inner):
            inner = inner.value_type
        if pa.types.is_struct(inner):
            _check_names(f'{name}: column "{field.name}"', [inner.field(at) for at in range(inner.num_fields)], "field")


def _holds_times(kind: pa.DataType) -> bool:
    if pa.types.is_temporal(kind):
        return True
    return any(_holds_times(kind.field(position).type) for position in range(kind.num_fields))


def _times_as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column with its times as text, in any depth; those of a zone in UTC."""
    return column.cast(_with_times(column.type, None)).cast(_with_times(column.type, pa.string()))


def _with_times(kind: pa.DataType, text: pa.DataType | None) -> pa.DataType:
    """`kind` with its times as `text`; if that is None, with its times of a zone as times without one."""
    if pa.types.is_timestamp(kind):
        return text or pa.timestamp(kind.unit)
    if pa.types.is_duration(kind):
        return kind if text is None else pa.int64()  # Arrow has no text for it
    if pa.types.is_temporal(kind):
        return text or kind
    if pa.types.is_struct(kind):
        fields = [kind.field(position) for position in range(kind.num_fields)]
        return pa.struct([pa.field(field.name, _with_times(field.type, text)) for field in fields])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        make = pa.large_list if pa.types.is_large_list(kind) else pa.list_
        return make(_with_times(kind.value_type, text))
    return kind


def saved_dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `datasets` saved in `folder`, in order; raises DataError if it is damaged."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: its state.json is damaged; save the data set again with save_to_disk") from error


def saved_splits(folder: Path) -> Sequence[str] | None:
    """The splits of the data sets that `datasets` saved in `folder`; None if it saved none, or only one."""
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return None
    try:
        return [str(split) for split in json.loads(file.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: its dataset_dict.json is damaged; save the data with save_to_disk again") from error
