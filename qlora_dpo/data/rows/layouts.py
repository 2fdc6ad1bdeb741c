"""Brings rows as people have them into the columns of the known formats, and names what it does to each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qlora_dpo.data.dialogue import InvalidRow, Message, is_hh, sanitize_text
from qlora_dpo.data.files import Row, json_type
from qlora_dpo.data.rows.compared import ANSWER_NAMES, VERDICT_COLUMNS, find_first_number, join_compared
from qlora_dpo.data.rows.messages import check_unread_columns, is_message, parse_list_text
from qlora_dpo.data.rows.published import read_published
from qlora_dpo.data.rows.rendered import (
    FAMILIES,
    MarkFamily,
    find_answer_family,
    find_chat_family,
    find_prompt_family,
    read_rendered,
    split_rendered_answer,
    split_rendered_prompt,
)
from qlora_dpo.data.rows.supervised import join_supervised

LIST_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "completion",
    "responses",
    "scores",
    "ranks",
    "output",
    "rejected_messages",
    "history",
    "context",
    *(f"{name}_{ending}" for name in ANSWER_NAMES for ending in "ab012"),
)
"""Columns that may hold lists, and whose text may be one."""
KNOWN_COLUMNS = (
    *LIST_COLUMNS,
    "system",
    "tools",
    "label",
    "kto_tag",
    "instruction",
    "input",
    "rejected_response",
    "query",
    "response",
    "question",
    "answer",
    "images",
    "image",
    "videos",
    "audios",
    *VERDICT_COLUMNS,
)
TRUE_WORDS, FALSE_WORDS = ("true", "1", "1.0", "desirable", "good"), ("false", "0", "0.0", "undesirable", "bad")


@dataclass(frozen=True)
class SourceTraits:
    """What the rows of a source have in common, beside their format."""

    renames: bool = False
    """True if its columns are known ones, but for capitals and spaces in their names."""
    list_texts: frozenset[str] = frozenset()
    """Columns in which lists are written as text."""
    family: MarkFamily | None = None
    """The marks with which its text has been rendered already."""
    families: tuple[MarkFamily, ...] = FAMILIES
    """The families that are looked for: the known ones, and the model's own marks behind them if there is a model."""
    first_number: int | None = None
    """What the first of two answers is called where the better one is numbered; None if that is not known."""
    is_supervised: bool = False
    """True if rows without a rejected answer are questions and answers."""
    is_text: bool = False
    """True if a column `text` holds whole chats in the marks of a template."""
    is_literal: bool = False
    """True if strings are to be read as they stand, since `data.format` says that they are strings."""


def find_traits(rows: Sequence[Row], renames: bool, families: tuple[MarkFamily, ...]) -> SourceTraits:
    """The traits that at least half of these rows show; words as marks (`User:`) count if nine of ten have them."""
    rows = [_rename_known_columns(row, []) for row in rows] if renames else rows
    texts = {column: [row[column] for row in rows if isinstance(row.get(column), str)] for column in LIST_COLUMNS}
    list_texts = frozenset(
        column
        for column, values in texts.items()
        if values and 2 * sum(parsed is not None for parsed in _parse_all(column, values)) >= len(values)
    )
    found = [family for row in rows if (family := _find_family(row, families)) is not None]
    most = max(set(found), key=found.count, default=None)
    num_rows = sum(any(isinstance(row.get(column), str) for column in ("prompt", "chosen")) for row in rows)
    if most is None or found.count(most) < (0.5 if most.is_control else 0.9) * num_rows:
        most = None
    return SourceTraits(renames, list_texts, most, families, find_first_number(rows))


def normalize_row(row: Row, traits: SourceTraits, repairs: list[str]) -> Row:
    """`row` in the columns of a known format; what is read otherwise than it is written goes to `repairs`.

    Raises InvalidRow for a row that holds pictures and the like, or text that cannot be read as its source's is.
    """
    row = _rename_known_columns(row, repairs) if traits.renames else row
    check_unread_columns(row)
    if traits.is_text:
        row = _split_text(row, traits, repairs)
    for column in traits.list_texts & row.keys():
        row = _with_parsed_list(row, column, repairs)
    row = join_compared(read_published(row, repairs), repairs, traits.first_number)
    row = _read_label(_join_columns(row, repairs), repairs)
    row = join_supervised(row, repairs) if traits.is_supervised else row
    row = _unwrap_single_values(row, repairs)
    if not traits.is_literal:
        row = _split_rendered(row, traits, repairs)
    return row


def _split_text(row: Row, traits: SourceTraits, repairs: list[str]) -> Row:
    """`row` with the turns that its `text` holds as `messages`."""
    text = row.get("text")
    if not isinstance(text, str):
        raise InvalidRow(f"text is {json_type(text)}, not a string" if "text" in row else "no column text")
    rendered = read_rendered(text, traits.families)
    if rendered is None:
        raise InvalidRow("text has no turns in the marks of a known chat template")
    repairs.append(f"{rendered.family.name} marks read as turns")
    return {"messages": list(rendered.turns)}


def _parse_all(column: str, texts: Iterable[str]) -> Iterable[Any]:
    """The list that each text is, or None."""
    for text in texts:
        value = parse_list_text(text) if text.lstrip()[:1] in ("[", "{", "a", '"') else None
        yield value if _is_list_of(column, value) else None


def _is_list_of(column: str, value: Any) -> bool:
    """True if `value` is what a list column holds: messages, or the answers and scores of ranked rows."""
    match column:
        case "responses" | "output":
            return isinstance(value, list) and all(isinstance(each, str | dict) for each in value)
        case "scores" | "ranks":
            return isinstance(value, list) and not any(isinstance(each, list | dict) for each in value)
        case "history":
            return isinstance(value, list) and all(isinstance(each, list) for each in value)
        case _:
            return is_message(value) or (isinstance(value, list) and bool(value) and all(map(is_message, value)))


def _with_parsed_list(row: Row, column: str, repairs: list[str]) -> Row:
    if not isinstance(row[column], str):
        return row
    (value,) = _parse_all(column, [row[column]])
    if value is None:
        raise InvalidRow(f"{column} is text that cannot be read as a list, unlike most rows'")
    repairs.append("a list written as text read as the list")
    return {**row, column: value}


@lru_cache(maxsize=256)
def _column_names(columns: tuple[str, ...]) -> Mapping[str, str]:
    """The known columns that a row has by another spelling, and that spelling."""
    spellings = dict[str, list[str]]()
    for column in columns:
        spellings.setdefault("_".join(column.casefold().replace("-", " ").split()), []).append(column)
    return {
        name: spellings[name][0] for name in KNOWN_COLUMNS if name not in columns and len(spellings.get(name, ())) == 1
    }


def _rename_known_columns(row: Row, repairs: list[str]) -> Row:
    """`row` with known columns whose names have capitals or spaces under their usual names, in their places."""
    spellings = _column_names(tuple(row))
    if not spellings:
        return row
    names = {spelling: name for name, spelling in spellings.items()}
    repairs += [f'column "{sanitize_text(spelling)}" read as {name}' for name, spelling in spellings.items()]
    return {names.get(column, column): value for column, value in row.items()}


def _join_columns(row: Row, repairs: list[str]) -> Row:
    """Rows of other trainers: ms-swift's, LLaMA-Factory's, axolotl's."""
    output = row.get("output")
    if isinstance(output, list) and "chosen" not in row and ("instruction" in row or "prompt" in row):
        if len(output) != 2:
            raise InvalidRow(f"output holds {len(output)} answers; two are needed, the better one first")
        repairs.append("output read as the better and the worse answer")
        return {**row, "chosen": output[0], "rejected": output[1]}
    if "chosen" not in row and ("rejected_response" in row or "rejected_messages" in row):
        return _join_rejected_response(row, repairs)
    conversation = next(
        (name for name in ("messages", "conversations", "conversation") if isinstance(row.get(name), list)), None
    )
    answers = row.get("chosen"), row.get("rejected")
    if conversation is None or row.get("prompt") is not None or None in answers or row.get("instruction") is not None:
        return row
    match answers:
        case dict(), dict() if conversation == "conversations":
            return row  # ShareGPT's own columns
        case str(chosen), str(rejected) if is_hh(chosen) or is_hh(rejected):
            return row
        case list(chosen), _ if begins_with_question(chosen):
            return row
    repairs.append(f"{conversation} read as the prompt")
    prompt = row[conversation]
    if len(prompt) > 1 and prompt[-1] == (answers[0][0] if isinstance(answers[0], list) else answers[0]):
        prompt = prompt[:-1]  # the chosen answer stands in both
    return {**row, "prompt": prompt}


def _join_rejected_response(row: Row, repairs: list[str]) -> Row:
    """ms-swift's rows: a whole chat, and the answer that its last one is preferred to."""
    column = "rejected_response" if row.get("rejected_response") is not None else "rejected_messages"
    rejected, messages = row.get(column), row.get("messages")
    if isinstance(row.get("query"), str) and isinstance(row.get("response"), str):
        repairs.append(f"query, response and {column} read as instruction, chosen and rejected")
        return {**row, "instruction": row["query"], "chosen": row["response"], "rejected": rejected}
    if not isinstance(messages, list) or not messages or rejected is None:
        return row
    answer = [{"role": "assistant", "content": rejected}] if isinstance(rejected, str) else rejected
    answer = [answer] if isinstance(answer, dict) else answer
    if not isinstance(answer, list):
        raise InvalidRow(f"{column} is {json_type(rejected)}, not a string or a list")
    repairs.append(f"messages and {column} read as two chats")
    whole = answer if begins_with_question(answer) else [*messages[:-1], *answer]
    return {**row, "chosen": messages, "rejected": whole}


def begins_with_question(messages: Sequence[Any]) -> bool:
    """True if a list of messages is a whole chat: it begins with a system or a user turn."""
    roles = [
        str(message.get("role") or message.get("from") or "").strip().casefold()
        for message in messages[:1]
        if isinstance(message, dict)
    ]
    return bool(roles) and roles[0] in ("system", "developer", "user", "human", "prompter")


def _read_label(row: Row, repairs: list[str]) -> Row:
    """`row` with a label of 0 and 1, or of words, as true or false."""
    if "kto_tag" in row and "label" not in row:
        row = {**row, "label": row["kto_tag"]}
    label = row.get("label")
    is_rated = "chosen" not in row and "responses" not in row and _RATED & row.keys()
    if label is None or isinstance(label, bool) or not isinstance(label, str | int | float) or not is_rated:
        return row
    word = str(label).strip().casefold()
    if word not in TRUE_WORDS + FALSE_WORDS:
        return row
    value = word in TRUE_WORDS
    repairs.append("label written as text or as 0 and 1, read as true or false")
    return {**row, "label": value}


_RATED = {"completion", "messages", "conversations"}


def _unwrap_single_values(row: Row, repairs: list[str]) -> Row:
    """`row` without lists of one string, and with a message alone in a list."""
    changed = dict[str, Any]()
    is_sharegpt = isinstance(row.get("conversations"), list)
    for column in ("prompt", "chosen", "rejected", "completion"):
        match row.get(column):
            case [str(text)]:
                changed[column] = text
                repairs.append("a list of one string read as the string")
            case dict(message) if is_message(message) and not (is_sharegpt and column != "prompt"):
                changed[column] = [message]
                repairs.append("one message read as a list of it")
            case [str(), str(), str(), *_] as turns if column == "prompt" and len(turns) % 2:
                if all(isinstance(text, str) for text in turns):
                    roles = ("user", "assistant")
                    changed[column] = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
                    repairs.append("prompt: a list of strings read as turns, the user's first")
    return {**row, **changed} if changed else row


def _find_family(row: Row, families: tuple[MarkFamily, ...]) -> MarkFamily | None:
    """The family whose marks the text of a row is written in: its prompt, its answers, or its chats."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if isinstance(prompt, str) and (family := find_prompt_family(prompt, families)) is not None:
        return family
    return find_answer_family(chosen, families) if isinstance(chosen, str) and not isinstance(prompt, list) else None


def _split_rendered(row: Row, traits: SourceTraits, repairs: list[str]) -> Row:
    """`row` with the turns that its rendered text holds."""
    family, prompt = traits.family, row.get("prompt")
    if family is None:
        found = _find_family(row, traits.families)
        if found is not None and found.is_control:
            raise InvalidRow(f"text is written in {found.name} marks, unlike most rows'")
        return row
    if isinstance(prompt, list):
        return row
    changed = dict[str, Any]()
    turns: tuple[Message, ...] | None = None
    families = traits.families
    is_unmarked = isinstance(prompt, str) and find_prompt_family(prompt, families) is None
    is_plain = is_unmarked and _find_family(row, families) is family
    if isinstance(prompt, str) and is_plain:
        # answers alone are rendered: whole chats, which have their own prompt, or a turn of the assistant's
        turns = None if find_chat_family(row["chosen"], families) else ()
    elif isinstance(prompt, str):
        turns = split_rendered_prompt(prompt, family)
        changed["prompt"] = list(turns)
    for column in ("chosen", "rejected", "completion"):
        if isinstance(row.get(column), str):
            changed[column] = list(split_rendered_answer(row[column], turns, family))
    repairs.append(f"{family.name} marks read as turns")
    return {**row, **changed}
