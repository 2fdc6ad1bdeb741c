"""Finds out whether a chat template writes the turns of tools, which many leave out without a word."""

from functools import lru_cache
from typing import Any

from qlora_dpo.data.dialogue import Message
from qlora_dpo.data.templates.chat_template import TEMPLATE_ERRORS, render_chats
from qlora_dpo.data.templates.template_limits import LimitExceeded

NO_TOOL_TURNS = "the chat template leaves out tool turns"
"""The reason of a row, in the words of the audit table."""

_RESULT = "It is 8 in the morning."
_PROBE: list[Message] = [
    {"role": "user", "content": "Is it late?"},
    {"role": "assistant", "content": "I look at the clock."},
    {"role": "tool", "content": _RESULT},
]


def has_tool_turn(prompt: tuple[Message, ...]) -> bool:
    """True if one of the turns is a tool's."""
    return any(turn["role"] == "tool" for turn in prompt)


def writes_tool_turns(tokenizer: Any) -> bool:
    """False if the template leaves out what a tool said; True if it writes it, or refuses such chats itself."""
    return _writes_tool_turns(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _writes_tool_turns(tokenizer: Any, template: str) -> bool:
    try:
        return _RESULT in render_chats(tokenizer, [_PROBE], answered=False)[0]
    except (*TEMPLATE_ERRORS, LimitExceeded):
        return True
