"""Prompts and answers as one column or several hold them: a string, messages, an instruction with its history."""

from typing import Any

from qlora_dpo.data.dialogue import InvalidRow, Message
from qlora_dpo.data.files import Row, json_type
from qlora_dpo.data.rows.messages import check_unread_keys, parse_messages


def with_system(row: Row, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt, with the text of a `system` column before it unless it already begins with a system turn."""
    match row.get("system"):
        case None:
            return prompt
        case str(text) if not text.strip():
            return prompt
        case str(text):
            has_system = prompt[:1] and prompt[0]["role"] == "system"
            return prompt if has_system else ({"role": "system", "content": text}, *prompt)
        case other:
            raise InvalidRow(f"system is {json_type(other)}, not a string")


def parse_prompt(prompt: Any, row: Row, repairs: list[str]) -> tuple[Message, ...]:
    """The messages of a prompt column; a string is the user's turn."""
    match prompt:
        case str():
            return with_system(row, ({"role": "user", "content": prompt},))
        case list():
            return with_system(row, parse_messages(prompt, "prompt", repairs))
        case _:
            raise InvalidRow(f"prompt is {json_type(prompt)}, not a string or a list")


def parse_alpaca_prompt(row: Row) -> tuple[Message, ...]:
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
    return with_system(row, tuple(turns))


def answer_text(value: Any) -> str:
    """The text of an answer that is a string or an object; raises InvalidRow for anything else."""
    match value:
        case str():
            return value
        case dict() if {"content", "response", "value"} & value.keys():
            check_unread_keys(value, "an answer")
            match value:
                case {"content": str(text)} | {"response": str(text)} | {"value": str(text)}:
                    return text
    raise InvalidRow(f"an answer is {json_type(value)}, not a string")


def single_answer(answer: tuple[Message, ...]) -> str:
    """The text of an answer that is one message; raises InvalidRow unless it is one, and the assistant's."""
    if len(answer) > 1:
        raise InvalidRow("answer holds more than one turn")
    if not answer or answer[0]["role"] != "assistant":
        raise InvalidRow("last turn is not the assistant's")
    return answer[0]["content"]
