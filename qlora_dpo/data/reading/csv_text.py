"""Reads CSV: finds what separates its columns, and reads every record with the line on which it ends."""

import csv
import io
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa

from qlora_dpo.data.reading.arrow_tables import ARROW_BLOCK_ROWS, arrow_rows
from qlora_dpo.data.reading.file_rows import HEADER_COLUMNS, FileRows, count_of
from qlora_dpo.data.reading.text_index import check_utf8
from qlora_dpo.data.spool import Spool
from qlora_dpo.errors import DataError

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
"""What may separate columns, in the words of messages."""
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_MAX_HEAD_LINES = 100
"""Lines that are looked at for the header."""


@dataclass(frozen=True)
class _Head:
    """What stands before the records: lines that are left out, and how the header separates its columns."""

    skipped: int = 0
    """Lines before the header."""
    comments: int = 0
    separator: str = ","
    skips_space: bool = False
    """True if a space follows each separator."""
    notes: tuple[str, ...] = ()


def read_csv(name: str, content: Spool, is_tsv: bool) -> FileRows:
    """The rows of a CSV text, whose first line that is no comment names the columns; raises DataError.

    Columns are separated by commas, or by tabs if `is_tsv`, unless the header or a line `sep=;` says otherwise.
    """
    csv.field_size_limit(1 << 30)  # the default of 131,072 characters refuses long dialogues
    check_utf8(name, content)
    text = io.TextIOWrapper(content.file, encoding="utf-8-sig", newline="")
    lines = array("q")
    reader: Any = None
    head = _Head()
    try:
        head = _read_head(name, list(islice(text, _MAX_HEAD_LINES)), "\t" if is_tsv else ",")
        text.seek(0)
        for _ in range(head.skipped):
            text.readline()
        reader = csv.reader(text, strict=True, delimiter=head.separator, skipinitialspace=head.skips_space)
        header: list[str] = next(reader, [])
        columns = [column.strip() for column in header]
        if repeated := [column for column in dict.fromkeys(columns) if columns.count(column) > 1]:
            place = f"{name}:{head.skipped + 1}"
            raise DataError(f'{place}: names the column "{repeated[0]}" twice; column names must differ')
        if columns != header:
            head = replace(head, notes=(*head.notes, f"{name}: spaces around the names of columns are left out"))
        schema = pa.schema([(column, pa.string()) for column in columns])
        records = _csv_records(name, reader, len(columns), head, lines)
        batches = list[pa.RecordBatch]()
        while block := list(islice(records, ARROW_BLOCK_ROWS)):
            arrays = [pa.array(column, pa.string()) for column in zip(*block, strict=True)]
            batches.append(pa.record_batch(arrays, schema=schema))
    except csv.Error as error:
        line = head.skipped + (reader.line_num if reader else 0)
        raise DataError(f"{name}:{line}: is not valid CSV: {error}") from error
    finally:
        text.detach()
    return FileRows(name, arrow_rows(pa.Table.from_batches(batches, schema)), lines, notes=head.notes)


def _csv_records(name: str, reader: Any, columns: int, head: _Head, lines: "array[int]") -> Iterator[list[str]]:
    """Yield the records below the header, and append the line on which each ends to `lines`."""
    for fields in reader:
        if not fields:
            continue
        line = head.skipped + reader.line_num
        if len(fields) != columns:
            separators = SEPARATORS.get(head.separator, f'"{head.separator}"')
            raise DataError(
                f"{name}:{line}: has {len(fields)} fields where the header has {columns}; "
                f"put text with {separators}, quotes or line breaks in double quotes"
            )
        lines.append(line)
        yield fields


def _read_head(name: str, lines: Sequence[str], default: str) -> _Head:
    """What stands before the records, from the first lines of the file."""
    skipped, comments, separator, notes = 0, 0, "", list[str]()
    for number, line in enumerate(lines):
        following = next((later for later in lines[number + 1 :] if later.strip()), "")
        if not line.strip():
            pass
        elif not separator and (found := _SEPARATOR_LINE.fullmatch(line)):
            separator = found[1]
        elif line.startswith("#") and _is_comment(line, following, separator or default):
            comments += 1
        else:
            break
        skipped = number + 1
    header = lines[skipped] if skipped < len(lines) else ""
    if comments:
        notes.append(f"{name}: {count_of(comments, 'comment line')} before the header left out")
    if separator:
        words = SEPARATORS.get(separator, f'"{separator}"')
        notes.append(f"{name}: its first line says that columns are separated by {words}; that line is left out")
    else:
        separator = _sniff_separator(header, default)
        if separator != default:
            notes.append(f"{name}: its columns are separated by {SEPARATORS[separator]}, not {SEPARATORS[default]}")
    if header.endswith("\r"):
        notes.append(f"{name}: its lines end with a carriage return alone, as on old Macs; read as lines")
    fields = _split(header, separator)
    skips_space = len(fields) > 1 and all(field.startswith(" ") for field in fields[1:])
    if skips_space:
        notes.append(f"{name}: the space after each separator is left out")
    return _Head(skipped, comments, separator, skips_space, tuple(notes))


def _is_comment(line: str, following: str, separator: str) -> bool:
    """True if a line that begins with # is no header: the next line is one, or has another number of fields."""
    if _num_known(line.lstrip("# "), separator):
        return False
    separators = {separator, *SEPARATORS}
    if following.startswith("#") or _SEPARATOR_LINE.fullmatch(following):
        return True
    if any(_num_known(following, each) for each in separators):
        return True
    return len(_split(line, separator)) != len(_split(following, separator))


def _sniff_separator(header: str, default: str) -> str:
    """What separates the columns of a header: what gives the most columns of a known name, else the most columns.

    `default`, if it gives as many known names as any other, or two columns where none has a known name.
    """
    candidates = [default, *(separator for separator in SEPARATORS if separator != default)]
    known = {separator: _num_known(header, separator) for separator in candidates}
    if any(known.values()):
        return max(candidates, key=lambda separator: known[separator])
    if len(_split(header, default)) > 1:
        return default
    return max(candidates, key=lambda separator: len(_split(header, separator)))


def _num_known(header: str, separator: str) -> int:
    return sum(field.strip().casefold() in HEADER_COLUMNS for field in _split(header, separator))


def _split(line: str, separator: str) -> list[str]:
    """The fields of a line; empty if it is not valid CSV."""
    try:
        return next(csv.reader([line], strict=True, delimiter=separator), [])
    except csv.Error:
        return []
