"""Writes rows as JSON lines, which can be read again: what JSON does not have becomes null or text, and is counted."""

import base64
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any


@dataclass
class JsonRows:
    """Rows as JSON lines, and how many values are not written as they were."""

    text: str = ""
    not_finite: int = 0
    as_text: int = 0

    def notes(self) -> list[str]:
        """A sentence about each kind of values that changed."""
        notes = []
        if self.not_finite:
            notes.append(f"{self.not_finite:,} values that are not finite (NaN, infinity) are written as null")
        if self.as_text:
            notes.append(f"{self.as_text:,} values that JSON does not have (dates, bytes, ...) are written as text")
        return notes


def json_rows(rows: Iterable[Mapping[str, Any]]) -> JsonRows:
    """The rows as JSON lines."""
    written = JsonRows()
    lines = []
    for row in rows:
        value = {str(key): _json_value(inner, written) for key, inner in row.items()}
        line = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # half a surrogate pair has no bytes in UTF-8, only an escape
        lines.append(line if _is_encodable(line) else json.dumps(value, allow_nan=False))
    written.text = "".join(f"{line}\n" for line in lines)
    return written


def _json_value(value: Any, written: JsonRows) -> Any:
    """`value` as JSON has it; counts what changed in `written`."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if math.isfinite(value):
                return value
            written.not_finite += 1
            return None
        case Mapping():
            return {str(key): _json_value(inner, written) for key, inner in value.items()}
        case list() | tuple():
            return [_json_value(inner, written) for inner in value]
    written.as_text += 1
    match value:
        case datetime() | date() | time():
            return value.isoformat()
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return base64.b64encode(value).decode()
        case _:
            return str(value)


def _is_encodable(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True
