"""Conversation turns: parses HH text into messages, and makes text safe to show on a terminal."""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

Message = dict[str, str]
"""One turn: `role` is system, user, assistant or tool; `content` is its text."""

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
_UNSEEN_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")
_TAGS = range(0xE0000, 0xE0080)
_ROLE_LETTERS = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}
_PROMPT_ROLES = re.compile(r"s?u(?:a(?:t+a)*u)*(?:at+)*")
"""The roles of a prompt: tools answer the assistant, before it or the user goes on."""


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


def split_hh(chosen: str, rejected: str, from_difference: bool = False) -> "SplitChats":
    """Split two whole HH dialogues into their common prompt and the two last replies.

    The prompt ends at the last Assistant marker, and all turns before it must be equal. The common character prefix is
    not used, because replies often begin alike. Raises InvalidRow with the reason if this is impossible.
    """
    return split_chats(parse_hh(chosen), parse_hh(rejected), from_difference)


SplitChats = tuple[tuple[Message, ...], str, str]
"""A common prompt and two answers."""


def split_chats(chosen: Sequence[Message], rejected: Sequence[Message], from_difference: bool = False) -> SplitChats:
    """Split two whole chats into their common prompt and the two last replies; raises InvalidRow with the reason.

    With `from_difference`, the answers are the first replies that differ, and what follows them is left out.
    """
    if from_difference:
        parted = differing_turn(chosen, rejected)
        chosen, rejected = chosen[: parted + 1], rejected[: parted + 1]
    for chat in (chosen, rejected):
        if not chat or chat[-1]["role"] != "assistant":
            raise InvalidRow("last turn is not the assistant's")
        check_roles(chat[:-1])
    if list(chosen[:-1]) != list(rejected[:-1]):
        raise InvalidRow("prompts differ")
    return tuple(chosen[:-1]), chosen[-1]["content"], rejected[-1]["content"]


def differing_turn(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """The number of the first turn in which two chats differ, from 0; of their last common one if none differs."""
    turns = enumerate(zip(chosen, rejected, strict=False))
    return next((place for place, (one, other) in turns if one != other), min(len(chosen), len(rejected)) - 1)


def check_roles(prompt: Sequence[Message]) -> None:
    """Raise InvalidRow unless `prompt` is an optional system turn, then user and assistant turns, a user turn last.

    Tool turns may stand after an assistant turn, and be the last ones.
    """
    if reason := _wrong_roles(tuple([turn["role"] for turn in prompt])):
        raise InvalidRow(reason)


@lru_cache(maxsize=256)
def _wrong_roles(roles: tuple[str, ...]) -> str:
    """Why these are no roles of a prompt; empty if they are."""
    letters = "".join(_ROLE_LETTERS.get(role, "?") for role in roles)
    if not letters.removeprefix("s"):
        return "no user turn before the answer"
    return "" if _PROMPT_ROLES.fullmatch(letters) else "roles do not alternate"


def is_blank(text: str) -> bool:
    """True if `text` shows nothing: it is white space, control characters and characters without width.

    A character that Python's Unicode tables do not know yet is text.
    """
    return not any(letter.isprintable() and not letter.isspace() for letter in text) and not any(
        unicodedata.category(letter) not in _UNSEEN_CATEGORIES and ord(letter) not in _TAGS for letter in text
    )


def sanitize_text(text: str) -> str:
    r"""Return `text` without anything that could control a terminal: escape sequences, control characters other than
    \n and \t (C0, DEL and C1), marks that reorder text from right to left, and characters without width. Half surrogate
    pairs become U+FFFD.
    """
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", _ESCAPES.sub("", text)))
