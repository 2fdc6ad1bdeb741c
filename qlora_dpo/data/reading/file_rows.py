"""The rows of a data file, where each stands in it, and what is said of it once."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEADER_COLUMNS = frozenset(
    {
        *("prompt", "chosen", "rejected", "completion", "label", "messages", "conversations", "instruction", "input"),
        *("question", "query", "response", "responses", "output", "answer", "system", "history", "scores", "ranks"),
        *("response_a", "response_b", "response_1", "response_2", "rejected_response", "winner", "text"),
    }
)
"""Names of columns by which a header or the columns of a JSON object are told from data."""


logger = logging.getLogger(__name__)
_logged = set[tuple[Path, str]]()
"""Sentences that were logged, each with the current folder, to which the paths in it are relative."""


@dataclass(frozen=True)
class FileRows:
    """The rows of one file in order; `lines` holds the line number of each, from 1: its first, or in CSV its last.

    Rows of JSON lines are parsed when they are read, and may then raise DataError.
    """

    name: str
    rows: Sequence[Row]
    lines: Sequence[int] | None
    fingerprint: str = ""
    """SHA-256 of the file, and the split if it holds several; empty if unknown."""
    notes: tuple[str, ...] = ()
    """What was recognised in the file, a sentence each."""
    has_splits: bool = False
    """True if the file holds several splits, of which these rows are one."""
    repeated_keys: Callable[[], Mapping[int, str]] = dict
    """A key that stands twice in one object, by row number from 1, of the rows that were read so far."""

    def location(self, row: int) -> str:
        """The location of row `row`, from 1: `pairs.jsonl:17`, or `pairs.parquet, row 17` without lines."""
        return f"{self.name}, row {row}" if self.lines is None else f"{self.name}:{self.lines[row - 1]}"


def display_path(path: Path) -> str:
    """`path` as messages show it: relative if it is below the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


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


def count_of(count: int, thing: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def log_once(sentence: str) -> None:
    """Log a sentence about a file: a command reads a file several times, and says each sentence once."""
    if (Path.cwd(), sentence) not in _logged:
        logger.info(sentence)
        _logged.add((Path.cwd(), sentence))
