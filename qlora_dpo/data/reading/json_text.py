"""Reads JSON text: one object a line, an array, pretty-printed objects, and whole tables as pandas writes them."""

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.reading.file_rows import FileRows, Row, count_of, json_type
from qlora_dpo.data.reading.json_tables import open_table
from qlora_dpo.data.reading.text_index import TextIndex
from qlora_dpo.errors import DataError

_BETWEEN_OBJECTS = re.compile(r"[\s,]*")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def read_json_text(name: str, index: TextIndex, is_json: bool, split: str) -> FileRows:
    """The rows of a JSON text; `is_json` is True for .json, which may be an array without a word.

    Raises DataError, and RecipeError if the text holds several splits and none is named `split`.
    """
    notes = []
    if index.comments:
        notes.append(f"{name}: {count_of(index.comments, 'comment line')} left out")
    if index.has_carriage_returns:
        notes.append(f"{name}: its lines end with a carriage return alone, as on old Macs; read as lines")
    count = len(index.numbers)
    if index.first == "[" and (is_json or count == 1 or not _is_complete(index.line(0))):
        rows, repeated = _read_whole(name, index.text())
        if not is_json:
            notes.append(f"{name}: is one JSON array of {count_of(len(rows), 'row')}, not JSON lines; read as an array")
        return FileRows(name, rows, None, notes=tuple(notes), repeated_keys=repeated.copy)
    if index.first == "{" and count > 1 and not index.is_object_lines and _is_pretty_printed(index):
        return _read_objects(name, index, notes, split)
    read = _read_json_lines(name, index, tuple(notes))
    return _read_table(read, index.line(0), split) if count == 1 and index.first == "{" else read


def _is_pretty_printed(index: TextIndex) -> bool:
    """True if objects seem to go over several lines."""
    return index.has_open_line or not _is_complete(index.line(0))


def _is_complete(line: str) -> bool:
    """True if the first line of `line` begins with a whole JSON value, or is invalid before its end."""
    text = line.partition("\n")[0].strip()
    try:
        _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        # a string cannot go over several lines, so a row that was cut off inside one is no beginning of an object
        return error.pos < len(text) or error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return True
    return True


def _read_json_lines(name: str, index: TextIndex, notes: tuple[str, ...]) -> FileRows:
    repeated: dict[int, str] = {}

    def make(row: int) -> Row:
        # up to the next line that is neither blank nor a comment
        text = index.line(row).partition("\n")[0]
        value = _parse(name, text, index.numbers[row])
        if type(value) is dict and text.count('":') != _count_keys(value) and (key := _repeated_key(text)):
            repeated[row + 1] = key
        return _require_object(f"{name}:{index.numbers[row]}", value)

    rows = LazySequence(len(index.numbers), make)
    return FileRows(name, rows, index.numbers, notes=notes, repeated_keys=repeated.copy)


def _read_objects(name: str, index: TextIndex, notes: list[str], split: str) -> FileRows:
    """Objects that go over several lines, one after another; a single one may be a whole table."""
    text, rows, lines = index.text(), list[Row](), array("q")
    repeated: dict[int, str] = {}
    line, counted_to = 1, 0
    for start, end, value in _decode_all(name, text):
        line += text.count("\n", counted_to, start)
        counted_to = start
        lines.append(line)
        rows.append(_require_object(f"{name}:{line}", value))
        part = text[start:end]
        if part.count('":') != _count_keys(value) and (key := _repeated_key(part)):
            repeated[len(rows)] = key
    if len(rows) > 1:
        form = "with commas between them" if len(rows) == len(index.numbers) else "over several lines each"
        notes.append(f"{name}: holds {count_of(len(rows), 'object')} {form}, not JSON lines; read one by one")
    read = FileRows(name, rows, lines, notes=tuple(notes), repeated_keys=repeated.copy)
    return _read_table(read, text, split) if len(rows) == 1 else read


def _read_table(read: FileRows, text: str, split: str) -> FileRows:
    """The rows of a file whose only value is an object: a table or a dictionary of splits, or else a single row."""
    value = read.rows[0]
    if text.count('":') != _count_keys(value):
        value = json.loads(text, object_pairs_hook=_RepeatedKeys.read)
    table = open_table(read.name, value, split)
    if table is None:
        return read
    rows = [_require_object(f"{read.name}, row {number}", row) for number, row in enumerate(table.rows, 1)]
    repeated = {number: key for number, row in enumerate(rows, 1) if (key := _first_repeated(row))}
    notes = (*read.notes, *table.notes)
    return FileRows(read.name, rows, None, notes=notes, has_splits=table.has_splits, repeated_keys=repeated.copy)


def _read_whole(name: str, text: str) -> tuple[list[Row], dict[int, str]]:
    """The rows of an array, and which of them have a key twice."""
    values = _parse(name, text, 1)
    rows = [_require_object(f"{name}, row {number}", value) for number, value in enumerate(values, 1)]
    if text.count('":') == _count_keys(rows):
        return rows, {}
    found = json.loads(text, object_pairs_hook=_RepeatedKeys.read)
    return rows, {number: key for number, row in enumerate(found, 1) if (key := _first_repeated(row))}


def _decode_all(name: str, text: str) -> Iterator[tuple[int, int, Any]]:
    """Start, end and value of each JSON value of `text`; raises DataError with the line of what is not valid."""
    place = _skip(text, 0)
    while place < len(text):
        try:
            value, end = _DECODER.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise _invalid(name, error, 1) from error
        except ValueError as error:
            raise DataError(f"{name}: is not valid JSON: {error}") from error
        except RecursionError as error:
            raise DataError(f"{name}: is nested too deeply to be a preference pair") from error
        yield place, end, value
        place = _skip(text, end)


def _skip(text: str, place: int) -> int:
    """The place behind white space and commas."""
    found = _BETWEEN_OBJECTS.match(text, place)
    return found.end() if found else place


def _require_object(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: is {json_type(value)}; every row must be an object with named columns")
    return value


def _parse(name: str, text: str, first_line: int) -> Any:
    """Parse JSON `text` whose first line is line `first_line` of the file."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _invalid(name, error, first_line) from error
    except ValueError as error:
        raise DataError(f"{name}:{first_line}: is not valid JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"{name}:{first_line}: is nested too deeply to be a preference pair") from error


def _invalid(name: str, error: json.JSONDecodeError, first_line: int) -> DataError:
    line = first_line + error.lineno - 1
    return DataError(f"{name}:{line}: is not valid JSON (column {error.colno}): {error.msg}")


def _count_keys(value: Any) -> int:
    """How many keys a JSON value has, in objects of any depth."""
    if type(value) is dict:
        count = len(value)
        for inner in value.values():
            if type(inner) in (dict, list):
                count += _count_keys(inner)
        return count
    return sum(_count_keys(inner) for inner in value if type(inner) in (dict, list))


class _RepeatedKeys(dict[str, Any]):
    """A JSON object that knows the first of its keys that stands twice in it."""

    repeated = ""

    @classmethod
    def read(cls, pairs: list[tuple[str, Any]]) -> "_RepeatedKeys":
        """The object of the keys and values that a JSON decoder found."""
        made = cls(pairs)
        if len(made) < len(pairs):
            made.repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return made


def _repeated_key(text: str) -> str:
    """A key that stands twice in one object of the JSON `text`; empty if there is none."""
    return _first_repeated(json.loads(text, object_pairs_hook=_RepeatedKeys.read))


def _first_repeated(value: Any) -> str:
    if isinstance(value, _RepeatedKeys):
        return value.repeated or next(filter(None, map(_first_repeated, value.values())), "")
    return next(filter(None, map(_first_repeated, value)), "") if isinstance(value, list) else ""
