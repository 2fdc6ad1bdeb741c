"""Renders and tokenizes chats with a tokenizer's chat template; text in messages never becomes a control token.

The template comes with the model and is untrusted code: it runs in transformers' sandbox, under limits.
"""

import json
import re
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from qlora_dpo.data.dialogue import InvalidRow, Message, sanitize_text
from qlora_dpo.data.encoded import TokenIds
from qlora_dpo.data.templates.template_limits import LimitExceeded, limit_resources

Chat = Sequence[Message]

TEMPLATE_SECONDS, TEMPLATE_SECONDS_PER_CHAT = 10.0, 0.05
"""Time limit of a template, and its addition per chat; the slowest common one takes under a millisecond per chat."""
TEMPLATE_MEMORY_BYTES = 2**30
"""Memory that a template may allocate."""
MAX_EXTRA_CHARACTERS = 100_000
"""Characters that a template may write beyond twenty times the length of the chat."""

MAX_CACHED_TURN_TOKENS = 2**22
"""Tokens in the cache of turns: with their texts, about 40 MB."""

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError)
"""Exceptions of a template that refuses a conversation."""

SYSTEM_FOLDED = "system turn written before the first question"
CONTROL_AS_TEXT = "control tokens read as text"
PARTLY_WRITTEN = "the chat template leaves out a part of the answer, such as its <think> block"

_PRIVATE_USE_AREA, _RENAMED_TOKENS_START = range(0xE000, 0xF900), 0xF0000
"""Unicode private use areas: stand-ins for control tokens in messages, and for the tokenizer's own control tokens."""


@dataclass(frozen=True)
class TemplateTraits:
    """How a tokenizer and its template treat the text of messages."""

    special_pattern: re.Pattern[str] | None
    """Matches the tokenizer's control tokens in text, where they would forge or end turns."""
    folds_system: bool
    """True if the template has no system turn; its text is then written before the first question."""


def tokenize_chats(
    tokenizer: Any, prompts: Sequence[Chat], answered: Sequence[Chat], tools: Sequence[str] = ()
) -> list[TokenIds]:
    """Token ids of each chat as the template writes it: first of `prompts`, up to where the assistant starts to write.

    They equal `apply_chat_template`'s, except that a control token in somebody's text (`<|im_end|>`) is tokenized as
    plain characters. Raises InvalidRow if the tokenizer cannot do that, or if the template writes only a part of an
    answer, one of TEMPLATE_ERRORS if the template refuses a chat, and LimitExceeded if it runs or writes without end.

    Together they take half the time, since the turns of a prompt are also in its answered chats. `tools` holds the JSON
    text of each chat's tools, if there are any.
    """
    traits, chats = template_traits(tokenizer), [*prompts, *answered]
    masked = [
        _mask_control_tokens(traits, fold_system(traits, chat), chat_tools)
        for chat, chat_tools in zip(chats, list(tools) or [""] * len(chats), strict=True)
    ]
    inputs, count = [TemplateInput(chat, chat_tools) for chat, chat_tools, _ in masked], len(prompts)
    texts = _render_inputs(tokenizer, inputs[:count], answered=False)
    texts += _render_inputs(tokenizer, inputs[count:], answered=True)
    if len(set(texts[count:])) > 1:  # answers that the template makes equal have that as their reason
        for template_input, text in zip(inputs[count:], texts[count:], strict=True):
            if not _is_within(template_input.chat[-1]["content"], text):
                raise InvalidRow(PARTLY_WRITTEN)
    return [
        _tokenize_masked(tokenizer, traits, text, words) if words else ids
        for text, ids, (_, _, words) in zip(texts, tokenize_texts(tokenizer, texts), masked, strict=True)
    ]


def _is_within(answer: str, text: str) -> bool:
    """True if a text holds an answer, but for white space."""
    return answer.strip() in text or "".join(answer.split()) in "".join(text.split())


@dataclass(frozen=True)
class TemplateInput:
    """The input of a template: a chat, and its tools as JSON text."""

    chat: list[Message]
    tools: str = ""


def render_chats(tokenizer: Any, chats: Sequence[Chat], answered: bool) -> list[str]:
    """The template's text of each chat, as it stands; raises as `tokenize_chats` does."""
    return _render_inputs(tokenizer, [TemplateInput(list(chat)) for chat in chats], answered)


def _render_inputs(tokenizer: Any, inputs: Sequence[TemplateInput], answered: bool) -> list[str]:
    if not inputs:
        return []
    with limit_resources(TEMPLATE_SECONDS + TEMPLATE_SECONDS_PER_CHAT * len(inputs), TEMPLATE_MEMORY_BYTES):
        texts = [_apply_template(tokenizer, inputs[0], answered)]
        if len(inputs) > 1:
            texts += _render_remaining(tokenizer, inputs, answered, texts[0])
    for template_input, text in zip(inputs, texts, strict=True):
        num_characters = sum(len(turn["content"]) for turn in template_input.chat) + len(template_input.tools)
        limit = 20 * num_characters + MAX_EXTRA_CHARACTERS
        if len(text) > limit:
            raise LimitExceeded(f"writes {len(text):,} characters for a chat that needs no more than {limit:,}")
    return texts


def _apply_template(tokenizer: Any, template_input: TemplateInput, answered: bool) -> str:
    chat, tools = template_input.chat, json.loads(template_input.tools) if template_input.tools else None
    return str(tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=not answered))


def _render_remaining(tokenizer: Any, inputs: Sequence[TemplateInput], answered: bool, first: str) -> list[str]:
    """The texts of all chats but the first, whose text is `first`.

    Two thirds of the time of `apply_chat_template` go into converting chats to plain objects, which these are already.
    So the compiled template is rendered directly, in the same sandbox, provided that it also writes `first`.
    """
    special_tokens_map = tokenizer.special_tokens_map
    template = _compile_jinja_template(tokenizer.get_chat_template())

    def render(template_input: TemplateInput) -> str:
        tools = json.loads(template_input.tools) if template_input.tools else None
        return str(
            template.render(
                messages=template_input.chat,
                tools=tools,
                documents=None,
                add_generation_prompt=not answered,
                **special_tokens_map,
            )
        )

    if render(inputs[0]) == first:
        return [render(template_input) for template_input in inputs[1:]]
    return [_apply_template(tokenizer, template_input, answered) for template_input in inputs[1:]]


def template_date(tokenizer: Any) -> str:
    """Today's date if the chat template writes the date, as those of Llama 3 and SmolLM3 do; otherwise empty."""
    return datetime.now().astimezone().date().isoformat() if "strftime_now" in str(tokenizer.chat_template) else ""


def supports_tools(tokenizer: Any) -> bool:
    """True if the template writes the tools that are passed to it."""
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

    If control tokens separate turns, each distinct turn is tokenized once while it is cached: a prompt's turns are in
    three texts of a pair, and often in several pairs, and are most of the work.
    """
    added = _added_tokens(tokenizer) if len(texts) > 1 else None
    if added is not None:
        first = _tokenize_uncached(tokenizer, texts[:1])  # this also resets truncation and padding
        pieces = [added.pattern.split(text) for text in texts]
        turns = set(chain.from_iterable(pieces)) - added.ids.keys() - {""}
        ids = {**_turn_cache(tokenizer).token_ids(turns), **added.ids, "": ()}
        joined = [tuple(chain.from_iterable(map(ids.__getitem__, parts))) for parts in pieces]
        if joined[:1] == first:
            return joined
    return _tokenize_uncached(tokenizer, texts)


class _TurnCache:
    """The ids of recently tokenized turns, in 4 bytes each."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.ids_by_turn: dict[str, array[int]] = {}
        self.num_tokens = 0

    def token_ids(self, turns: Collection[str]) -> dict[str, "Sequence[int]"]:
        """The ids of each of `turns`; the oldest entries are evicted if there are too many."""
        new = [turn for turn in turns if turn not in self.ids_by_turn]
        for turn, encoding in zip(new, self.backend.encode_batch_fast(new, add_special_tokens=False), strict=True):
            self.ids_by_turn[turn] = array("I", encoding.ids)
            self.num_tokens += len(encoding.ids)
        ids_by_turn: dict[str, Sequence[int]] = {turn: self.ids_by_turn[turn] for turn in turns}
        while self.num_tokens > MAX_CACHED_TURN_TOKENS:
            self.num_tokens -= len(self.ids_by_turn.pop(next(iter(self.ids_by_turn))))
        return ids_by_turn


@lru_cache(maxsize=4)
def _turn_cache(tokenizer: Any) -> _TurnCache:
    return _TurnCache(tokenizer.backend_tokenizer)


def clear_turn_cache() -> None:
    """Free the memory of the cached turns."""
    _turn_cache.cache_clear()


def _tokenize_uncached(tokenizer: Any, texts: Sequence[str]) -> list[TokenIds]:
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(ids) for ids in encoded["input_ids"]]


@dataclass(frozen=True)
class _AddedTokens:
    """The added tokens of a vocabulary: a pattern that splits a text at them, and their ids."""

    pattern: re.Pattern[str]
    ids: Mapping[str, list[int]]


@lru_cache(maxsize=8)
def _added_tokens(tokenizer: Any) -> _AddedTokens | None:
    """The added tokens of `tokenizer`, if the text between two of them is always tokenized on its own.

    None if it is not: an added token strips the white space around it or must be a whole word, or the start of a text
    is tokenized differently (Metaspace).
    """
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return None
    backend = tokenizer.backend_tokenizer  # its JSON would hold the whole vocabulary
    tokens = backend.get_added_tokens_decoder()
    looks_around = any(token.lstrip or token.rstrip or token.single_word for token in tokens.values())
    # tokens that are matched in normalized text are found within the pieces
    ids = {token.content: [number] for number, token in tokens.items() if not token.normalized}
    if not ids or looks_around or "Metaspace" in repr(backend.pre_tokenizer):
        return None
    return _AddedTokens(re.compile(f"({'|'.join(map(re.escape, sorted(ids, key=len, reverse=True)))})"), ids)


def template_traits(tokenizer: Any) -> TemplateTraits:
    """The traits of `tokenizer` and its template, found by rendering probes."""
    return _template_traits(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _template_traits(tokenizer: Any, template: str) -> TemplateTraits:
    words = sorted(filter(str.strip, control_tokens(tokenizer).values()), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, words))) if words else None
    return TemplateTraits(special, _detect_system_folding(tokenizer))


def _detect_system_folding(tokenizer: Any) -> bool:
    """True if the template renders a question and an answer, but refuses or omits a system turn before them."""
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


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that text must not forge, by id: `special_tokens`, and added ones that mark the template's turns."""
    return special_tokens(tokenizer) | _turn_tokens(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _turn_tokens(tokenizer: Any, template: str) -> dict[int, str]:
    """Added tokens that are not flagged as special and stand in a rendered conversation all the same.

    The assistant's turn is not the last, since some templates write an empty `<think>` block there, which is text. Of
    plain words and white space, which may be added tokens too, only marks with brackets or bars count.
    """
    question: Message = {"role": "user", "content": "Is it so?"}
    chats = [[question, {"role": "assistant", "content": "Yes."}, question], [question]]
    try:
        text = "".join(render_chats(tokenizer, chats, answered=True))
    except (*TEMPLATE_ERRORS, LimitExceeded):
        return {}
    added = {int(number): token for number, token in tokenizer.added_tokens_decoder.items()}
    return {
        number: token.content
        for number, token in added.items()
        if not token.special and token.content in text and re.search(r"[<>\[\]{}|\uff5c]", token.content)
    }


def fold_system(traits: TemplateTraits, chat: Chat) -> list[Message]:
    """`chat` for this template: a system turn that it has no place for is written before the first question."""
    if not traits.folds_system or len(chat) < 2 or chat[0]["role"] != "system" or chat[1]["role"] != "user":
        return list(chat)
    return [{"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]


def list_repairs(traits: TemplateTraits, chat: Chat, tools: str = "") -> list[str]:
    """The repairs of a chat, in the words of the audit table."""
    repairs = [SYSTEM_FOLDED] if fold_system(traits, chat) != list(chat) else []
    texts = [tools, *(turn["content"] for turn in chat)]
    return (
        [*repairs, CONTROL_AS_TEXT]
        if traits.special_pattern and any(map(traits.special_pattern.search, texts))
        else repairs
    )


def _mask_control_tokens(
    traits: TemplateTraits, chat: list[Message], tools: str
) -> tuple[list[Message], str, Mapping[str, str]]:
    """Chat and tools with each control token in their text replaced by a character, and the token of each character.

    Tools are JSON text: control tokens contain no quote, so they only occur inside its strings.
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
    *masked, tools = [traits.special_pattern.sub(lambda match: letters[match[0]], text) for text in contents]
    chat = [{"role": turn["role"], "content": text} for turn, text in zip(chat, masked, strict=True)]
    return chat, tools, {letter: word for word, letter in letters.items()}


def _tokenize_masked(tokenizer: Any, traits: TemplateTraits, text: str, words: Mapping[str, str]) -> TokenIds:
    """Ids of a rendered text, with its masked control tokens restored as text.

    A copy of the tokenizer with renamed control tokens is used, and the template's own control tokens are renamed to
    match. Raises InvalidRow if no such copy can be made.
    """
    renamed = _renamed_tokenizer(tokenizer) if tokenizer.is_fast else None
    if renamed is None or traits.special_pattern is None or any(name in text for name in renamed[1].values()):
        raise InvalidRow(
            f"text holds the control token {sanitize_text(min(words.values()))}, which cannot be read as text"
        )
    copy, names = renamed
    text = traits.special_pattern.sub(lambda match: names[match[0]], text)
    for letter, word in words.items():
        text = text.replace(letter, word)
    return tuple(copy.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=2)
def _renamed_tokenizer(tokenizer: Any) -> tuple[Tokenizer, dict[str, str]] | None:
    """A copy of a tokenizer whose control tokens are renamed to private characters, and their new names.

    None if a renamed control token would get another id.
    """
    special = control_tokens(tokenizer)
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
