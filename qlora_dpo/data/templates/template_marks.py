"""Finds the marks that a tokenizer's own chat template writes around turns, so that text with them is recognised."""

import re
from typing import Any

from qlora_dpo.data.dialogue import Message
from qlora_dpo.data.rows.rendered import END_MARKS, MarkFamily
from qlora_dpo.data.templates.chat_template import TEMPLATE_ERRORS, Chat, control_tokens, render_chats
from qlora_dpo.data.templates.template_limits import LimitExceeded

_SYSTEM, _QUESTION, _ANSWER, _NEXT = "Xsystem", "Xquestion", "Xanswer", "Xnext"
"""Texts that no template writes by itself."""


def find_own_marks(tokenizer: Any) -> MarkFamily:
    """The marks of `tokenizer`'s chat template and its end-of-sequence token, found by rendering three chats.

    A template that does not write its turns one after another, or writes nothing around them, has no marks of turns.
    """
    control = [token for token in control_tokens(tokenizer).values() if token.strip()]
    turns, ends = _find_turn_marks(tokenizer)
    eos = [tokenizer.eos_token] if tokenizer.eos_token else []
    ends = [end for end in dict.fromkeys([*ends, *eos]) if any(token in end for token in control)]
    is_control = all(any(token in mark for token in control) for mark in turns.values())
    pattern = "|".join(f"(?P<{role}>{_flexible(mark)})" for role, mark in turns.items())
    bos = f"(?:{re.escape(tokenizer.bos_token)})?" if tokenizer.bos_token else ""
    return MarkFamily(
        "the model's own",
        re.compile(pattern or "(?!)"),
        re.compile(rf"\s*{bos}\s*"),
        is_control=is_control,
        trims=not is_control,
        ends=(*ends, *(end for end in END_MARKS if end not in ends)),
    )


def _find_turn_marks(tokenizer: Any) -> tuple[dict[str, str], list[str]]:
    """What begins a turn of each role, and what ends turns; empty if that cannot be told."""
    question: Message = {"role": "user", "content": _QUESTION}
    chat = [question, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    pieces = _render_pieces(tokenizer, chat)
    if pieces is None:
        return {}, []
    before, between, after, _ = pieces
    user = _common_suffix(before, after)
    answer_end = after.removesuffix(user).strip()
    shared_end = answer_end if answer_end and between.startswith(answer_end) else ""
    marks = {"user": user.strip(), "assistant": between.removeprefix(shared_end).strip()}
    ends = [answer_end]
    system = _render_pieces(tokenizer, [{"role": "system", "content": _SYSTEM}, question])
    if system is not None and system[1].endswith(user):
        ends.append(system[1].removesuffix(user).strip())
        marks["system"] = system[0].strip().removeprefix(tokenizer.bos_token or "").strip()
    if not marks["user"] or not marks["assistant"]:
        return {}, []
    return {role: mark for role, mark in marks.items() if mark}, [end for end in ends if end]


def _render_pieces(tokenizer: Any, chat: Chat) -> list[str] | None:
    """What stands before, between and after the texts of a chat; None if they are not all there, in their order."""
    try:
        (text,) = render_chats(tokenizer, [chat], answered=True)
    except (*TEMPLATE_ERRORS, LimitExceeded):
        return None
    contents = [message["content"] for message in chat]
    pieces = re.split("|".join(contents), text)
    return pieces if re.findall("|".join(contents), text) == contents else None


def _common_suffix(one: str, other: str) -> str:
    return next((one[start:] for start in range(len(one)) if other.endswith(one[start:])), "")


def _flexible(mark: str) -> str:
    """A pattern of a mark and of the spaces and the one line break that may follow it."""
    return re.escape(mark) + r"[ \t]*\n?"
