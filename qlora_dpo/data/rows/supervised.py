"""Rows of questions and answers, each answer of which is trained on: chats, prompt and completion, Alpaca's columns."""

from collections.abc import Iterator, Sequence

from qlora_dpo.data.dialogue import InvalidRow, Message
from qlora_dpo.data.files import Row
from qlora_dpo.data.rows.messages import parse_messages
from qlora_dpo.data.rows.prompts import answer_text, parse_alpaca_prompt, parse_prompt, with_system

CHAT_COLUMNS = ("messages", "conversations", "conversation")
QUESTION_COLUMNS = ("prompt", "question", "query", "instruction", "input")
ANSWER_COLUMNS = ("completion", "response", "answer", "output", "chosen")

PromptAndAnswers = tuple[tuple[Message, ...], str, str]
"""A prompt and two answers; the second is empty where there is only one."""


def is_supervised(row: Row) -> bool:
    """True if a row holds a chat, or a question and one answer to it."""
    if any(isinstance(row.get(column), list) and row[column] for column in CHAT_COLUMNS):
        return True
    return _find_column(row, QUESTION_COLUMNS) is not None and _find_column(row, ANSWER_COLUMNS) is not None


def join_supervised(row: Row, repairs: list[str]) -> Row:
    """`row` with its question as `prompt`, or as Alpaca's `instruction`, and its answer as `completion`."""
    if any(isinstance(row.get(column), list) and row[column] for column in CHAT_COLUMNS):
        return row
    question, answer = _find_column(row, QUESTION_COLUMNS), _find_column(row, ANSWER_COLUMNS)
    if question is None or answer is None or row.get("rejected") is not None or isinstance(row.get("label"), bool):
        return row
    has_more = bool(row.get("history") or (question != "input" and row.get("input")))
    is_alpaca = isinstance(row[question], str) and (has_more or question == "instruction")
    target = "instruction" if is_alpaca else "prompt"
    renamed = {question: target, answer: "completion"}
    changes = {old: new for old, new in renamed.items() if old != new}
    repairs += [f"{old} read as the {new}" for old, new in changes.items()]
    kept = {column: value for column, value in row.items() if column not in changes}
    return kept | {new: row[old] for old, new in changes.items()}


def parse_supervised(row: Row, last_only: bool, repairs: list[str]) -> list[PromptAndAnswers]:
    """Each of the assistant's turns, or the last one, with the turns before it as its prompt.

    Raises InvalidRow for a row without such a turn, and for turns that do not follow one another as in a chat.
    """
    for column in CHAT_COLUMNS:
        if isinstance(row.get(column), list):
            chat = parse_messages(row[column], column, repairs, is_sharegpt=column != "messages")
            return list(_answers(with_system(row, chat), 0, last_only))
    if "completion" not in row:
        raise InvalidRow("no chat, and no question with an answer")
    is_alpaca = isinstance(row.get("instruction"), str)
    prompt = parse_alpaca_prompt(row) if is_alpaca else parse_prompt(row.get("prompt"), row, repairs)
    if isinstance(row["completion"], list):
        answer = parse_messages(row["completion"], "completion", repairs)
        return list(_answers((*prompt, *answer), len(prompt), last_only))
    return [(prompt, answer_text(row["completion"]), "")]


def _answers(chat: Sequence[Message], first: int, last_only: bool) -> Iterator[PromptAndAnswers]:
    """The assistant's turns from turn number `first` on."""
    places = [place for place in range(first, len(chat)) if chat[place]["role"] == "assistant"]
    if not places:
        raise InvalidRow("no turn of the assistant's")
    for place in places[-1:] if last_only else places:
        yield tuple(chat[:place]), chat[place]["content"], ""


def _find_column(row: Row, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(row.get(name), str | list | dict) and row[name]), None)
