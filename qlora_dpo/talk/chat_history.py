"""The last conversation, kept so that `chat -c` goes on with it, and the lines that were typed, for the arrow keys."""

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.data.dialogue import InvalidRow, Message, check_roles
from qlora_dpo.errors import RecipeError
from qlora_dpo.files import cache_home
from qlora_dpo.talk.conversation import Conversation


@dataclass(frozen=True)
class SavedChat:
    """What is known of the last conversation: which model it was with, the system prompt, and what was said."""

    model: str
    system: str | None
    messages: list[Message]


def input_history_file() -> Path:
    """Where the lines that were typed in chats are kept."""
    return cache_home() / "chat_lines"


def _file() -> Path:
    return cache_home() / "last_chat.json"


def save_chat(conversation: Conversation) -> None:
    """Write the conversation, readable by its owner alone; a disk that refuses is no reason to end a chat."""
    value = {"model": conversation.target, "system": conversation.system, "messages": conversation.messages}
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".last_chat.", dir=_file().parent)  # mode 600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(value, file, ensure_ascii=False)
            Path(temporary).replace(_file())
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def load_chat() -> SavedChat:
    """The last conversation; raise RecipeError if there is none, or if it is damaged."""
    try:
        value: Any = json.loads(_file().read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError("-c: there is no conversation to go on with; leave -c out to begin one") from error
    except (OSError, ValueError) as error:
        raise _damaged() from error
    match value:
        case {"model": str(model), "system": None | str() as system, "messages": [*messages]} if _is_chat(messages):
            return SavedChat(model, system, messages)
        case _:
            raise _damaged()


def _damaged() -> RecipeError:
    return RecipeError(f"-c: {_file()} is damaged; leave -c out to begin a new conversation")


def _is_chat(messages: list[Any]) -> bool:
    """True for questions and answers in turn."""
    whole = all(
        isinstance(each, dict)
        and each.keys() == {"role", "content"}
        and all(isinstance(part, str) for part in each.values())
        for each in messages
    )
    try:
        check_roles([*messages, {"role": "user", "content": "?"}] if whole else [])
    except InvalidRow:
        return False
    return messages[:1] == [] or messages[0]["role"] == "user"
