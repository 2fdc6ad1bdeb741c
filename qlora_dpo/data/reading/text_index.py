"""Finds the lines of a text file without keeping them, and checks that it is UTF-8."""

import codecs
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from qlora_dpo.data.spool import Spool
from qlora_dpo.errors import DataError

COMMENT_MARKS = ("#", "//")
"""What a comment line begins with; no line of JSON does."""


@dataclass
class TextIndex:
    """The lines of a text that are neither blank nor comments."""

    content: Spool
    starts: "array[int]" = field(default_factory=lambda: array("q"))
    """Where each line starts, in bytes; the last one is the end of the text."""
    numbers: "array[int]" = field(default_factory=lambda: array("q"))
    """The number of each line, from 1."""
    first: str = ""
    """The first character that is not white space."""
    comments: int = 0
    """Comment lines."""
    has_carriage_returns: bool = False
    """True if lines end with a carriage return alone."""
    is_object_lines: bool = True
    """True if every line begins with { and ends with }."""
    has_open_line: bool = False
    """True if a line is a bracket alone, as in a pretty-printed object, or an object with a comma behind it."""

    def line(self, index: int) -> str:
        """Line `index` with all that follows it up to the next one that is neither blank nor a comment."""
        return self.content.read(self.starts[index], self.starts[index + 1]).decode()

    def text(self) -> str:
        """The whole text without its byte order mark, with comment lines emptied, so that line numbers stay."""
        self.content.file.seek(0)
        text: str = self.content.file.read().decode("utf-8-sig")
        return without_comments(text) if self.comments else text


def without_comments(text: str) -> str:
    """`text` with its comment lines emptied."""
    return "\n".join("" if line.lstrip().startswith(COMMENT_MARKS) else line for line in text.split("\n"))


def index_lines(name: str, content: Spool) -> TextIndex:
    """Index the lines of a JSON text; raises DataError for text that is not UTF-8.

    Lines that end with a carriage return alone are read as lines too.
    """
    index = _index(name, content)
    if not index.has_carriage_returns:
        return index
    unix = Spool()
    was_return = False
    content.file.seek(0)
    while block := content.file.read(2**20):
        start = b" " + block[1:] if was_return and block.startswith(b"\n") else block
        was_return = block.endswith(b"\r")
        unix.append(start.replace(b"\r\n", b" \n").replace(b"\r", b"\n"))  # as many bytes as before
    unix.file.seek(0)
    index = _index(name, unix)
    index.has_carriage_returns = True
    return index


def _index(name: str, content: Spool) -> TextIndex:
    index = TextIndex(content)
    place = 0
    for number, mark, line, text in _decoded_lines(name, content.file):
        start, place = place + mark, place + mark + len(line)
        if line.find(b"\r", 0, -2) >= 0:
            index.has_carriage_returns = True
        if text.isspace() or not text:
            continue
        if text[0] != "{" and text.lstrip().startswith(COMMENT_MARKS):
            index.comments += 1
            continue
        if not (text[0] == "{" and text.rstrip().endswith("}")):
            stripped = text.strip()
            index.is_object_lines = index.is_object_lines and stripped[0] == "{" and stripped[-1] == "}"
            index.has_open_line = index.has_open_line or stripped in ("{", "[") or stripped.endswith("},")
        index.first = index.first or text.lstrip()[0]
        index.starts.append(start)
        index.numbers.append(number)
    index.starts.append(place)
    return index


def check_utf8(name: str, content: Spool) -> None:
    """Raise DataError, with line and byte, for text that is not UTF-8."""
    for _ in _decoded_lines(name, content.file):
        pass
    content.file.seek(0)


def _decoded_lines(name: str, file: IO[bytes]) -> Iterator[tuple[int, int, bytes, str]]:
    """Number, length of the byte order mark, bytes and text of each line."""
    place = 0
    for number, line in enumerate(file, 1):
        mark = 0
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{name}: is UTF-16 text; save the file as UTF-8")
            mark = len(codecs.BOM_UTF8) if line.startswith(codecs.BOM_UTF8) else 0
            line = line[mark:]
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            # a line that ends with a carriage return alone is a line too
            at = number + line.replace(b"\r\n", b"\n").count(b"\r", 0, error.start)
            raise DataError(f"{name}:{at}: is not UTF-8 text (byte {place + error.start}); save it as UTF-8") from error
        place += len(line)
        yield number, mark, line, text
