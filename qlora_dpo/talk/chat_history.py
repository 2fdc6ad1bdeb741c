"""The last conversation on disk, so that `chat -c` continues it, and the input history for the arrow keys."""

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
    """The last conversation: its model, the system prompt and the messages."""

    model: str
    system: str | None
    messages: list[Message]


def input_history_file() -> Path:
    """The file with the lines that were typed in chats."""
    return cache_home() / "chat_lines"


def _chat_file() -> Path:
    return cache_home() / "last_chat.json"


def save_chat(conversation: Conversation) -> None:
    """Write the conversation, readable only by its owner; disk errors are ignored, so that the chat goes on."""
    value = {"model": conversation.target, "system": conversation.system, "messages": conversation.messages}
    with suppress(OSError):
        _chat_file().parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".last_chat.", dir=_chat_file().parent)  # mode 600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(value, file, ensure_ascii=False)
            Path(temporary).replace(_chat_file())
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def load_chat() -> SavedChat:
    """The last conversation; raises RecipeError if there is none or it is damaged."""
    try:
        value: Any = json.loads(_chat_file().read_text(encoding="utf-8"))
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
    return RecipeError(f"-c: {_chat_file()} is damaged; leave -c out to begin a new conversation")


def _is_chat(messages: list[Any]) -> bool:
    """True if the messages are well formed and user and assistant alternate."""
    well_formed = all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
        for message in messages
    )
    try:
        check_roles([*messages, {"role": "user", "content": "?"}] if well_formed else [])
    except InvalidRow:
        return False
    return messages[:1] == [] or messages[0]["role"] == "user"
