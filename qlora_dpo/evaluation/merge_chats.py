"""Compares the tokens of held-out chats, as other programs get them from a written model, with those trained on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_dpo.data.dialogue import Message, sanitize_text
from qlora_dpo.data.encode import PairSet, encode_pairs
from qlora_dpo.data.encoded import EncodedPair, TokenIds
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.data.templates.chat_template import list_repairs, template_traits
from qlora_dpo.errors import ModelError
from qlora_dpo.files import atomic_write, text_lines

MAX_CHATS = 20
CHATS_FILE = "held_out_chats.jsonl"
"""Beside a merged model: the chats that were compared, by which `export` compares llama.cpp's tokens. Never pushed."""


@dataclass(frozen=True)
class TrainedChat:
    """A prompt with its chosen answer, and the tokens of both as they were encoded for training."""

    prompt: tuple[Message, ...]
    answer: str
    prompt_ids: TokenIds
    answer_ids: TokenIds
    """Without an end token that the template does not write."""


@dataclass(frozen=True)
class ChatComparison:
    """How many chats were compared, how many have other tokens, and the first such token in words."""

    compared: int
    different: int
    first_difference: str


def select_chats(pairs: PairSet, tokenizer: Any) -> list[TrainedChat]:
    """The first `MAX_CHATS` pairs whose text the template gets as it is.

    Left out are pairs with tools, with control tokens in their text, which are only read as text here, with a system
    turn that the template has no place for, and with a prompt that was cut.
    """
    form, traits = detect_chat_format(tokenizer), template_traits(tokenizer)
    chats = list[TrainedChat]()
    for pair, encoded in zip(pairs.pairs, pairs.encoded, strict=True):
        if len(chats) == MAX_CHATS:
            break
        messages: list[Message] = [*pair.prompt, {"role": "assistant", "content": pair.chosen}]
        if pair.tools or list_repairs(traits, messages):
            continue
        match encode_pairs([pair], tokenizer, form):
            case [EncodedPair(prompt=encoded.prompt, chosen=encoded.chosen)]:
                answer_ids = encoded.chosen[: -1 if form.eos_appended else None]
                chats.append(TrainedChat(pair.prompt, pair.chosen, encoded.prompt, answer_ids))
    return chats


def compare_chats(folder: Path, chats: Sequence[TrainedChat]) -> ChatComparison:
    """Render `chats` with the tokenizer and template of the model in `folder`, as transformers opens them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    differences = [found for chat in chats if (found := _difference(tokenizer, chat))]
    return ChatComparison(len(chats), len(differences), differences[0] if differences else "")


def write_chats(folder: Path, chats: Sequence[TrainedChat]) -> None:
    """Write the prompts of `chats`, with the tokens that they were trained with, into `folder`."""
    records = [{"prompt": list(chat.prompt), "prompt_ids": list(chat.prompt_ids)} for chat in chats]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    atomic_write(folder / CHATS_FILE, "".join(lines))


def read_chats(folder: Path) -> list[tuple[list[Message], TokenIds]]:
    """The prompts that `write_chats` wrote into `folder`, and their tokens; empty if there are none."""
    if not (folder / CHATS_FILE).is_file():
        return []
    try:
        records = [json.loads(line) for line in text_lines((folder / CHATS_FILE).read_text(encoding="utf-8"))]
        return [(record["prompt"], tuple(record["prompt_ids"])) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / CHATS_FILE}: is damaged; remove it, and built-in chats are compared") from error


def _difference(tokenizer: Any, chat: TrainedChat) -> str:
    """The first token that differs, in words; empty if none does."""
    answered = [*chat.prompt, {"role": "assistant", "content": chat.answer}]
    asked_ids, answered_ids = (
        tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=is_asked, return_dict=False))
        for messages, is_asked in ((list(chat.prompt), True), (answered, False))
    )
    trained_ids = (*chat.prompt_ids, *chat.answer_ids)
    # an empty <think> block of the prompt may stand in answered chats alone
    for name, found_ids, expected_ids in (
        ("the prompt", asked_ids, trained_ids[: len(asked_ids)]),
        ("the chat", answered_ids[: len(trained_ids)], trained_ids),
    ):
        if found_ids != expected_ids:
            place = _first_unequal(found_ids, expected_ids)
            found, expected = (_token(tokenizer, ids, place) for ids in (found_ids, expected_ids))
            return f"token {place + 1} of {name} is {found}, and {expected} was trained on"
    return ""


def _first_unequal(one: TokenIds, other: TokenIds) -> int:
    equal = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return min(len(one), len(other)) if equal is None else equal


def _token(tokenizer: Any, ids: TokenIds, place: int) -> str:
    if place >= len(ids):
        return "none"
    return sanitize_text(f"{ids[place]} {tokenizer.decode([ids[place]])!r}")
