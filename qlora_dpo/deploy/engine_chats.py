"""Asks llama.cpp, where it is installed, for the tokens of chats by the template inside a GGUF file."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qlora_dpo.data.dialogue import Message, sanitize_text
from qlora_dpo.data.encoded import TokenIds
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.data.templates.chat_template import TEMPLATE_ERRORS, list_repairs, template_traits, tokenize_chats
from qlora_dpo.data.templates.template_limits import LimitExceeded
from qlora_dpo.errors import ModelError

ENGINE_SECONDS = 600
_TEXTS = (
    "What is the capital of France?",
    "It's 7:30, isn't it? We'll have 12345 more.",
    "naïve café – 東京 🙂 привет",
    "def f(x):\n    return x**2  # a comment\n",
    "  two  spaces,\n\n\ta tab, and a line\r\nby Windows",
    "<b>Not a mark</b> of a template, as {{ braces }} & [brackets] are none",
    "A",
    "Thanks!\n\n1. one\n2. two\n",
)
_ENGINE = """
import json, os, sys, urllib.request
import xllamacpp
question = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = question["file"]
params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = 512, 1, False, True
server = xllamacpp.Server(params)
def ask(place, **body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.listening_address + place, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))
found = []
for messages in question["chats"]:
    text = ask("/apply-template", messages=messages)["prompt"]
    found.append(ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"])
print("FOUND" + json.dumps(found), flush=True)
os._exit(0)
"""


@dataclass(frozen=True)
class EngineChats:
    """How many chats llama.cpp was asked for; 0 and the reason if it was not."""

    compared: int
    not_compared: str = ""
    kind: str = "built-in"


def built_in_chats() -> list[list[Message]]:
    """Twenty chats that end with a question: one or several turns, with and without a system turn."""
    chats = list[list[Message]]()
    for number in range(20):
        texts = [_TEXTS[(number + place * (1 + number // 8)) % len(_TEXTS)] for place in range(3)]
        turns: list[Message] = [{"role": "user", "content": texts[0]}]
        if number % 3:
            turns += [{"role": "assistant", "content": texts[1].strip()}, {"role": "user", "content": texts[2]}]
        if number % 4 == 3:
            turns.insert(0, {"role": "system", "content": "Answer in one sentence."})
        chats.append(turns)
    return chats


def check_engine_chats(
    file: Path, tokenizer: Any, trained: Sequence[tuple[list[Message], TokenIds]] = ()
) -> EngineChats:
    """Compare llama.cpp's tokens of chats with those of `trained`, or of twenty built-in chats by transformers.

    Raises ModelError, with the first token that differs. Nothing is compared where xllamacpp is not installed, or where
    llama.cpp cannot read the template.
    """
    if tokenizer.chat_template is None:
        return EngineChats(0, "the model has no chat template")
    if importlib.util.find_spec("xllamacpp") is None:
        return EngineChats(0, "llama.cpp is not installed here: pip install 'qlora_dpo[engines]'")
    chats, expected = [chat for chat, _ in trained], [ids for _, ids in trained]
    for chat in [] if trained else built_in_chats():
        if list_repairs(template_traits(tokenizer), chat):  # a system turn that the template has no place for
            continue
        try:
            expected += tokenize_chats(tokenizer, [tuple(chat)], [], [""])
        except (*TEMPLATE_ERRORS, LimitExceeded):
            continue
        chats.append(chat)
    question = json.dumps({"file": str(file), "chats": chats})
    try:
        # a process of its own, for it may crash
        done = subprocess.run(
            [sys.executable, "-c", _ENGINE],
            input=question,
            capture_output=True,
            text=True,
            check=False,
            timeout=ENGINE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return EngineChats(0, f"llama.cpp did not answer within {ENGINE_SECONDS} s")
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return EngineChats(0, f"llama.cpp cannot write its chats ({sanitize_text(last)[:200]})")
    found = [tuple(ids) for ids in json.loads(line.removeprefix("FOUND"))]
    # an empty <think> block that the template writes before an answer belongs to the prompt in training alone
    thoughts = detect_chat_format(tokenizer).empty_thoughts
    differing = [pair for pair in zip(found, expected, strict=True) if pair[1] not in (pair[0], pair[0] + thoughts)]
    if differing:
        place = next(n for n, (one, other) in enumerate(zip_longest(*differing[0])) if one != other)
        tokens = [_token(tokenizer, ids, place) for ids in differing[0]]
        raise ModelError(
            f"{file.name}: in {len(differing)} of {len(chats)} chats llama.cpp has other tokens than were trained on: "
            f"token {place + 1} is {tokens[0]}, and {tokens[1]} was trained on; nothing was kept"
        )
    return EngineChats(len(chats), kind="held-out" if trained else "built-in")


def _token(tokenizer: Any, ids: tuple[int, ...], place: int) -> str:
    if place >= len(ids):
        return "none"
    return sanitize_text(f"{ids[place]} {tokenizer.decode([ids[place]])!r}")
