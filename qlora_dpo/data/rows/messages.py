"""Reads turns as people write them: roles by other names, from and value, text in parts, lists that are text."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from qlora_dpo.data.dialogue import InvalidRow, Message, is_blank, sanitize_text
from qlora_dpo.data.files import json_type

MESSAGE_ROLES = ("system", "user", "assistant")
"""The roles that messages name; a template may also know tool turns."""
ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""The names that people give to roles, in small letters; a call to a tool is a turn of the assistant's."""
SHAREGPT_ROLES = ("human", "user", "gpt", "assistant", "system")
"""The names of ShareGPT's roles, which need no word in the audit."""

TEXT_PARTS = ("text", "input_text", "output_text")
MEDIA_COLUMNS = {
    "image": "a picture",
    "images": "pictures",
    "image_url": "a picture",
    "image_urls": "pictures",
    "image_path": "a picture",
    "image_paths": "pictures",
    "pixel_values": "a picture",
    "video": "a video",
    "videos": "videos",
    "audio": "sound",
    "audios": "sound",
}
"""Columns and keys that hold what no text model reads."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of the thoughts before an answer, which are written into it as templates that know thoughts write them."""
CALL_KEYS = ("tool_calls", "function_call")

PARTS_READ = "content in parts read as text"
FROM_VALUE_READ = "turns of from and value read as messages"
EMPTY_SYSTEM = "empty system turn left out"

_NUMPY_GAP = re.compile(r"\}\s*\n\s*\{")


def parse_messages(value: list[Any], column: str, repairs: list[str], is_sharegpt: bool = False) -> tuple[Message, ...]:
    """Role and content of each message of a list; what is read otherwise than it is written goes to `repairs`.

    An empty system turn is left out. With `is_sharegpt`, turns of `from` and `value` are as they should be. Raises
    InvalidRow for whatever is no turn of text.
    """
    name = f"a message of {column}"
    messages = [parse_message(message, name, repairs, is_sharegpt) for message in value]
    if not any(turn["role"] == "system" and is_blank(turn["content"]) for turn in messages):
        return tuple(messages)
    repairs.append(EMPTY_SYSTEM)
    return tuple(turn for turn in messages if turn["role"] != "system" or not is_blank(turn["content"]))


def parse_message(value: Any, name: str, repairs: list[str], is_sharegpt: bool = False) -> Message:
    """One message; `name` is what a reason calls it."""
    match value:
        case {"role": ("system" | "user" | "assistant") as plain_role, "content": str(text)} if len(value) == 2:
            return {"role": plain_role, "content": text}  # as nearly all are
    if not isinstance(value, dict):
        keys = "from and value" if is_sharegpt else "role and content"
        raise InvalidRow(f"{name} is {json_type(value)}, not an object with {keys}")
    check_unread_keys(value, name)
    role_key, content_key = _find_key(value, ("role", "from")), _find_key(value, ("content", "value"))
    role = value.get(role_key)
    if not isinstance(role, str):
        raise InvalidRow(f"{name} {_wrong(value, role_key)}")
    content = value.get(content_key)
    if isinstance(content, list | dict):
        content = _join_parts(content if isinstance(content, list) else [content], name)
        repairs.append(PARTS_READ)
    if not isinstance(content, str):
        raise InvalidRow(f"{name} {_wrong(value, content_key)}")
    known = ROLE_NAMES.get(role.strip().casefold())
    key = next((key for key in REASONING_KEYS if _holds_something(value.get(key))), None)
    if key is not None and known not in ("assistant", None):
        raise InvalidRow(f"{name} has {key}, and is not the assistant's; write it into its content, or leave it out")
    if key is not None:
        content = f"<think>\n{value[key].strip()}\n</think>\n\n{content.lstrip()}"
        repairs.append(f"{key} written before its answer, as a <think> block")
    if known is None:
        raise InvalidRow(
            f'{name} has the role "{sanitize_text(role)[:20]}", which is none of {", ".join(MESSAGE_ROLES)}'
        )
    if not is_sharegpt and (role_key, content_key) != ("role", "content"):
        repairs.append(FROM_VALUE_READ)
    elif role != known and not (is_sharegpt and role in SHAREGPT_ROLES):
        repairs.append(f'role "{sanitize_text(role.strip())}" read as {known}')
    return {"role": known, "content": content}


def check_unread_keys(values: Mapping[str, Any], name: str) -> None:
    """Raise InvalidRow if a message holds what is neither trained on nor may be left out: thoughts, calls, pictures."""
    for key in values.keys() & _UNREAD_KEYS:
        content = values[key]
        if not _holds_something(content):
            continue
        if key in MEDIA_COLUMNS:
            raise InvalidRow(f"{name} has {key}: {MEDIA_COLUMNS[key]} beside the text, which no text model is shown")
        if key in CALL_KEYS:
            raise InvalidRow(f"{name} has {key}, which are not passed on; write the calls into its content")
        if not isinstance(content, str):
            raise InvalidRow(f"{name} has {json_type(content)} as its {key}, not a string")


_MEDIA_NAMES = frozenset(MEDIA_COLUMNS)
_UNREAD_COLUMNS = _MEDIA_NAMES | {"reasoning_content", "tool_calls"}
_UNREAD_KEYS = {*MEDIA_COLUMNS, *REASONING_KEYS, *CALL_KEYS}


def check_unread_columns(row: Mapping[str, Any]) -> None:
    """Raise InvalidRow if a row has pictures, videos or sound, thoughts or calls beside its text."""
    if _UNREAD_COLUMNS.isdisjoint(row):
        return
    for column in ("reasoning_content", "tool_calls"):
        if _holds_something(row.get(column)):
            raise InvalidRow(f"{column}: is not trained on; write it into the answers, or leave the column out")
    for column in row.keys() & _MEDIA_NAMES:
        if _holds_something(row[column]):
            raise InvalidRow(
                f"{column}: {MEDIA_COLUMNS[column]} beside the text, which no text model is shown; leave the row out, "
                "or the column if the text says all"
            )


def parse_list_text(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that `text` is in JSON, in Python or as NumPy prints one; None for any other text."""
    text = text.strip()
    text = text.removeprefix("array(").removesuffix(", dtype=object)") if text.startswith("array(") else text
    if (text[:1], text[-1:]) not in (("[", "]"), ("{", "}"), ('"', '"')):
        return None
    for read in (json.loads, _parse_python, _parse_numpy):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, str) and len(value) < len(text):
            return parse_list_text(value)  # written as text twice
        return value if isinstance(value, list | dict) else None
    return None


def is_message(value: Any) -> bool:
    """True if a value is an object with a role and a content, by whatever names."""
    return isinstance(value, dict) and ("role" in value or "from" in value) and ("content" in value or "value" in value)


def _parse_python(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes that Python does not know
        return ast.literal_eval(text)


def _parse_numpy(text: str) -> Any:
    # inside quotes a line break is written \n, so a real one stands between two elements
    return _parse_python(_NUMPY_GAP.sub("}, {", text))


def _find_key(value: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of `names` that has a value, else the first that is there, else the first."""
    present = [name for name in names if name in value]
    return next((name for name in present if value[name] is not None), (present or list(names))[0])


def _wrong(value: Mapping[str, Any], key: str) -> str:
    return f"has {json_type(value[key])} as its {key}" if key in value else f"has no {key}"


def _join_parts(parts: list[Any], name: str) -> str:
    """The text of a content that is a list of parts."""
    texts = list[str]()
    for part in parts:
        match part:
            case str():
                texts.append(part)
            case {"text": str(text)} if part.get("type") in (None, *TEXT_PARTS):
                texts.append(text)
            case {"type": str(kind)} if kind not in TEXT_PARTS:
                raise InvalidRow(f'{name} holds a part of the type "{sanitize_text(kind)[:20]}", which is no text')
            case _:
                raise InvalidRow(f"{name} has a list as its content whose parts are no text")
    return "".join(texts)


def _holds_something(value: Any) -> bool:
    """False for null, and for a text, list or object without content."""
    if isinstance(value, str):
        return bool(value.strip()) and value.strip() not in ("[]", "null", "None")
    if isinstance(value, list | dict):
        return any(map(_holds_something, value.values() if isinstance(value, dict) else value))
    return value is not None and value is not False and value == value  # NaN is nothing
