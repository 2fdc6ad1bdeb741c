"""The shapes that preference data comes in, how one is recognised, and how a row of it becomes prompts and answers."""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import combinations
from typing import Any, assert_never

from qlora_dpo.data.dialogue import Message, Unusable, check_roles, is_hh, parse_hh, printable, split_chats, split_hh
from qlora_dpo.data.files import Row, kind_of
from qlora_dpo.data.sources import Rows
from qlora_dpo.errors import DataError

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Shape(Enum):
    """The shapes of preference data that are understood, in the words of messages and tables."""

    HH = "HH dialogues (chosen and rejected strings that hold the whole dialogue)"
    HH_PROMPT = "HH prompts (prompt, chosen and rejected strings, the prompt marked with Human and Assistant)"
    STRINGS = "strings (prompt, chosen and rejected)"
    MESSAGES = "message lists (prompt, chosen and rejected)"
    CHATS = "whole chats (chosen and rejected message lists that hold the prompt)"
    SHAREGPT = "ShareGPT (conversations of from and value, chosen and rejected)"
    ALPACA = "Alpaca (instruction, input, chosen and rejected strings)"
    RANKED = "ranked answers (prompt, responses, and scores or ranks)"
    UNPAIRED = "unpaired answers (messages, or prompt and completion, and a label)"


NAMES = {shape.name.lower(): shape for shape in Shape}
"""What data.format calls them."""

UNDERSTOOD = (
    'understood are "chosen" and "rejected" as whole HH dialogues, as strings beside a "prompt" string, as message '
    'lists beside a "prompt" list, as message lists that hold the whole chat, beside "conversations" (ShareGPT) or an '
    '"instruction" (Alpaca), and "responses" with "scores" or "ranks", and answers with a "label"; data.columns renames'
)

WANTED = {
    Shape.HH: {"chosen": "a string", "rejected": "a string"},
    Shape.HH_PROMPT: {"prompt": "a string", "chosen": "a string", "rejected": "a string"},
    Shape.STRINGS: {"prompt": "a string", "chosen": "a string", "rejected": "a string"},
    Shape.MESSAGES: {"prompt": "a list", "chosen": "a list", "rejected": "a list"},
    Shape.CHATS: {"chosen": "a list", "rejected": "a list"},
    Shape.SHAREGPT: {"conversations": "a list", "chosen": "an object", "rejected": "an object"},
    Shape.ALPACA: {"instruction": "a string", "chosen": "a string", "rejected": "a string"},
    Shape.RANKED: {"responses": "a list"},
    Shape.UNPAIRED: {},
}

Turns = tuple[tuple[Message, ...], str, str]
"""A prompt and two answers."""


def recognise(rows: Rows) -> Shape:
    """The shape of the first row that has one; raises DataError, about the first row with answers, if none has."""
    for row in rows.rows:
        if shape := shape_of(row):
            return shape
    first = next((row for row in rows.rows if not {"chosen", "rejected"} <= row.keys() or _answered(row)), None)
    if first is None:
        raise DataError(f'{rows.name}: "chosen" or "rejected" is null in every row')
    _columns(first, rows.name)
    kinds = kind_of(first.get("prompt")), kind_of(first["chosen"]), kind_of(first["rejected"])
    if kinds == ("null", "a string", "a string"):
        raise DataError(
            f'{rows.name}: "chosen" and "rejected" are strings without "\\n\\nHuman:" and "\\n\\nAssistant:" '
            f'turns, and there is no "prompt"; it has the columns {named(first)}; {UNDERSTOOD}'
        )
    prompt = f'"prompt" is {kinds[0]}' if "prompt" in first else 'there is no "prompt"'
    raise DataError(
        f'{rows.place(rows.rows.index(first) + 1)}: {prompt}, "chosen" is {kinds[1]} and "rejected" is {kinds[2]}; '
        f"it has the columns {named(first)}; {UNDERSTOOD}"
    )


def shape_of(row: Row) -> Shape | None:
    """The shape of a row by the names and types of its columns; None if it has none that is understood."""
    if isinstance(row.get("label"), bool) and "chosen" not in row:
        return Shape.UNPAIRED
    if isinstance(row.get("responses"), list):
        return Shape.RANKED
    if isinstance(row.get("conversations"), list) and isinstance(row.get("chosen"), dict):
        return Shape.SHAREGPT
    match row.get("prompt"), row.get("chosen"), row.get("rejected"):
        case None, str(chosen), str(rejected) if is_hh(chosen) or is_hh(rejected):
            return Shape.HH
        case None, str(), str() if isinstance(row.get("instruction"), str):
            return Shape.ALPACA
        case str(prompt), str(), str():
            return Shape.HH_PROMPT if is_hh(prompt) else Shape.STRINGS
        case list(), list(chosen), list():
            return Shape.CHATS if _holds_user(chosen) else Shape.MESSAGES
        case None | str(), list(), list():
            return Shape.CHATS
        case _:
            return None


def turns_of(shape: Shape, row: Row, every_pair: bool) -> list[Turns]:
    """Prompt and two answers of a row, several times for ranked answers; raises Unusable if it is not of `shape`.

    The second answer of an unpaired row is empty. With `every_pair`, each two ranked answers that differ in rank make
    a pair, else the best and the worst.
    """
    wanted = WANTED[shape]
    for column, kind in wanted.items():
        if column not in row:
            raise Unusable(f"no column {column}")
        if (found := kind_of(row[column])) != kind:
            raise Unusable(f"{column} is null" if found == "null" else f"{column} is {found}, not {kind}")
    match shape:
        case Shape.HH:
            if row.get("prompt") is not None:
                raise Unusable("a prompt beside whole HH dialogues")
            return [split_hh(row["chosen"], row["rejected"])]
        case Shape.HH_PROMPT:
            return [_hh_prompt(row["prompt"], row["chosen"], row["rejected"])]
        case Shape.STRINGS:
            if is_hh(row["prompt"]):
                raise Unusable("prompt is marked as HH text, unlike the first row's")
            return [(_with_system(row, ({"role": "user", "content": row["prompt"]},)), row["chosen"], row["rejected"])]
        case Shape.MESSAGES:
            prompt, chosen, rejected = (_messages(row[each], each) for each in wanted)
            return [(_with_system(row, prompt), _one_answer(chosen), _one_answer(rejected))]
        case Shape.CHATS:
            chosen, rejected = (_messages(row[each], each) for each in wanted)
            prompt, better, worse = split_chats(chosen, rejected)
            _check_prompt_column(row.get("prompt"), prompt)
            return [(_with_system(row, prompt), better, worse)]
        case Shape.SHAREGPT:
            prompt = _messages(row["conversations"], "conversations", _sharegpt)
            better, worse = (_one_answer(_messages([row[each]], each, _sharegpt)) for each in ("chosen", "rejected"))
            return [(_with_system(row, prompt), better, worse)]
        case Shape.ALPACA:
            return [(_alpaca_prompt(row), row["chosen"], row["rejected"])]
        case Shape.RANKED:
            return _ranked(row, every_pair)
        case Shape.UNPAIRED:
            return [_unpaired(row)]
        case _:
            assert_never(shape)


def tools_of(row: Row) -> str:
    """The `tools` column, a list of JSON schemas or its JSON text, as JSON text; empty if there are none."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise Unusable("tools is a string that is no JSON") from error
    if not tools:
        return ""
    if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
        raise Unusable("tools is no list of JSON schemas")
    return json.dumps(tools, ensure_ascii=False)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """`row` with the columns under the names that shapes know, as `data.columns` says."""
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}} if columns else row


def named(row: Row) -> str:
    """The columns of a row, fit to be shown: the first twelve, each of at most 40 characters."""
    names = [printable(str(each))[:40] for each in row]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def _answered(row: Row) -> bool:
    return row["chosen"] is not None and row["rejected"] is not None


def _holds_user(messages: Sequence[Any]) -> bool:
    return any(isinstance(each, dict) and each.get("role") == "user" for each in messages)


def _columns(row: Row, place: str) -> None:
    """Raise DataError if an answer column is missing, with the column that may have been meant."""
    for column in ("chosen", "rejected"):
        if column in row:
            continue
        others = [str(each) for each in row if each not in ("prompt", "chosen", "rejected")]
        close = difflib.get_close_matches(column, others, n=1)
        meant = printable(close[0]) if close else ""
        hint = f'set data.columns = {{ {column} = "{meant}" }} if "{meant}" is meant' if close else UNDERSTOOD
        raise DataError(f'{place}: has no column "{column}"; it has {named(row)}; {hint}')


def _with_system(row: Row, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt behind the text of a `system` column, unless it begins with a system turn itself."""
    match row.get("system"):
        case None | "":
            return prompt
        case str(text):
            own = prompt[:1] and prompt[0]["role"] == "system"
            return prompt if own else ({"role": "system", "content": text}, *prompt)
        case other:
            raise Unusable(f"system is {kind_of(other)}, not a string")


def _hh_prompt(prompt: str, chosen: str, rejected: str) -> Turns:
    """A prompt that ends with an open Assistant marker, and two answers, each after one space."""
    turns = parse_hh(prompt)
    if turns[-1]["role"] != "assistant" or turns[-1]["content"].strip():
        raise Unusable("prompt does not end with an open Assistant turn")
    answers = [parse_hh("\n\nHuman: \n\nAssistant:" + each) for each in (chosen, rejected)]
    if any(len(each) != 2 for each in answers):
        raise Unusable("answer holds more than one turn")
    check_roles(turns[:-1])
    return tuple(turns[:-1]), answers[0][1]["content"], answers[1][1]["content"]


def _alpaca_prompt(row: Row) -> tuple[Message, ...]:
    """History, and the instruction with its input on a line of its own, as LLaMA-Factory joins them."""
    history = row.get("history") or []
    if not all(isinstance(each, list) and len(each) == 2 and all(isinstance(x, str) for x in each) for each in history):
        raise Unusable("history is no list of questions with answers")
    asked = row.get("input")
    if asked is not None and not isinstance(asked, str):
        raise Unusable(f"input is {kind_of(asked)}, not a string")
    question = f"{row['instruction']}\n{asked}" if asked else row["instruction"]
    earlier = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns: list[Message] = [{"role": role, "content": text} for role, text in (*earlier, ("user", question))]
    return _with_system(row, tuple(turns))


def _ranked(row: Row, every_pair: bool) -> list[Turns]:
    """The pairs of one prompt's answers: a better one beside a worse one."""
    prompt = _any_prompt(row.get("prompt"), row)
    if "scores" in row:
        order = _numbers(row["scores"], "scores")
    elif "ranks" in row:
        order = [-rank for rank in _numbers(row["ranks"], "ranks")]
    else:
        raise Unusable("neither scores nor ranks beside the responses")
    answers = [_answer_text(each) for each in row["responses"]]
    if len(answers) != len(order):
        raise Unusable("another number of scores than of responses")
    ranked = sorted(zip(order, answers, strict=True), key=lambda each: -each[0])
    some = combinations(ranked, 2) if every_pair else [(ranked[0], ranked[-1])] if ranked else []
    pairs = [(prompt, better[1], worse[1]) for better, worse in some if better[0] > worse[0]]
    if not pairs:
        raise Unusable("no two responses of different rank")
    return pairs


def _unpaired(row: Row) -> Turns:
    """The prompt and the answer that the label is about."""
    if not isinstance(row.get("label"), bool):
        raise Unusable(f"label is {kind_of(row.get('label'))}, not true or false")
    for column, read in (("messages", _message), ("conversations", _sharegpt)):
        if isinstance(row.get(column), list):
            chat = _messages(row[column], column, read)
            if not chat or chat[-1]["role"] != "assistant":
                raise Unusable("last turn is not the assistant's")
            return _with_system(row, chat[:-1]), chat[-1]["content"], ""
    prompt = _any_prompt(row.get("prompt"), row)
    completion = row.get("completion")
    return (
        prompt,
        _one_answer(_messages(completion, "completion"))
        if isinstance(completion, list)
        else (_answer_text(completion)),
        "",
    )


def _any_prompt(prompt: Any, row: Row) -> tuple[Message, ...]:
    match prompt:
        case str():
            return _with_system(row, ({"role": "user", "content": prompt},))
        case list():
            return _with_system(row, _messages(prompt, "prompt"))
        case _:
            raise Unusable(f"prompt is {kind_of(prompt)}, not a string or a list")


def _answer_text(value: Any) -> str:
    match value:
        case str():
            return value
        case {"role": "assistant", "content": str(text)} | {"content": str(text)} | {"response": str(text)}:
            return text
        case _:
            raise Unusable(f"an answer is {kind_of(value)}, not a string")


def _numbers(values: Any, column: str) -> list[float]:
    if not isinstance(values, list) or not all(isinstance(each, int | float) for each in values):
        raise Unusable(f"{column} is no list of numbers")
    return [float(each) for each in values]


Read = Callable[[Any, str], Message]


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise Unusable(f"{name} is {kind_of(value)}, not an object with role and content")
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            wrong = f"has {kind_of(value[key])} as its {key}" if key in value else f"has no {key}"
            raise Unusable(f"{name} {wrong}")
    if value["role"] not in ROLES:
        role = printable(value["role"])[:20]
        raise Unusable(f'{name} has the role "{role}", which is none of {", ".join(ROLES)}')
    return {"role": value["role"], "content": value["content"]}


def _sharegpt(value: Any, name: str) -> Message:
    """A turn of `from` and `value`."""
    if not isinstance(value, dict):
        raise Unusable(f"{name} is {kind_of(value)}, not an object with from and value")
    for key in ("from", "value"):
        if not isinstance(value.get(key), str):
            raise Unusable(f"{name} has no {key} that is a string")
    if value["from"] not in SHAREGPT_ROLES:
        role = printable(value["from"])[:20]
        raise Unusable(f'{name} is from "{role}", which is none of {", ".join(SHAREGPT_ROLES)}')
    return {"role": SHAREGPT_ROLES[value["from"]], "content": value["value"]}


def _messages(value: list[Any], column: str, read: Read = _message) -> tuple[Message, ...]:
    """Check one message list; keys of a message that are not read are left out."""
    return tuple(read(each, f"a message of {column}") for each in value)


def _one_answer(answer: tuple[Message, ...]) -> str:
    if len(answer) > 1:
        raise Unusable("answer holds more than one turn")
    if not answer or answer[0]["role"] != "assistant":
        raise Unusable("last turn is not the assistant's")
    return answer[0]["content"]


def _check_prompt_column(column: Any, prompt: tuple[Message, ...]) -> None:
    """A prompt beside whole chats must be found in them: as one of the user turns, or as all turns."""
    match column:
        case None:
            return
        case str():
            agrees = column in (turn["content"] for turn in prompt if turn["role"] == "user")
        case list():
            agrees = _messages(column, "prompt") == prompt
        case _:
            raise Unusable(f"prompt is {kind_of(column)}, not a string or a list")
    if not agrees:
        raise Unusable("prompt column is not the prompt of the chats")
