"""The formats of preference data: detects the format of a source and parses its rows into prompts and answers."""

import json
import math
from collections.abc import Sequence
from enum import Enum
from itertools import combinations
from typing import Any, assert_never

from qlora_dpo.data.dialogue import (
    InvalidRow,
    Message,
    check_roles,
    differing_turn,
    is_hh,
    parse_hh,
    split_chats,
    split_hh,
)
from qlora_dpo.data.files import Row, json_type
from qlora_dpo.data.rows.messages import ROLE_NAMES, parse_messages
from qlora_dpo.data.rows.prompts import answer_text, parse_alpaca_prompt, parse_prompt, single_answer, with_system
from qlora_dpo.data.rows.supervised import PromptAndAnswers, parse_supervised


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
    SUPERVISED = "questions and answers (messages, prompt and completion, or instruction and output)"


ONE_ANSWER = (PreferenceFormat.UNPAIRED, PreferenceFormat.SUPERVISED)
"""The formats whose rows hold one answer to a prompt."""
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
    PreferenceFormat.MESSAGES: {},
    PreferenceFormat.CHATS: {"chosen": "a list", "rejected": "a list"},
    PreferenceFormat.SHAREGPT: {"conversations": "a list", "chosen": "an object", "rejected": "an object"},
    PreferenceFormat.ALPACA: {"instruction": "a string", "chosen": "a string", "rejected": "a string"},
    PreferenceFormat.RANKED: {"responses": "a list"},
    PreferenceFormat.UNPAIRED: {},
    PreferenceFormat.SUPERVISED: {},
}

LATER_TURNS = "turns behind the first difference left out"
UNSCORED = "an answer without a score left out"


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
            return PreferenceFormat.CHATS if _holds_prompt(chosen) else PreferenceFormat.MESSAGES
        case None, list(), list():
            return PreferenceFormat.CHATS
        case str(), list(chosen), list():
            return PreferenceFormat.CHATS if _holds_prompt(chosen) or not chosen else PreferenceFormat.MESSAGES
        case str() | list() as prompt, str() | list() as chosen, str() | list() as rejected:
            lists = [value for value in (prompt, chosen, rejected) if isinstance(value, list)]
            return PreferenceFormat.MESSAGES if all(map(_are_objects, lists)) else None
        case _:
            return None


def parse_row(
    format: PreferenceFormat,
    row: Row,
    repairs: list[str],
    *,
    every_pair: bool,
    from_difference: bool,
    last_only: bool = False,
    is_forced: bool = False,
) -> list[PromptAndAnswers]:
    """Prompt and two answers of a row, or several of them for ranked answers; raises InvalidRow for another format.

    The second answer of an unpaired or supervised row is empty. With `every_pair`, any two ranked answers of different
    rank make a pair; otherwise the best and the worst do. With `from_difference`, the answers of two chats are the
    first turns in which they differ. With `last_only`, the last answer of a supervised chat is read, otherwise all.
    With `is_forced`, the format is the recipe's, whatever a prompt looks like. What is read otherwise than it is
    written goes to `repairs`.
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
            if from_difference:
                return [_split_chats(parse_hh(row["chosen"]), parse_hh(row["rejected"]), repairs, from_difference)]
            return [split_hh(row["chosen"], row["rejected"])]
        case PreferenceFormat.HH_PROMPT:
            return [_parse_hh_prompt(row["prompt"], row["chosen"], row["rejected"])]
        case PreferenceFormat.STRINGS:
            if is_hh(row["prompt"]) and not is_forced:
                raise InvalidRow("prompt is marked as HH text, unlike the first row's")
            return [(with_system(row, ({"role": "user", "content": row["prompt"]},)), row["chosen"], row["rejected"])]
        case PreferenceFormat.MESSAGES:
            prompt = _as_messages(row, "prompt", "user", repairs)
            chosen, rejected = (_as_messages(row, column, "assistant", repairs) for column in ("chosen", "rejected"))
            if len(chosen) < 2 and len(rejected) < 2:
                return [(with_system(row, prompt), single_answer(chosen), single_answer(rejected))]
            if not from_difference and _roles(chosen) & _roles(rejected) == {"assistant"}:
                raise InvalidRow("answer holds more than one turn")
            prompt, better, worse = _split_chats((*prompt, *chosen), (*prompt, *rejected), repairs, from_difference)
            return [(with_system(row, prompt), better, worse)]
        case PreferenceFormat.CHATS:
            chosen, rejected = (parse_messages(row[column], column, repairs) for column in required)
            prompt, better, worse = _split_chats(chosen, rejected, repairs, from_difference)
            _check_prompt_column(row.get("prompt"), prompt)
            return [(with_system(row, prompt), better, worse)]
        case PreferenceFormat.SHAREGPT:
            prompt = parse_messages(row["conversations"], "conversations", repairs, is_sharegpt=True)
            better, worse = (
                single_answer(parse_messages([row[column]], column, repairs, is_sharegpt=True))
                for column in ("chosen", "rejected")
            )
            return [(with_system(row, prompt), better, worse)]
        case PreferenceFormat.ALPACA:
            return [(parse_alpaca_prompt(row), row["chosen"], row["rejected"])]
        case PreferenceFormat.RANKED:
            return _parse_ranked(row, every_pair, repairs)
        case PreferenceFormat.UNPAIRED:
            return [_parse_unpaired(row, repairs)]
        case PreferenceFormat.SUPERVISED:
            return parse_supervised(row, last_only, repairs)
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


def _holds_prompt(messages: Sequence[Any]) -> bool:
    """True if an answer's message list is a whole chat: it has a user turn, and an answer does not come first."""
    roles = [
        ROLE_NAMES.get(str(message.get("role") or message.get("from")).strip().casefold())
        for message in messages
        if isinstance(message, dict)
    ]
    return "user" in roles and roles[0] not in ("assistant", "tool")


def _are_objects(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _roles(messages: Sequence[Message]) -> set[str]:
    return {message["role"] for message in messages}


def _as_messages(row: Row, column: str, role: str, repairs: list[str]) -> tuple[Message, ...]:
    """The messages of a column; a string is one turn of `role`."""
    match row.get(column):
        case str(text):
            repairs.append(f"a string read as the {role}'s turn")
            return ({"role": role, "content": text},)
        case list(messages):
            return parse_messages(messages, column, repairs)
        case None:
            raise InvalidRow(f"{column} is null" if column in row else f"no column {column}")
        case other:
            raise InvalidRow(f"{column} is {json_type(other)}, not a list")


def _split_chats(
    chosen: Sequence[Message], rejected: Sequence[Message], repairs: list[str], from_difference: bool
) -> PromptAndAnswers:
    """Split two chats, and say so if turns are left out, or which key would read chats that part earlier."""
    place = differing_turn(chosen, rejected)
    is_earlier = 0 <= place < min(len(chosen), len(rejected)) - 1
    if is_earlier and not from_difference and chosen[place]["role"] == rejected[place]["role"] == "assistant":
        check_roles(chosen[:place])
        raise InvalidRow('chats part before their last answers; data.answer = "from_difference" compares where they do')
    pair = split_chats(chosen, rejected, from_difference)
    if from_difference and place + 1 < max(len(chosen), len(rejected)):
        repairs.append(LATER_TURNS)
    return pair


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


def _parse_ranked(row: Row, every_pair: bool, repairs: list[str]) -> list[PromptAndAnswers]:
    """The pairs of a better and a worse answer to one prompt."""
    prompt = parse_prompt(row.get("prompt"), row, repairs)
    if "scores" in row:
        order = _parse_scores(row["scores"], "scores", repairs)
    elif "ranks" in row:
        order = [-rank for rank in _parse_scores(row["ranks"], "ranks", repairs)]
    else:
        raise InvalidRow("neither scores nor ranks beside the responses")
    answers = [answer_text(response) for response in row["responses"]]
    if len(answers) != len(order):
        raise InvalidRow("another number of scores than of responses")
    scored = [(score, answer) for score, answer in zip(order, answers, strict=True) if not math.isnan(score)]
    if len(scored) < len(order):
        if len(scored) < 2:
            raise InvalidRow("fewer than two responses have a score that is a number")
        repairs.append(UNSCORED)
    ranked = sorted(scored, key=lambda scored: -scored[0])
    candidates = combinations(ranked, 2) if every_pair else [(ranked[0], ranked[-1])] if ranked else []
    pairs = [(prompt, better[1], worse[1]) for better, worse in candidates if better[0] > worse[0]]
    if not pairs:
        raise InvalidRow("no two responses of different rank")
    return pairs


def _parse_unpaired(row: Row, repairs: list[str]) -> PromptAndAnswers:
    """The prompt and the answer that the label rates."""
    if not isinstance(row.get("label"), bool):
        raise InvalidRow(f"label is {json_type(row.get('label'))}, not true or false")
    for column in ("messages", "conversations"):
        if isinstance(row.get(column), list):
            chat = parse_messages(row[column], column, repairs, is_sharegpt=column == "conversations")
            if not chat or chat[-1]["role"] != "assistant":
                raise InvalidRow("last turn is not the assistant's")
            return with_system(row, chat[:-1]), chat[-1]["content"], ""
    prompt = parse_prompt(row.get("prompt"), row, repairs)
    completion = row.get("completion")
    if isinstance(completion, list):
        return prompt, single_answer(parse_messages(completion, "completion", repairs)), ""
    return prompt, answer_text(completion), ""


def _parse_scores(values: Any, column: str, repairs: list[str]) -> list[float]:
    """Scores as numbers; NaN for one that is null or NaN."""
    if not isinstance(values, list):
        raise InvalidRow(f"{column} is no list of numbers")
    scores = list[float]()
    for value in values:
        try:
            scores.append(math.nan if value is None or value == "" else float(value))
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRow(f"{column} is no list of numbers") from error
    if any(isinstance(value, str) for value in values):
        repairs.append(f"{column} written as text read as numbers")
    return scores


def _check_prompt_column(column: Any, prompt: tuple[Message, ...]) -> None:
    """Raise InvalidRow unless a prompt beside whole chats is one of their user turns, or all of their prompt."""
    match column:
        case None:
            return
        case str():
            agrees = column in (turn["content"] for turn in prompt if turn["role"] == "user")
        case list():
            agrees = parse_messages(column, "prompt", []) == prompt
        case _:
            raise InvalidRow(f"prompt is {json_type(column)}, not a string or a list")
    if not agrees:
        raise InvalidRow("prompt column is not the prompt of the chats")
