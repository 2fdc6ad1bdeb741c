"""Recognises a JSON object that holds a whole table: a dictionary of splits, lists of columns, pandas' `to_json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.reading.file_rows import HEADER_COLUMNS, count_of
from qlora_dpo.errors import DataError, RecipeError

_MESSAGE_KEYS = {"role", "content", "from", "value", "text", "type"}


@dataclass(frozen=True)
class JsonTable:
    """The rows of a table, or of one of its splits, and what was recognised, a sentence each."""

    rows: Sequence[Any]
    notes: tuple[str, ...] = ()
    has_splits: bool = False


def open_table(name: str, value: Mapping[str, Any], split: str) -> JsonTable | None:
    """The rows of the table that an object is, or of its split `split`; None for an object that is itself a row.

    Raises RecipeError if the object holds several splits and none of that name, and DataError for a damaged table.
    """
    if (form := _table_form(value)) is not None:
        rows, described = _form_rows(name, value, form)
        return JsonTable(rows, (f"{name}: is {described}; read as {count_of(len(rows), 'row')}",))
    if _has_known_columns(value):
        return None
    splits = {key: part for key, part in value.items() if _is_split(part)}
    return _open_split(name, splits, len(value) - len(splits), split) if splits else None


def _table_form(value: Mapping[str, Any]) -> str | None:
    """Which table an object is: "split", "table", "columns", "index" or "lists"; None if it is none."""
    if {"columns", "data"} <= value.keys() <= {"columns", "index", "data"}:
        return "split" if isinstance(value["columns"], list) and isinstance(value["data"], list) else None
    if value.keys() == {"schema", "data"}:
        return "table" if isinstance(value["schema"], dict) and isinstance(value["data"], list) else None
    parts = list(value.values())
    if not parts:
        return None
    if all(isinstance(part, dict) and part for part in parts):
        keys = [set(part) for part in parts]
        if all(key.isdigit() for each in keys for key in each):
            holds_rows = any(isinstance(cell, dict) and _has_known_columns(cell) for cell in parts[0].values())
            return "columns" if keys.count(keys[0]) == len(keys) and not holds_rows else None
        if all(key.isdigit() for key in value):
            return "index"
        if _has_known_columns(value):
            is_table = keys.count(keys[0]) == len(keys) and not keys[0] & _MESSAGE_KEYS
            return "columns" if is_table else None
        return "index" if all(map(_has_known_columns, parts)) and not any(map(_is_lists, parts)) else None
    return "lists" if _is_lists(value) and _has_known_columns(value) else None


def _form_rows(name: str, value: Mapping[str, Any], form: str) -> tuple[list[Any], str]:
    """The rows of a table of that form, and its description."""
    match form:
        case "split":
            columns = value["columns"]
            for number, cells in enumerate(value["data"], 1):
                if not isinstance(cells, list) or len(cells) != len(columns):
                    count = len(cells) if isinstance(cells, list) else 0
                    raise DataError(f"{name}, row {number}: has {count} values where there are {len(columns)} columns")
            rows = [dict(zip(columns, cells, strict=True)) for cells in value["data"]]
            return rows, 'a table of columns and data, as pandas writes it with orient="split"'
        case "table":
            index = value["schema"].get("primaryKey") or []
            rows = [
                {key: cell for key, cell in row.items() if key not in index} if isinstance(row, dict) else row
                for row in value["data"]
            ]
            left = f", its index {', '.join(map(str, index))} left out" if index else ""
            return rows, f'a table with its schema, as pandas writes it with orient="table"{left}'
        case "columns":
            places = list(next(iter(value.values())))
            rows = [{column: cells[place] for column, cells in value.items()} for place in places]
            return rows, "a table of columns by row number, as pandas' to_json writes it"
        case "index":
            return list(value.values()), 'a table of rows by their index, as pandas writes it with orient="index"'
        case _:
            rows = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
            return rows, "a table with a list for each column"


def _open_split(name: str, splits: Mapping[str, Any], others: int, split: str) -> JsonTable:
    tables = {key: _split_rows(name, part) for key, part in splits.items()}
    counts = [f"{key} ({count_of(len(rows), 'row')})" for key, rows in tables.items()]
    beside = f"; {count_of(others, 'other key')} left out" if others else ""
    if len(tables) == 1:
        (key,) = tables
        return JsonTable(tables[key], (f'{name}: is an object that holds its rows under "{key}"{beside}',))
    chosen = split if split in tables else next((key for key in tables if key.casefold() == split.casefold()), None)
    if chosen is None:
        raise RecipeError(
            f'{name}: holds the splits {", ".join(counts)}, and none is called "{split}"; set data.train_split or '
            "data.eval_split to one of them"
        )
    note = f"{name}: holds the splits {', '.join(counts)}; {chosen} is read here, and data.train_split names another"
    return JsonTable(tables[chosen], (note + beside,), has_splits=True)


def _split_rows(name: str, part: Any) -> Sequence[Any]:
    return part if isinstance(part, list) else _form_rows(name, part, str(_table_form(part)))[0]


def _is_split(part: Any) -> bool:
    """True for a list of objects, or a table of its own."""
    if isinstance(part, list):
        return all(isinstance(row, dict) for row in part)
    return isinstance(part, dict) and _table_form(part) is not None


def _is_lists(value: Mapping[str, Any]) -> bool:
    """True for lists of one length that are columns: message lists, which are one row, hold objects alone."""
    parts = list(value.values())
    if not parts or not all(isinstance(part, list) for part in parts):
        return False
    length = len(parts[0])
    return (
        length > 1
        and all(len(part) == length for part in parts)
        and any(not isinstance(cell, dict) for part in parts for cell in part)
    )


def _has_known_columns(value: Mapping[str, Any]) -> bool:
    return any(str(key).strip().casefold() in HEADER_COLUMNS for key in value)
