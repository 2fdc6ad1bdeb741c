"""Writes conversations in a tokenizer's chat template: what somebody wrote never becomes a control token.

The template came with a model and is foreign code: it runs in transformers' sandbox, under limits.
"""

import json
import re
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from qlora_dpo.data.dialogue import Message, Unusable, printable
from qlora_dpo.data.encoded import Ids
from qlora_dpo.data.template_limits import TooMuch, limited

Chat = Sequence[Message]

SECONDS, SECONDS_PER_CHAT = 10.0, 0.05
"""A template may take so long; the slowest of the usual ones takes under a millisecond for a chat."""
MORE_BYTES = 2**30
"""A template may ask for so much memory."""
MOST_WRITTEN = 100_000
"""Characters that a template may write beside twenty times what stands in the chat."""

MOST_REMEMBERED = 2**22
"""Tokens of turns that are remembered: with their texts, about 40 MB."""

REFUSALS = (TemplateError, TypeError, ValueError)
"""What a template raises that does not take a conversation."""

FOLDED = "system turn written before the first question"
AS_TEXT = "control tokens read as text"

_HOUSE, _OTHER_HOUSE = range(0xE000, 0xF900), 0xF0000
"""Characters of Unicode's private use areas: they stand for what somebody wrote, and for the tokens themselves."""


@dataclass(frozen=True)
class Habits:
    """What a tokenizer and its template do with what somebody wrote."""

    special: re.Pattern[str] | None
    """Finds the tokenizer's control tokens in text, where they would forge or end turns."""
    folds_system: bool
    """True if the template has no system turn: its text then stands before the first question."""


def chat_ids(tokenizer: Any, chats: Sequence[Chat], answered: bool) -> list[Ids]:
    """Token ids of each chat as the template writes it; without an answer, up to where the assistant starts to write.

    They are the ids that `apply_chat_template` gives, but that a control token in somebody's text (`<|im_end|>`) is
    read as the characters it is written with. Raises Unusable where the tokenizer cannot do that, one of REFUSALS
    where the template does not take a chat, and TooMuch where it runs or writes without end.
    """
    return ids_together(tokenizer, *(((), chats) if answered else (chats, ())))


def ids_together(
    tokenizer: Any, prompts: Sequence[Chat], answered: Sequence[Chat], tools: Sequence[str] = ()
) -> list[Ids]:
    """The `chat_ids` of prompts without an answer and of answered chats, one after another.

    Together they take half the time, since the turns of a prompt stand in its answered chats as well. `tools` has the
    JSON text of each chat's tools, if there are any.
    """
    own, chats = habits(tokenizer), [*prompts, *answered]
    told = list(tools) or [""] * len(chats)
    masked = [_masked(own, folded(own, chat), some) for chat, some in zip(chats, told, strict=True)]
    given, count = [Given(chat, some) for chat, some, _ in masked], len(prompts)
    texts = _rendered(tokenizer, given[:count], answered=False) + _rendered(tokenizer, given[count:], answered=True)
    found = tokenize(tokenizer, texts)
    return [
        _spelt_out(tokenizer, own, text, words) if words else ids
        for text, ids, (_, _, words) in zip(texts, found, masked, strict=True)
    ]


@dataclass(frozen=True)
class Given:
    """What a template is given: a chat, and its tools as JSON text."""

    chat: list[Message]
    tools: str = ""


def rendered(tokenizer: Any, chats: Sequence[Chat], answered: bool) -> list[str]:
    """The template's text of each chat, as it stands; raises as `chat_ids` does."""
    return _rendered(tokenizer, [Given(list(chat)) for chat in chats], answered)


def _rendered(tokenizer: Any, given: Sequence[Given], answered: bool) -> list[str]:
    if not given:
        return []
    with limited(SECONDS + SECONDS_PER_CHAT * len(given), MORE_BYTES):
        texts = [_write(tokenizer, given[0], answered)]
        if len(given) > 1:
            texts += _others_written(tokenizer, given, answered, texts[0])
    for each, text in zip(given, texts, strict=True):
        most = 20 * (sum(len(turn["content"]) for turn in each.chat) + len(each.tools)) + MOST_WRITTEN
        if len(text) > most:
            raise TooMuch(f"writes {len(text):,} characters for a chat that needs no more than {most:,}")
    return texts


def _write(tokenizer: Any, given: Given, answered: bool) -> str:
    tools = json.loads(given.tools) if given.tools else None
    return str(
        tokenizer.apply_chat_template(given.chat, tools=tools, tokenize=False, add_generation_prompt=not answered)
    )


def _others_written(tokenizer: Any, given: Sequence[Given], answered: bool, first: str) -> list[str]:
    """The texts of all chats but the first, whose text is `first`.

    Two thirds of the time of `apply_chat_template` go into copying chats of any kind of object into plain ones, which
    ours are. So its compiled template is asked itself, in the same sandbox, if it writes `first` as well.
    """
    named = tokenizer.special_tokens_map
    template = _compile_jinja_template(tokenizer.get_chat_template())

    def write(each: Given) -> str:
        tools = json.loads(each.tools) if each.tools else None
        return str(
            template.render(
                messages=each.chat, tools=tools, documents=None, add_generation_prompt=not answered, **named
            )
        )

    if write(given[0]) == first:
        return [write(each) for each in given[1:]]
    return [_write(tokenizer, each, answered) for each in given[1:]]


def reads_tools(tokenizer: Any) -> bool:
    """True if the template writes what the tools are that it is told of."""
    return _reads_tools(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _reads_tools(tokenizer: Any, template: str) -> bool:
    name, nothing = "find_the_hour", {"type": "object", "properties": {}}
    function = {"name": name, "description": "Find it.", "parameters": nothing}
    tools = json.dumps([{"type": "function", "function": function}])
    try:
        return name in _write(tokenizer, Given([{"role": "user", "content": "Is it so?"}], tools), False)
    except REFUSALS:
        return False


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Token ids of rendered texts, nothing added: the ids that `apply_chat_template` gives.

    Where control tokens stand between turns, each distinct turn is tokenized once, as long as it is remembered: a
    prompt's turns stand in three texts of a pair, and often in several pairs, and are most of the work.
    """
    added = _added(tokenizer) if len(texts) > 1 else None
    if added is not None:
        first = _whole_ids(tokenizer, texts[:1])  # it also takes back what was set for truncation and padding
        pieces = [added.pattern.split(text) for text in texts]
        turns = set(chain.from_iterable(pieces)) - added.ids.keys() - {""}
        ids = {**_turns(tokenizer).ids(turns), **added.ids, "": ()}
        together = [tuple(chain.from_iterable(map(ids.__getitem__, some))) for some in pieces]
        if together[:1] == first:
            return together
    return _whole_ids(tokenizer, texts)


class _Turns:
    """The ids of turns that were tokenized lately, in 4 bytes each."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.known: dict[str, array[int]] = {}
        self.tokens = 0

    def ids(self, turns: Collection[str]) -> dict[str, "Sequence[int]"]:
        """The ids of each of `turns`; the oldest are forgotten where there are too many."""
        new = [turn for turn in turns if turn not in self.known]
        for turn, found in zip(new, self.backend.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self.known[turn] = array("I", found.ids)
            self.tokens += len(found.ids)
        asked: dict[str, Sequence[int]] = {turn: self.known[turn] for turn in turns}
        while self.tokens > MOST_REMEMBERED:
            self.tokens -= len(self.known.pop(next(iter(self.known))))
        return asked


@lru_cache(maxsize=4)
def _turns(tokenizer: Any) -> _Turns:
    return _Turns(tokenizer.backend_tokenizer)


def forget_turns() -> None:
    """Give back the memory of the turns that are remembered."""
    _turns.cache_clear()


def _whole_ids(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(ids) for ids in encoded["input_ids"]]


@dataclass(frozen=True)
class _Added:
    """The tokens that were added to a vocabulary: a pattern that splits a text at them, and their ids."""

    pattern: re.Pattern[str]
    ids: Mapping[str, list[int]]


@lru_cache(maxsize=8)
def _added(tokenizer: Any) -> _Added | None:
    """The added tokens of `tokenizer`, if what stands between two of them is always tokenized by itself.

    None if it is not: some added token takes in the white space around it or must be a word, or words are marked at a
    text's start only.
    """
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    looks_around = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in state["added_tokens"])
    # those that are looked for in normalized text are found in the pieces
    ids = {token["content"]: [token["id"]] for token in state["added_tokens"] if not token["normalized"]}
    if not ids or looks_around or "Metaspace" in json.dumps(state["pre_tokenizer"]):
        return None
    return _Added(re.compile(f"({'|'.join(map(re.escape, sorted(ids, key=len, reverse=True)))})"), ids)


def habits(tokenizer: Any) -> Habits:
    """What is known of `tokenizer` and its template, found by looking at what they do."""
    return _habits(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _habits(tokenizer: Any, template: str) -> Habits:
    words = sorted(filter(str.strip, special_tokens(tokenizer).values()), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, words))) if words else None
    return Habits(special, _folds_system(tokenizer))


def _folds_system(tokenizer: Any) -> bool:
    """True if the template takes a question and its answer, but refuses a system turn before them or leaves it out."""
    chat: list[Message] = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}]
    system: Message = {"role": "system", "content": "Answer in one word."}
    try:
        rendered(tokenizer, [chat], answered=True)
    except REFUSALS:
        return False
    try:
        return system["content"] not in rendered(tokenizer, [[system, *chat]], answered=True)[0]
    except REFUSALS:
        return True


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The control tokens of a tokenizer, by id."""
    added = {int(number): token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added


def folded(own: Habits, chat: Chat) -> list[Message]:
    """`chat` as this template takes it: without a system turn if it has no place for one."""
    if not own.folds_system or len(chat) < 2 or chat[0]["role"] != "system" or chat[1]["role"] != "user":
        return list(chat)
    return [{"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]


def repairs(own: Habits, chat: Chat, tools: str = "") -> list[str]:
    """What is done to a chat before it is trained on, in the words of the audit table."""
    done = [FOLDED] if folded(own, chat) != list(chat) else []
    texts = [tools, *(turn["content"] for turn in chat)]
    return [*done, AS_TEXT] if own.special and any(map(own.special.search, texts)) else done


def _masked(own: Habits, chat: list[Message], tools: str) -> tuple[list[Message], str, Mapping[str, str]]:
    """Chat and tools with a character of its own for each control token that somebody wrote, and what each stands for.

    Tools are JSON text: no control token has a quote, so a token that stands in it stands inside of a string.
    """
    contents = [*(turn["content"] for turn in chat), tools]
    words = dict.fromkeys(word for text in contents for word in own.special.findall(text)) if own.special else {}
    if not words or own.special is None:
        return chat, tools, {}
    written = set("".join(contents))
    free = (letter for letter in map(chr, _HOUSE) if letter not in written)
    letters = dict(zip(words, free, strict=False))
    if len(letters) < len(words):
        raise Unusable("text holds control tokens and every character that could stand for them")
    *masked, tools = [own.special.sub(lambda found: letters[found[0]], text) for text in contents]
    chat = [{"role": turn["role"], "content": text} for turn, text in zip(chat, masked, strict=True)]
    return chat, tools, {letter: word for word, letter in letters.items()}


def _spelt_out(tokenizer: Any, own: Habits, text: str, words: Mapping[str, str]) -> Ids:
    """Ids of a rendered text whose masked control tokens are put back, as text.

    They are read by a copy of the tokenizer that knows its control tokens under other names, which the template's own
    are given here. Raises Unusable if there can be no such copy.
    """
    renamed = _renamed(tokenizer) if tokenizer.is_fast else None
    if renamed is None or own.special is None or any(name in text for name in renamed[1].values()):
        raise Unusable(f"text holds the control token {printable(min(words.values()))}, which cannot be read as text")
    copy, names = renamed
    text = own.special.sub(lambda found: names[found[0]], text)
    for letter, word in words.items():
        text = text.replace(letter, word)
    return tuple(copy.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=2)
def _renamed(tokenizer: Any) -> tuple[Tokenizer, dict[str, str]] | None:
    """A copy of a tokenizer whose control tokens are called after private characters, and the names of all of them.

    None if a control token would get another id under another name.
    """
    special = special_tokens(tokenizer)
    names = {word: chr(_OTHER_HOUSE + number) for number, word in enumerate(special.values())}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):
        state["model"]["vocab"] = {names.get(word, word): number for word, number in vocab.items()}
    else:  # Unigram: pieces with their scores
        state["model"]["vocab"] = [[names.get(word, word), score] for word, score in vocab]
    if isinstance(unknown := state["model"].get("unk_token"), str):
        state["model"]["unk_token"] = names.get(unknown, unknown)
    copy = Tokenizer.from_str(json.dumps(state))
    return (copy, names) if all(copy.token_to_id(names[word]) == number for number, word in special.items()) else None
