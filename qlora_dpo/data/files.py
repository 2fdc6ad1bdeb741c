"""Local data files: JSON lines, JSON, CSV and Parquet read into rows whose place in the file is known."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_dpo.errors import DataError, RecipeError, SourceError
from qlora_dpo.recipe_tables import DATA_ENDINGS

Row = dict[str, Any]


@dataclass(frozen=True)
class FileRows:
    """The rows of one file in its order; `lines` holds the line, counted from 1, on which each row ends or starts."""

    name: str
    rows: list[Row]
    lines: Sequence[int] | None

    def place(self, row: int) -> str:
        """Where row `row`, counted from 1, stands: `pairs.jsonl:17`, or `pairs.parquet, row 17` without lines."""
        return f"{self.name}, row {row}" if self.lines is None else f"{self.name}:{self.lines[row - 1]}"


def shown(path: Path) -> str:
    """`path` as messages name it: from the current folder if it lies below it, else whole."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def ending(path: Path) -> str | None:
    """The data ending of a file's name (.jsonl.gz, .csv, ...), or None if it has none that can be read."""
    found = [each for each in DATA_ENDINGS if path.name.lower().endswith(each)]
    return max(found, key=len, default=None)


def read_file(path: Path) -> FileRows:
    """Read every row of a data file.

    Blank lines of JSON lines are skipped, and a CSV file's first line names its columns. Text is UTF-8, with or
    without a byte order mark. Raises RecipeError for a name that cannot be read, SourceError where the disk refuses,
    and DataError with file and line for content that is damaged or of another kind.
    """
    kind = ending(path)
    if kind is None:
        endings = ", ".join(DATA_ENDINGS)
        raise RecipeError(f"{shown(path)}: is not a data file that can be read; its name must end in one of {endings}")
    if kind == ".parquet":
        read = FileRows(shown(path), _parquet(path), None)
    else:
        text = _text(path, kind)
        match kind.removesuffix(".gz"):
            case ".csv":
                read = _csv(shown(path), text)
            case ".json" if text.lstrip()[:1] == "[":
                read = FileRows(shown(path), _json_array(shown(path), text), None)
            case _:
                read = _json_lines(shown(path), text)
    if not read.rows:
        raise DataError(f"{shown(path)}: holds no rows; a preference set has one pair per row")
    return read


def _bytes(path: Path, kind: str) -> bytes:
    name = shown(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise RecipeError(f"{name}: there is no such file; correct the path in the recipe") from error
    except OSError as error:
        raise SourceError(f"{name}: cannot be read: {error.strerror}") from error
    if not kind.endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise DataError(f"{name}: the gzip data ends too early; copy or download the file again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{name}: is not gzip data, or is damaged; take .gz off its name if it is plain text, "
            "else copy or download the file again"
        ) from error


def _text(path: Path, kind: str) -> str:
    content = _bytes(path, kind)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{shown(path)}: is UTF-16 text; save the file as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{shown(path)}:{line}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _json_lines(name: str, text: str) -> FileRows:
    rows: list[Row] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        rows.append(_object(f"{name}:{number}", _json(name, line, number)))
        lines.append(number)
    return FileRows(name, rows, lines)


def _json_array(name: str, text: str) -> list[Row]:
    return [_object(f"{name}, row {number}", value) for number, value in enumerate(_json(name, text, 1), 1)]


def _object(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: is {kind_of(value)}; every row must be an object with named columns")
    return value


def _json(name: str, text: str, first_line: int) -> Any:
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


def _csv(name: str, text: str) -> FileRows:
    csv.field_size_limit(1 << 30)  # the default of 131,072 characters refuses long dialogues
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    lines: list[int] = []
    try:
        header = next(reader, [])
        if repeated := [column for column in dict.fromkeys(header) if header.count(column) > 1]:
            raise DataError(f'{name}:1: names the column "{repeated[0]}" twice; column names must differ')
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{name}:{reader.line_num}: has {len(fields)} fields where the header has {len(header)}; "
                    "put text with commas, quotes or line breaks in double quotes"
                )
            rows.append(dict(zip(header, fields, strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: is not valid CSV: {error}") from error
    return FileRows(name, rows, lines)


def _parquet(path: Path) -> list[Row]:
    name = shown(path)
    content = pa.BufferReader(_bytes(path, ".parquet"))
    try:
        return list(pq.ParquetFile(content).read().to_pylist())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: holds text that is not UTF-8; write the Parquet file again from UTF-8 text"
        ) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name}: is not Parquet data, or is damaged; copy or download the file again") from error


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
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
