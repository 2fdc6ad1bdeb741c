"""The formats of preference data: detects the format of a source and parses its rows into prompts and answers."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import combinations
from typing import Any, assert_never

from qlora_dpo.data.dialogue import (
    InvalidRow,
    Message,
    check_roles,
    is_hh,
    parse_hh,
    sanitize_text,
    split_chats,
    split_hh,
)
from qlora_dpo.data.files import Row, json_type
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.errors import DataError

MESSAGE_ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class PreferenceFormat(Enum):
    """The supported formats of preference data, in the words of messages and tables."""

    HH = "HH dialogues (chosen and rejected strings that hold the whole dialogue)"
    HH_PROMPT = "HH prompts (prompt, chosen and rejected strings, the prompt marked with Human and Assistant)"
    STRINGS = "strings (prompt, chosen and rejected)"
    MESSAGES = "message lists (prompt, chosen and rejected)"
    CHATS = "whole chats (chosen and rejected message lists that hold the prompt)"
    SHAREGPT = "ShareGPT (conversations of from and value, chosen and rejected)"
    ALPACA = "Alpaca (instruction, input, chosen and rejected strings)"
    RANKED = "ranked answers (prompt, responses, and scores or ranks)"
    UNPAIRED = "unpaired answers (messages, or prompt and completion, and a label)"


FORMATS_BY_NAME = {format.name.lower(): format for format in PreferenceFormat}
"""Formats by their names in data.format."""

SUPPORTED_FORMATS = (
    'understood are "chosen" and "rejected" as whole HH dialogues, as strings beside a "prompt" string, as message '
    'lists beside a "prompt" list, as message lists that hold the whole chat, beside "conversations" (ShareGPT) or an '
    '"instruction" (Alpaca), and "responses" with "scores" or "ranks", and answers with a "label"; data.columns renames'
)

REQUIRED_COLUMNS = {
    PreferenceFormat.HH: {"chosen": "a string", "rejected": "a string"},
    PreferenceFormat.HH_PROMPT: {"prompt": "a string", "chosen": "a string", "rejected": "a string"},
    PreferenceFormat.STRINGS: {"prompt": "a string", "chosen": "a string", "rejected": "a string"},
    PreferenceFormat.MESSAGES: {"prompt": "a list", "chosen": "a list", "rejected": "a list"},
    PreferenceFormat.CHATS: {"chosen": "a list", "rejected": "a list"},
    PreferenceFormat.SHAREGPT: {"conversations": "a list", "chosen": "an object", "rejected": "an object"},
    PreferenceFormat.ALPACA: {"instruction": "a string", "chosen": "a string", "rejected": "a string"},
    PreferenceFormat.RANKED: {"responses": "a list"},
    PreferenceFormat.UNPAIRED: {},
}

PromptAndAnswers = tuple[tuple[Message, ...], str, str]
"""A prompt and two answers."""


def detect_format(rows: SourceRows) -> PreferenceFormat:
    """The format of the first row that has one; raises DataError, about the first row with answers, if none has."""
    for row in rows.rows:
        if format := detect_row_format(row):
            return format
    first = next((row for row in rows.rows if not {"chosen", "rejected"} <= row.keys() or _has_answers(row)), None)
    if first is None:
        raise DataError(f'{rows.name}: "chosen" or "rejected" is null in every row')
    _check_answer_columns(first, rows.name)
    kinds = json_type(first.get("prompt")), json_type(first["chosen"]), json_type(first["rejected"])
    if kinds == ("null", "a string", "a string"):
        raise DataError(
            f'{rows.name}: "chosen" and "rejected" are strings without "\\n\\nHuman:" and "\\n\\nAssistant:" '
            f'turns, and there is no "prompt"; it has the columns {list_columns(first)}; {SUPPORTED_FORMATS}'
        )
    prompt = f'"prompt" is {kinds[0]}' if "prompt" in first else 'there is no "prompt"'
    raise DataError(
        f'{rows.location(rows.rows.index(first) + 1)}: {prompt}, "chosen" is {kinds[1]} and "rejected" is {kinds[2]}; '
        f"it has the columns {list_columns(first)}; {SUPPORTED_FORMATS}"
    )


def detect_row_format(row: Row) -> PreferenceFormat | None:
    """The format of a row by the names and types of its columns; None if it is not supported."""
    if isinstance(row.get("label"), bool) and "chosen" not in row:
        return PreferenceFormat.UNPAIRED
    if isinstance(row.get("responses"), list):
        return PreferenceFormat.RANKED
    if isinstance(row.get("conversations"), list) and isinstance(row.get("chosen"), dict):
        return PreferenceFormat.SHAREGPT
    match row.get("prompt"), row.get("chosen"), row.get("rejected"):
        case None, str(chosen), str(rejected) if is_hh(chosen) or is_hh(rejected):
            return PreferenceFormat.HH
        case None, str(), str() if isinstance(row.get("instruction"), str):
            return PreferenceFormat.ALPACA
        case str(prompt), str(), str():
            return PreferenceFormat.HH_PROMPT if is_hh(prompt) else PreferenceFormat.STRINGS
        case list(), list(chosen), list():
            return PreferenceFormat.CHATS if _has_user_turn(chosen) else PreferenceFormat.MESSAGES
        case None | str(), list(), list():
            return PreferenceFormat.CHATS
        case _:
            return None


def parse_row(format: PreferenceFormat, row: Row, every_pair: bool) -> list[PromptAndAnswers]:
    """Prompt and two answers of a row, or several of them for ranked answers; raises InvalidRow for another format.

    The second answer of an unpaired row is empty. With `every_pair`, any two ranked answers of different rank make a
    pair; otherwise the best and the worst do.
    """
    required = REQUIRED_COLUMNS[format]
    for column, kind in required.items():
        if column not in row:
            raise InvalidRow(f"no column {column}")
        if (column_type := json_type(row[column])) != kind:
            raise InvalidRow(f"{column} is null" if column_type == "null" else f"{column} is {column_type}, not {kind}")
    match format:
        case PreferenceFormat.HH:
            if row.get("prompt") is not None:
                raise InvalidRow("a prompt beside whole HH dialogues")
            return [split_hh(row["chosen"], row["rejected"])]
        case PreferenceFormat.HH_PROMPT:
            return [_parse_hh_prompt(row["prompt"], row["chosen"], row["rejected"])]
        case PreferenceFormat.STRINGS:
            if is_hh(row["prompt"]):
                raise InvalidRow("prompt is marked as HH text, unlike the first row's")
            return [(_with_system(row, ({"role": "user", "content": row["prompt"]},)), row["chosen"], row["rejected"])]
        case PreferenceFormat.MESSAGES:
            prompt, chosen, rejected = (_parse_messages(row[column], column) for column in required)
            return [(_with_system(row, prompt), _single_answer(chosen), _single_answer(rejected))]
        case PreferenceFormat.CHATS:
            chosen, rejected = (_parse_messages(row[column], column) for column in required)
            prompt, better, worse = split_chats(chosen, rejected)
            _check_prompt_column(row.get("prompt"), prompt)
            return [(_with_system(row, prompt), better, worse)]
        case PreferenceFormat.SHAREGPT:
            prompt = _parse_messages(row["conversations"], "conversations", _parse_sharegpt)
            better, worse = (
                _single_answer(_parse_messages([row[column]], column, _parse_sharegpt))
                for column in ("chosen", "rejected")
            )
            return [(_with_system(row, prompt), better, worse)]
        case PreferenceFormat.ALPACA:
            return [(_parse_alpaca_prompt(row), row["chosen"], row["rejected"])]
        case PreferenceFormat.RANKED:
            return _parse_ranked(row, every_pair)
        case PreferenceFormat.UNPAIRED:
            return [_parse_unpaired(row)]
        case _:
            assert_never(format)


def parse_tools(row: Row) -> str:
    """The `tools` column, a list of JSON schemas or its JSON text, as JSON text; empty if there are none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise InvalidRow("tools is a string that is no JSON") from error
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRow("tools is no list of JSON schemas")
    return json.dumps(tools, ensure_ascii=False)


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """`row` with its columns renamed as `data.columns` says."""
    return {**row, **{name: row[column] for name, column in columns.items() if column in row}} if columns else row


def list_columns(row: Row) -> str:
    """The columns of a row for messages: the first twelve, up to 40 characters of each."""
    names = [sanitize_text(str(column))[:40] for column in row]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def _has_answers(row: Row) -> bool:
    return row["chosen"] is not None and row["rejected"] is not None


def _has_user_turn(messages: Sequence[Any]) -> bool:
    return any(isinstance(message, dict) and message.get("role") == "user" for message in messages)


def _check_answer_columns(row: Row, place: str) -> None:
    """Raise DataError if an answer column is missing, and suggest a column with a similar name."""
    for column in ("chosen", "rejected"):
        if column in row:
            continue
        others = [str(other) for other in row if other not in ("prompt", "chosen", "rejected")]
        close = difflib.get_close_matches(column, others, n=1)
        meant = sanitize_text(close[0]) if close else ""
        hint = f'set data.columns = {{ {column} = "{meant}" }} if "{meant}" is meant' if close else SUPPORTED_FORMATS
        raise DataError(f'{place}: has no column "{column}"; it has {list_columns(row)}; {hint}')


def _with_system(row: Row, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt, with the text of a `system` column before it unless it already begins with a system turn."""
    match row.get("system"):
        case None | "":
            return prompt
        case str(text):
            has_system = prompt[:1] and prompt[0]["role"] == "system"
            return prompt if has_system else ({"role": "system", "content": text}, *prompt)
        case other:
            raise InvalidRow(f"system is {json_type(other)}, not a string")


def _parse_hh_prompt(prompt: str, chosen: str, rejected: str) -> PromptAndAnswers:
    """A prompt that ends with an open Assistant marker, and two answers that follow one space."""
    turns = parse_hh(prompt)
    if turns[-1]["role"] != "assistant" or turns[-1]["content"].strip():
        raise InvalidRow("prompt does not end with an open Assistant turn")
    answers = [parse_hh("\n\nHuman: \n\nAssistant:" + answer) for answer in (chosen, rejected)]
    if any(len(turns) != 2 for turns in answers):
        raise InvalidRow("answer holds more than one turn")
    check_roles(turns[:-1])
    return tuple(turns[:-1]), answers[0][1]["content"], answers[1][1]["content"]


def _parse_alpaca_prompt(row: Row) -> tuple[Message, ...]:
    """The history, then the instruction with its input on a new line, joined as in LLaMA-Factory."""
    history = row.get("history") or []
    if not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history
    ):
        raise InvalidRow("history is no list of questions with answers")
    input_text = row.get("input")
    if input_text is not None and not isinstance(input_text, str):
        raise InvalidRow(f"input is {json_type(input_text)}, not a string")
    question = f"{row['instruction']}\n{input_text}" if input_text else row["instruction"]
    earlier = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns: list[Message] = [{"role": role, "content": text} for role, text in (*earlier, ("user", question))]
    return _with_system(row, tuple(turns))


def _parse_ranked(row: Row, every_pair: bool) -> list[PromptAndAnswers]:
    """The pairs of a better and a worse answer to one prompt."""
    prompt = _parse_prompt(row.get("prompt"), row)
    if "scores" in row:
        order = _parse_scores(row["scores"], "scores")
    elif "ranks" in row:
        order = [-rank for rank in _parse_scores(row["ranks"], "ranks")]
    else:
        raise InvalidRow("neither scores nor ranks beside the responses")
    answers = [_answer_text(response) for response in row["responses"]]
    if len(answers) != len(order):
        raise InvalidRow("another number of scores than of responses")
    ranked = sorted(zip(order, answers, strict=True), key=lambda scored: -scored[0])
    candidates = combinations(ranked, 2) if every_pair else [(ranked[0], ranked[-1])] if ranked else []
    pairs = [(prompt, better[1], worse[1]) for better, worse in candidates if better[0] > worse[0]]
    if not pairs:
        raise InvalidRow("no two responses of different rank")
    return pairs


def _parse_unpaired(row: Row) -> PromptAndAnswers:
    """The prompt and the answer that the label rates."""
    if not isinstance(row.get("label"), bool):
        raise InvalidRow(f"label is {json_type(row.get('label'))}, not true or false")
    for column, read in (("messages", _parse_message), ("conversations", _parse_sharegpt)):
        if isinstance(row.get(column), list):
            chat = _parse_messages(row[column], column, read)
            if not chat or chat[-1]["role"] != "assistant":
                raise InvalidRow("last turn is not the assistant's")
            return _with_system(row, chat[:-1]), chat[-1]["content"], ""
    prompt = _parse_prompt(row.get("prompt"), row)
    completion = row.get("completion")
    return (
        prompt,
        _single_answer(_parse_messages(completion, "completion"))
        if isinstance(completion, list)
        else (_answer_text(completion)),
        "",
    )


def _parse_prompt(prompt: Any, row: Row) -> tuple[Message, ...]:
    match prompt:
        case str():
            return _with_system(row, ({"role": "user", "content": prompt},))
        case list():
            return _with_system(row, _parse_messages(prompt, "prompt"))
        case _:
            raise InvalidRow(f"prompt is {json_type(prompt)}, not a string or a list")


def _answer_text(value: Any) -> str:
    match value:
        case str():
            return value
        case {"role": "assistant", "content": str(text)} | {"content": str(text)} | {"response": str(text)}:
            return text
        case _:
            raise InvalidRow(f"an answer is {json_type(value)}, not a string")


def _parse_scores(values: Any, column: str) -> list[float]:
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        raise InvalidRow(f"{column} is no list of numbers")
    return [float(value) for value in values]


MessageParser = Callable[[Any, str], Message]


def _parse_message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise InvalidRow(f"{name} is {json_type(value)}, not an object with role and content")
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            wrong = f"has {json_type(value[key])} as its {key}" if key in value else f"has no {key}"
            raise InvalidRow(f"{name} {wrong}")
    if value["role"] not in MESSAGE_ROLES:
        role = sanitize_text(value["role"])[:20]
        raise InvalidRow(f'{name} has the role "{role}", which is none of {", ".join(MESSAGE_ROLES)}')
    return {"role": value["role"], "content": value["content"]}


def _parse_sharegpt(value: Any, name: str) -> Message:
    """A message from a turn with the keys `from` and `value`."""
    if not isinstance(value, dict):
        raise InvalidRow(f"{name} is {json_type(value)}, not an object with from and value")
    for key in ("from", "value"):
        if not isinstance(value.get(key), str):
            raise InvalidRow(f"{name} has no {key} that is a string")
    if value["from"] not in SHAREGPT_ROLES:
        role = sanitize_text(value["from"])[:20]
        raise InvalidRow(f'{name} is from "{role}", which is none of {", ".join(SHAREGPT_ROLES)}')
    return {"role": SHAREGPT_ROLES[value["from"]], "content": value["value"]}


def _parse_messages(value: list[Any], column: str, read: MessageParser = _parse_message) -> tuple[Message, ...]:
    """Check a message list and keep the role and the content of each message."""
    return tuple(read(message, f"a message of {column}") for message in value)


def _single_answer(answer: tuple[Message, ...]) -> str:
    if len(answer) > 1:
        raise InvalidRow("answer holds more than one turn")
    if not answer or answer[0]["role"] != "assistant":
        raise InvalidRow("last turn is not the assistant's")
    return answer[0]["content"]


def _check_prompt_column(column: Any, prompt: tuple[Message, ...]) -> None:
    """Raise InvalidRow unless a prompt beside whole chats is one of their user turns, or all of their prompt."""
    match column:
        case None:
            return
        case str():
            agrees = column in (turn["content"] for turn in prompt if turn["role"] == "user")
        case list():
            agrees = _parse_messages(column, "prompt") == prompt
        case _:
            raise InvalidRow(f"prompt is {json_type(column)}, not a string or a list")
    if not agrees:
        raise InvalidRow("prompt column is not the prompt of the chats")
