"""Reads local data files (JSON lines, JSON, CSV, Parquet) into rows that know their place in the file."""

import codecs
import csv
import gzip
import io
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.spool import SPOOL_MEMORY_BYTES, Spool
from qlora_dpo.errors import DataError, RecipeError, SourceError
from qlora_dpo.files import file_sha256
from qlora_dpo.recipe.tables import DATA_SUFFIXES

Row = dict[str, Any]

ARROW_BLOCK_ROWS = 512
"""Rows of an Arrow table that are converted to Python objects at once when they are read in order."""


@dataclass(frozen=True)
class FileRows:
    """The rows of one file in order; `lines` holds the line number of each, from 1: its first, or in CSV its last.

    Rows of JSON lines are parsed when they are read, and may then raise DataError.
    """

    name: str
    rows: Sequence[Row]
    lines: Sequence[int] | None
    fingerprint: str = ""
    """SHA-256 of the file; empty if unknown."""

    def location(self, row: int) -> str:
        """The location of row `row`, from 1: `pairs.jsonl:17`, or `pairs.parquet, row 17` without lines."""
        return f"{self.name}, row {row}" if self.lines is None else f"{self.name}:{self.lines[row - 1]}"


def display_path(path: Path) -> str:
    """`path` as messages show it: relative if it is below the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def data_suffix(path: Path) -> str | None:
    """The suffix of a data file (.jsonl.gz, .csv, ...), or None if the format is not supported."""
    suffixes = [suffix for suffix in DATA_SUFFIXES if path.name.lower().endswith(suffix)]
    return max(suffixes, key=len, default=None)


def read_data_file(path: Path) -> FileRows:
    """Read every row of a data file.

    Blank lines of JSON lines are skipped, and a CSV file's first line names its columns. Text is UTF-8, with or
    without a byte order mark. Raises RecipeError for an unsupported name, SourceError if the disk fails, and DataError
    with file and line for content that is damaged or of another format.
    """
    kind = data_suffix(path)
    if kind is None:
        endings = ", ".join(DATA_SUFFIXES)
        raise RecipeError(
            f"{display_path(path)}: is not a data file that can be read; its name must end in one of {endings}"
        )
    name = display_path(path)
    content = _open_spooled(path, kind)
    read = (
        FileRows(name, _read_parquet(name, content.file), None)
        if kind == ".parquet"
        else _read_text(name, kind, content)
    )
    if not read.rows:
        raise DataError(f"{name}: holds no rows; a preference set has one pair per row")
    return replace(read, fingerprint=file_sha256(path))


def _read_text(name: str, kind: str, content: Spool) -> FileRows:
    starts, lines, first = _index_lines(name, content.file)
    match kind.removesuffix(".gz"):
        case ".csv":
            return _read_csv(name, content.file)
        case ".json" if first == b"[":
            content.file.seek(0)
            return FileRows(name, _read_json_array(name, content.file.read().decode("utf-8-sig")), None)
        case _:
            return _read_json_lines(name, content, starts, lines)


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


def _open_spooled(path: Path, kind: str) -> Spool:
    """The file's bytes, decompressed; a large file stays on disk."""
    name = display_path(path)
    try:
        if not kind.endswith(".gz"):
            small = path.stat().st_size <= SPOOL_MEMORY_BYTES
            return Spool(io.BytesIO(path.read_bytes()) if small else path.open("rb"))
        content = Spool()
        with gzip.open(path) as packed:
            while block := packed.read(2**20):
                content.append(block)
        content.file.seek(0)
        return content
    except FileNotFoundError as error:
        raise RecipeError(f"{name}: there is no such file; correct the path in the recipe") from error
    except EOFError as error:
        raise DataError(f"{name}: the gzip data ends too early; copy or download the file again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{name}: is not gzip data, or is damaged; take .gz off its name if it is plain text, "
            "else copy or download the file again"
        ) from error
    except OSError as error:
        raise SourceError(f"{name}: cannot be read: {error.strerror}") from error


def _index_lines(name: str, file: IO[bytes]) -> "tuple[array[int], array[int], bytes]":
    """Start and number (from 1) of each line that is not blank, and the first byte that is not white space.

    The last start is the end of the text. Raises DataError for text that is not UTF-8. A byte order mark is skipped.
    """
    starts, lines, first = array("q"), array("q"), b""
    mark = 0
    place = 0
    for number, line in enumerate(file, 1):
        content = line
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{name}: is UTF-16 text; save the file as UTF-8")
            content = line.removeprefix(codecs.BOM_UTF8)
            mark = len(line) - len(content)
            place = mark
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            byte = place - mark + error.start
            raise DataError(f"{name}:{number}: is not UTF-8 text (byte {byte}); save it as UTF-8") from error
        if not text.isspace():
            first = first or text.lstrip()[0].encode()
            starts.append(place)
            lines.append(number)
        place += len(content)
    starts.append(place)
    return starts, lines, first


def _read_json_lines(name: str, content: Spool, starts: "array[int]", lines: "array[int]") -> FileRows:
    def make(index: int) -> Row:
        # up to the next line that is not blank
        text = content.read(starts[index], starts[index + 1]).decode().partition("\n")[0]
        return _require_object(f"{name}:{lines[index]}", _parse_json(name, text, lines[index]))

    return FileRows(name, LazySequence(len(lines), make), lines)


def _read_json_array(name: str, text: str) -> list[Row]:
    return [
        _require_object(f"{name}, row {number}", value) for number, value in enumerate(_parse_json(name, text, 1), 1)
    ]


def _require_object(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: is {json_type(value)}; every row must be an object with named columns")
    return value


def _parse_json(name: str, text: str, first_line: int) -> Any:
    """Parse JSON `text` whose first line is line `first_line` of the file."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON value")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{name}:{line}: is not valid JSON (column {error.colno}): {error.msg}") from error
    except ValueError as error:
        raise DataError(f"{name}:{first_line}: is not valid JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{name}:{first_line}: is nested too deeply to be a preference pair") from error


def _read_csv(name: str, file: IO[bytes]) -> FileRows:
    csv.field_size_limit(1 << 30)  # the default of 131,072 characters refuses long dialogues
    file.seek(0)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    lines = array("q")
    try:
        header = next(reader, [])
        if repeated := [column for column in dict.fromkeys(header) if header.count(column) > 1]:
            raise DataError(f'{name}:1: names the column "{repeated[0]}" twice; column names must differ')
        schema = pa.schema([(column, pa.string()) for column in header])
        records = _csv_records(name, reader, len(header), lines)
        batches = list[pa.RecordBatch]()
        while block := list(islice(records, ARROW_BLOCK_ROWS)):
            columns = [pa.array(column, pa.string()) for column in zip(*block, strict=True)]
            batches.append(pa.record_batch(columns, schema=schema))
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: is not valid CSV: {error}") from error
    finally:
        text.detach()
    return FileRows(name, arrow_rows(pa.Table.from_batches(batches, schema)), lines)


def _csv_records(name: str, reader: Any, columns: int, lines: "array[int]") -> Iterator[list[str]]:
    """Yield the records below the header, and append the line on which each ends to `lines`."""
    for fields in reader:
        if not fields:
            continue
        if len(fields) != columns:
            raise DataError(
                f"{name}:{reader.line_num}: has {len(fields)} fields where the header has {columns}; "
                "put text with commas, quotes or line breaks in double quotes"
            )
        lines.append(reader.line_num)
        yield fields


def _read_parquet(name: str, file: IO[bytes]) -> LazySequence[Row]:
    try:
        table = pq.ParquetFile(file).read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        if "UTF8" in str(error):
            raise DataError(
                f"{name}: holds text that is not UTF-8; write the Parquet file again from UTF-8 text"
            ) from error
        raise DataError(f"{name}: is not Parquet data, or is damaged; copy or download the file again") from error
    return arrow_rows(table)


def json_type(value: object) -> str:
    """The type of a JSON value, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "a string"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"of type {type(value).__name__}"
