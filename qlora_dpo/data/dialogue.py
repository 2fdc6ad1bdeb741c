"""Conversation turns: parses HH text into messages, and makes text safe to show on a terminal."""

import re
from collections.abc import Sequence

Message = dict[str, str]
"""One turn: `role` is system, user or assistant; `content` is its text."""

HH_HUMAN = "\n\nHuman:"

_HH_MARKER = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}

_ESCAPES = re.compile(
    r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)"  # operating system commands: titles, links, clipboard
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x07\x1b\x9c\n]*(?:\x1b\\|\x9c)"  # device control and private strings
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # control sequences: colour, cursor, erase
    r"|\x1b[ -/]*[0-~]?"  # all other escapes
)
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but newline and tab, DEL, C1
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that reorder text
    r"\u00ad\u180e\u200b-\u200d\u2060-\u2064\ufeff\U000e0001\U000e0020-\U000e007f"  # no width: they hide words in words
    r"\u2028\u2029]"  # line ends other than newline
)
_SURROGATES = re.compile(r"[\ud800-\udfff]")


class InvalidRow(Exception):
    """A row that is not a preference pair; the text is the reason, in the words of the audit table."""


def is_hh(text: str) -> bool:
    """True if `text` begins with a Human turn as Anthropic's HH data marks it."""
    return text.startswith((HH_HUMAN, HH_HUMAN.lstrip()))


def parse_hh(text: str) -> list[Message]:
    r"""Parse "\n\nHuman: ...\n\nAssistant: ..." into messages.

    Exactly one space after a marker is part of the marker; all other white space is kept. The blank line before
    the first marker may be missing. Raises InvalidRow if the text does not begin with a Human turn.
    """
    if not is_hh(text):
        raise InvalidRow("no Human turn at the start")
    parts = _HH_MARKER.split(text if text.startswith("\n\n") else "\n\n" + text)
    return [
        {"role": _HH_ROLES[marker], "content": content.removeprefix(" ")}
        for marker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def split_hh(chosen: str, rejected: str) -> tuple[tuple[Message, ...], str, str]:
    """Split two whole HH dialogues into their common prompt and the two last replies.

    The prompt ends at the last Assistant marker, and all turns before it must be equal. The common character prefix is
    not used, because replies often begin alike. Raises InvalidRow with the reason if this is impossible.
    """
    return split_chats(parse_hh(chosen), parse_hh(rejected))


def split_chats(chosen: Sequence[Message], rejected: Sequence[Message]) -> tuple[tuple[Message, ...], str, str]:
    """Split two whole chats into their common prompt and the two last replies; raises InvalidRow with the reason."""
    for chat in (chosen, rejected):
        if not chat or chat[-1]["role"] != "assistant":
            raise InvalidRow("last turn is not the assistant's")
        check_roles(chat[:-1])
    if list(chosen[:-1]) != list(rejected[:-1]):
        raise InvalidRow("prompts differ")
    return tuple(chosen[:-1]), chosen[-1]["content"], rejected[-1]["content"]


def check_roles(prompt: Sequence[Message]) -> None:
    """Raise InvalidRow unless `prompt` is an optional system turn, then user and assistant turns, a user turn last."""
    roles = [turn["role"] for turn in prompt]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise InvalidRow("no user turn before the answer")
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise InvalidRow("roles do not alternate")


def sanitize_text(text: str) -> str:
    r"""Return `text` without anything that could control a terminal: escape sequences, control characters other than
    \n and \t (C0, DEL and C1), marks that reorder text from right to left, and characters without width. Half surrogate
    pairs become U+FFFD.
    """
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", _ESCAPES.sub("", text)))
