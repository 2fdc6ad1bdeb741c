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

from qlora_dpo.data.dialogue import InvalidRow, Message, sanitize_text
from qlora_dpo.data.encoded import TokenIds
from qlora_dpo.data.template_limits import LimitExceeded, limit_resources

Chat = Sequence[Message]

TEMPLATE_SECONDS, TEMPLATE_SECONDS_PER_CHAT = 10.0, 0.05
"""A template may take so long; the slowest of the usual ones takes under a millisecond for a chat."""
TEMPLATE_MEMORY_BYTES = 2**30
"""A template may ask for so much memory."""
MAX_EXTRA_CHARACTERS = 100_000
"""Characters that a template may write beside twenty times what stands in the chat."""

MAX_CACHED_TURN_TOKENS = 2**22
"""Tokens of turns that are remembered: with their texts, about 40 MB."""

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError)
"""What a template raises that does not take a conversation."""

SYSTEM_FOLDED = "system turn written before the first question"
CONTROL_AS_TEXT = "control tokens read as text"

_PRIVATE_USE_AREA, _RENAMED_TOKENS_START = range(0xE000, 0xF900), 0xF0000
"""Characters of Unicode's private use areas: they stand for what somebody wrote, and for the tokens themselves."""


@dataclass(frozen=True)
class TemplateTraits:
    """What a tokenizer and its template do with what somebody wrote."""

    special_pattern: re.Pattern[str] | None
    """Finds the tokenizer's control tokens in text, where they would forge or end turns."""
    folds_system: bool
    """True if the template has no system turn: its text then stands before the first question."""


def tokenize_chats(
    tokenizer: Any, prompts: Sequence[Chat], answered: Sequence[Chat], tools: Sequence[str] = ()
) -> list[TokenIds]:
    """Token ids of each chat as the template writes it: first of `prompts`, up to where the assistant starts to write.

    They equal `apply_chat_template`'s, except that a control token in somebody's text (`<|im_end|>`) is tokenized as
    plain characters. Raises InvalidRow if the tokenizer cannot do that, one of TEMPLATE_ERRORS if the template refuses
    a chat, and LimitExceeded if it runs or writes without end.

    Together they take half the time, since the turns of a prompt stand in its answered chats as well. `tools` has the
    JSON text of each chat's tools, if there are any.
    """
    own, chats = template_traits(tokenizer), [*prompts, *answered]
    told = list(tools) or [""] * len(chats)
    masked = [_mask_control_tokens(own, fold_system(own, chat), some) for chat, some in zip(chats, told, strict=True)]
    given, count = [TemplateInput(chat, some) for chat, some, _ in masked], len(prompts)
    texts = _render_inputs(tokenizer, given[:count], answered=False) + _render_inputs(
        tokenizer, given[count:], answered=True
    )
    found = tokenize_texts(tokenizer, texts)
    return [
        _tokenize_masked(tokenizer, own, text, words) if words else ids
        for text, ids, (_, _, words) in zip(texts, found, masked, strict=True)
    ]


@dataclass(frozen=True)
class TemplateInput:
    """What a template is given: a chat, and its tools as JSON text."""

    chat: list[Message]
    tools: str = ""


def render_chats(tokenizer: Any, chats: Sequence[Chat], answered: bool) -> list[str]:
    """The template's text of each chat, as it stands; raises as `tokenize_chats` does."""
    return _render_inputs(tokenizer, [TemplateInput(list(chat)) for chat in chats], answered)


def _render_inputs(tokenizer: Any, given: Sequence[TemplateInput], answered: bool) -> list[str]:
    if not given:
        return []
    with limit_resources(TEMPLATE_SECONDS + TEMPLATE_SECONDS_PER_CHAT * len(given), TEMPLATE_MEMORY_BYTES):
        texts = [_apply_template(tokenizer, given[0], answered)]
        if len(given) > 1:
            texts += _render_remaining(tokenizer, given, answered, texts[0])
    for each, text in zip(given, texts, strict=True):
        most = 20 * (sum(len(turn["content"]) for turn in each.chat) + len(each.tools)) + MAX_EXTRA_CHARACTERS
        if len(text) > most:
            raise LimitExceeded(f"writes {len(text):,} characters for a chat that needs no more than {most:,}")
    return texts


def _apply_template(tokenizer: Any, given: TemplateInput, answered: bool) -> str:
    tools = json.loads(given.tools) if given.tools else None
    return str(
        tokenizer.apply_chat_template(given.chat, tools=tools, tokenize=False, add_generation_prompt=not answered)
    )


def _render_remaining(tokenizer: Any, given: Sequence[TemplateInput], answered: bool, first: str) -> list[str]:
    """The texts of all chats but the first, whose text is `first`.

    Two thirds of the time of `apply_chat_template` go into copying chats of any kind of object into plain ones, which
    ours are. So its compiled template is asked itself, in the same sandbox, if it writes `first` as well.
    """
    named = tokenizer.special_tokens_map
    template = _compile_jinja_template(tokenizer.get_chat_template())

    def write(each: TemplateInput) -> str:
        tools = json.loads(each.tools) if each.tools else None
        return str(
            template.render(
                messages=each.chat, tools=tools, documents=None, add_generation_prompt=not answered, **named
            )
        )

    if write(given[0]) == first:
        return [write(each) for each in given[1:]]
    return [_apply_template(tokenizer, each, answered) for each in given[1:]]


def supports_tools(tokenizer: Any) -> bool:
    """True if the template writes what the tools are that it is told of."""
    return _supports_tools(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _supports_tools(tokenizer: Any, template: str) -> bool:
    name, nothing = "find_the_hour", {"type": "object", "properties": {}}
    function = {"name": name, "description": "Find it.", "parameters": nothing}
    tools = json.dumps([{"type": "function", "function": function}])
    try:
        return name in _apply_template(
            tokenizer, TemplateInput([{"role": "user", "content": "Is it so?"}], tools), False
        )
    except TEMPLATE_ERRORS:
        return False


def tokenize_texts(tokenizer: Any, texts: Sequence[str]) -> list[TokenIds]:
    """Token ids of rendered texts, nothing added: the ids that `apply_chat_template` gives.

    Where control tokens stand between turns, each distinct turn is tokenized once, as long as it is remembered: a
    prompt's turns stand in three texts of a pair, and often in several pairs, and are most of the work.
    """
    added = _added_tokens(tokenizer) if len(texts) > 1 else None
    if added is not None:
        first = _tokenize_uncached(tokenizer, texts[:1])  # it also takes back what was set for truncation and padding
        pieces = [added.pattern.split(text) for text in texts]
        turns = set(chain.from_iterable(pieces)) - added.ids.keys() - {""}
        ids = {**_turn_cache(tokenizer).token_ids(turns), **added.ids, "": ()}
        together = [tuple(chain.from_iterable(map(ids.__getitem__, some))) for some in pieces]
        if together[:1] == first:
            return together
    return _tokenize_uncached(tokenizer, texts)


class _TurnCache:
    """The ids of turns that were tokenized lately, in 4 bytes each."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.ids_by_turn: dict[str, array[int]] = {}
        self.num_tokens = 0

    def token_ids(self, turns: Collection[str]) -> dict[str, "Sequence[int]"]:
        """The ids of each of `turns`; the oldest are forgotten where there are too many."""
        new = [turn for turn in turns if turn not in self.ids_by_turn]
        for turn, found in zip(new, self.backend.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self.ids_by_turn[turn] = array("I", found.ids)
            self.num_tokens += len(found.ids)
        asked: dict[str, Sequence[int]] = {turn: self.ids_by_turn[turn] for turn in turns}
        while self.num_tokens > MAX_CACHED_TURN_TOKENS:
            self.num_tokens -= len(self.ids_by_turn.pop(next(iter(self.ids_by_turn))))
        return asked


@lru_cache(maxsize=4)
def _turn_cache(tokenizer: Any) -> _TurnCache:
    return _TurnCache(tokenizer.backend_tokenizer)


def clear_turn_cache() -> None:
    """Give back the memory of the turns that are remembered."""
    _turn_cache.cache_clear()


def _tokenize_uncached(tokenizer: Any, texts: Sequence[str]) -> list[TokenIds]:
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(ids) for ids in encoded["input_ids"]]


@dataclass(frozen=True)
class _AddedTokens:
    """The tokens that were added to a vocabulary: a pattern that splits a text at them, and their ids."""

    pattern: re.Pattern[str]
    ids: Mapping[str, list[int]]


@lru_cache(maxsize=8)
def _added_tokens(tokenizer: Any) -> _AddedTokens | None:
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
    return _AddedTokens(re.compile(f"({'|'.join(map(re.escape, sorted(ids, key=len, reverse=True)))})"), ids)


def template_traits(tokenizer: Any) -> TemplateTraits:
    """What is known of `tokenizer` and its template, found by looking at what they do."""
    return _template_traits(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _template_traits(tokenizer: Any, template: str) -> TemplateTraits:
    words = sorted(filter(str.strip, special_tokens(tokenizer).values()), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, words))) if words else None
    return TemplateTraits(special, _detect_system_folding(tokenizer))


def _detect_system_folding(tokenizer: Any) -> bool:
    """True if the template takes a question and its answer, but refuses a system turn before them or leaves it out."""
    chat: list[Message] = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}]
    system: Message = {"role": "system", "content": "Answer in one word."}
    try:
        render_chats(tokenizer, [chat], answered=True)
    except TEMPLATE_ERRORS:
        return False
    try:
        return system["content"] not in render_chats(tokenizer, [[system, *chat]], answered=True)[0]
    except TEMPLATE_ERRORS:
        return True


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The control tokens of a tokenizer, by id."""
    added = {int(number): token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added


def fold_system(traits: TemplateTraits, chat: Chat) -> list[Message]:
    """`chat` as this template takes it: without a system turn if it has no place for one."""
    if not traits.folds_system or len(chat) < 2 or chat[0]["role"] != "system" or chat[1]["role"] != "user":
        return list(chat)
    return [{"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]


def list_repairs(traits: TemplateTraits, chat: Chat, tools: str = "") -> list[str]:
    """What is done to a chat before it is trained on, in the words of the audit table."""
    done = [SYSTEM_FOLDED] if fold_system(traits, chat) != list(chat) else []
    texts = [tools, *(turn["content"] for turn in chat)]
    return (
        [*done, CONTROL_AS_TEXT] if traits.special_pattern and any(map(traits.special_pattern.search, texts)) else done
    )


def _mask_control_tokens(
    traits: TemplateTraits, chat: list[Message], tools: str
) -> tuple[list[Message], str, Mapping[str, str]]:
    """Chat and tools with a character of its own for each control token that somebody wrote, and what each stands for.

    Tools are JSON text: no control token has a quote, so a token that stands in it stands inside of a string.
    """
    contents = [*(turn["content"] for turn in chat), tools]
    words = (
        dict.fromkeys(word for text in contents for word in traits.special_pattern.findall(text))
        if traits.special_pattern
        else {}
    )
    if not words or traits.special_pattern is None:
        return chat, tools, {}
    written = set("".join(contents))
    free = (letter for letter in map(chr, _PRIVATE_USE_AREA) if letter not in written)
    letters = dict(zip(words, free, strict=False))
    if len(letters) < len(words):
        raise InvalidRow("text holds control tokens and every character that could stand for them")
    *masked, tools = [traits.special_pattern.sub(lambda found: letters[found[0]], text) for text in contents]
    chat = [{"role": turn["role"], "content": text} for turn, text in zip(chat, masked, strict=True)]
    return chat, tools, {letter: word for word, letter in letters.items()}


def _tokenize_masked(tokenizer: Any, traits: TemplateTraits, text: str, words: Mapping[str, str]) -> TokenIds:
    """Ids of a rendered text whose masked control tokens are put back, as text.

    They are read by a copy of the tokenizer that knows its control tokens under other names, which the template's own
    are given here. Raises InvalidRow if there can be no such copy.
    """
    renamed = _renamed_tokenizer(tokenizer) if tokenizer.is_fast else None
    if renamed is None or traits.special_pattern is None or any(name in text for name in renamed[1].values()):
        raise InvalidRow(
            f"text holds the control token {sanitize_text(min(words.values()))}, which cannot be read as text"
        )
    copy, names = renamed
    text = traits.special_pattern.sub(lambda found: names[found[0]], text)
    for letter, word in words.items():
        text = text.replace(letter, word)
    return tuple(copy.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=2)
def _renamed_tokenizer(tokenizer: Any) -> tuple[Tokenizer, dict[str, str]] | None:
    """A copy of a tokenizer whose control tokens are called after private characters, and the names of all of them.

    None if a control token would get another id under another name.
    """
    special = special_tokens(tokenizer)
    names = {word: chr(_RENAMED_TOKENS_START + number) for number, word in enumerate(special.values())}
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
