"""Text that a chat template has already written: recognised by the marks of known model families, read as its turns."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qlora_dpo.data.dialogue import InvalidRow, Message, is_hh
from qlora_dpo.data.rows.messages import ROLE_NAMES

END_MARKS = (
    "<|im_end|>",
    "</s>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<end_of_turn>",
    "<turn|>",
    "<eos>",
    "<|endoftext|>",
    "<|end|>",
    "<|return|>",
    "<|eot|>",
    "<|eom|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_role|>",
    "<｜end▁of▁sentence｜>",
    "[|endofturn|]",
    "<seed:eos>",
    "<|assistant_end|>",
    "<|user_end|>",
    "<|system_end|>",
    "[/SYSTEM_PROMPT]",
    "<EOS_TOKEN>",
    "<|eos|>",
    "<|eod|>",
    "[e~[",
    "<_end>",
    "[EOS]",
)
"""Marks that end a turn or a text."""


@dataclass(frozen=True, eq=False)
class MarkFamily:
    """The marks that a family of chat templates writes around turns. Each is equal to itself alone."""

    name: str
    """Its name in the audit."""
    turn: re.Pattern[str]
    """Matches where a turn begins; the one group that matches holds its role's name, or has it."""
    start: re.Pattern[str]
    """Matches what may stand before the first turn."""
    is_control: bool = True
    """True if its marks are control tokens; False for words that people write too."""
    has_lead: bool = False
    """True if text before the first turn is a system turn."""
    trims: bool = False
    """True if the white space around a turn's text is the template's."""
    ends: tuple[str, ...] = END_MARKS
    """Marks that end a turn or a text."""

    def opens(self, text: str) -> bool:
        """True if a text begins with a turn."""
        started = self.start.match(text)
        return self.turn.match(text, started.end() if started else 0) is not None


_MENTIONED_ENDS = ("</s>", "[EOS]")
"""Marks that also occur in HTML or in prose."""


def _family(
    name: str, turn: str, start: str = "", *, is_control: bool = True, has_lead: bool = False, trims: bool = False
) -> MarkFamily:
    start_pattern = re.compile(rf"\s*(?:(?:{start})\s*)*" if start else r"\s*")
    return MarkFamily(name, re.compile(turn), start_pattern, is_control, has_lead, trims or not is_control)


_BOS = r"<s>|\[gMASK\]|<sop>|<\|endoftext\|>|<\|begin_of_text\|>|<bos>|<\|bom\|>|<BOS_TOKEN>|<\|startoftext\|>"
_VICUNA_LEAD = r"A chat between a curious"
_ALPACA_LEAD = r"Below is an instruction that describes a task[^\n]*"

FAMILIES = (
    _family("ChatML", r"<\|im_start\|>[ \t]*(\w+)(?:<\|im_sep\|>|[ \t]*\n|[ \t]+|$)", _BOS),
    _family("Kimi", r"<\|im_(system|user|assistant)\|>\w*<\|im_middle\|>", _BOS),
    _family("Llama 3", r"<\|start_header_id\|>[ \t]*(\w+)[ \t]*<\|end_header_id\|>\n{0,2}", _BOS),
    _family("Llama 4", r"<\|header_start\|>(\w+)<\|header_end\|>\n{0,2}", r"<\|begin_of_text\|>"),
    _family("Llama 2 and Mistral", r"(?:<s>)?\s?(\[INST\])| ?(\[/INST\])|(\[SYSTEM_PROMPT\])", _BOS, trims=True),
    _family("Gemma", r"<start_of_turn>(\w+)(?:\n|$)", _BOS),
    _family("Gemma 4", r"<\|turn>(\w+)(?:\n|$)", _BOS),
    _family("Command R", r"<\|START_OF_TURN_TOKEN\|><\|(SYSTEM|USER|CHATBOT)_TOKEN\|>", _BOS),
    _family("Granite", r"<\|start_of_role\|>(\w+)<\|end_of_role\|>", _BOS),
    _family("Harmony", r"<\|start\|>(\w+)(?:<\|channel\|>final)?(?:<\|message\|>|$)"),
    _family(
        "Phi, Zephyr and Tulu",
        r"(?:<\|bom\|>)?<\|(system|developer|user|human|prompter|assistant|tool|observation)\|>[ \t]?\n?",
        _BOS,
    ),
    _family("DeepSeek", r"<｜(User|Assistant)｜>", r"<｜begin▁of▁sentence｜>", has_lead=True),
    _family("EXAONE", r"\[\|(system|user|assistant|tool)\|\] ?"),
    _family("Seed", r"<seed:bos>(\w+)(?:\n|$)"),
    _family("Apertus", r"<\|(system|developer|user|assistant)_start\|>", _BOS),
    _family("OpenChat", r"GPT4 Correct (User|Assistant|System):[ ]?", _BOS),
    _family(
        "Alpaca",
        r"### ?(Instruction|Input|Response|Human|User|Assistant|System)[ ]?:[ \t]*\n?",
        rf"{_BOS}|{_ALPACA_LEAD}",
        is_control=False,
    ),
    _family("Vicuna", r"(?:^|(?<=\s)|(?<=</s>))(USER|ASSISTANT):[ ]?", _BOS, is_control=False, has_lead=True),
    _family("User and Assistant", r"(?:^|(?<=\n))(User|Assistant|System):[ ]?", _BOS, is_control=False),
)

_MARK_ROLES = {
    **ROLE_NAMES,
    "[inst]": "user",
    "[/inst]": "assistant",
    "[system_prompt]": "system",
    "instruction": "user",
    "input": "input",
    "response": "assistant",
}
_LLAMA_SYSTEM = re.compile(r"\s*<<SYS>>\n?(.*?)\n?<</SYS>>\s*", re.DOTALL)

_OPENER = re.compile(
    rf"\s*(?:(?:{_BOS})\s*)*(?:<\||<start_of_turn>|\[INST\]|\[SYSTEM_PROMPT\]|\[\||<seed:bos>|GPT4 Correct|###"
    rf"|{_ALPACA_LEAD}|{_VICUNA_LEAD}|USER:|User:|System:)"
)
_DEEPSEEK_USER = "<｜User｜>"


@dataclass(frozen=True)
class RenderedText:
    """The turns of a text."""

    family: MarkFamily
    turns: tuple[Message, ...]
    is_open: bool
    """True if an assistant turn waits for its answer behind them."""
    is_closed: bool
    """True if a mark ends the last of them."""


@lru_cache(maxsize=64)
def read_rendered(text: str, families: tuple[MarkFamily, ...] = FAMILIES) -> RenderedText | None:
    """The turns of a text that is marked as one of `families`, the first that can read it, from start to end.

    None for any other text: one that only mentions marks, that has words outside of turns, or whose roles are unknown.
    """
    if not _may_be_rendered(text, families):
        return None
    for candidate in families:
        if (read := _read_as(candidate, text)) is not None:
            return read
    return None


def _may_be_rendered(text: str, families: tuple[MarkFamily, ...]) -> bool:
    """False for nearly every text that is not: it begins otherwise."""
    if is_hh(text):
        return False
    return (
        _OPENER.match(text) is not None
        or _DEEPSEEK_USER in text
        or any(family.opens(text) for family in _unnamed(families))
    )


@lru_cache(maxsize=8)
def _unnamed(families: tuple[MarkFamily, ...]) -> tuple[MarkFamily, ...]:
    """Those whose openings are not in `_OPENER`: a model's own marks."""
    return tuple(family for family in families if family not in FAMILIES)


def _read_as(family: MarkFamily, text: str) -> RenderedText | None:
    started = family.start.match(text)
    text = text[started.end() :] if started else text
    marks = list(family.turn.finditer(text))
    lead = text[: marks[0].start()].strip() if marks else ""
    if not marks or (lead and not (family.has_lead and (family.is_control or lead.startswith(_VICUNA_LEAD)))):
        return None
    turns: list[Message] = [{"role": "system", "content": lead}] if lead else []
    is_closed = False
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        role = _MARK_ROLES.get(_role_name(mark))
        whole = text[mark.end() : following.start() if following else len(text)]
        content, end = _split_end(whole, family.ends)
        is_closed = end is not None
        content = content.strip() if family.trims else content if is_closed else content.removesuffix("\n")
        if role is None or (following is not None and _has_loose_text(content, family.ends)):
            return None
        if role == "input":
            if not turns or turns[-1]["role"] != "user":
                return None
            turns[-1]["content"] += f"\n{content}"
            continue
        if not turns and role == "user" and (system := _LLAMA_SYSTEM.match(content)):
            turns.append({"role": "system", "content": system[1]})
            content = content[system.end() :]
        turns.append({"role": role, "content": content})
    is_open = turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() and not is_closed
    if is_open:
        turns.pop()
    has_question = any(turn["role"] == "user" for turn in turns)
    return RenderedText(family, tuple(turns), is_open, is_closed) if has_question else None


def _role_name(mark: re.Match[str]) -> str:
    return mark.lastgroup or str(mark[mark.lastindex or 0]).casefold()


def _has_loose_text(content: str, ends: tuple[str, ...]) -> bool:
    """True if a turn ended before its text did: words stand between two turns."""
    return any(end in content for end in ends if end not in _MENTIONED_ENDS)


def _split_end(text: str, ends: tuple[str, ...]) -> tuple[str, str | None]:
    """A text without marks of `ends` at its very end and the white space around them, and the last; None if none."""
    rest, last = text.rstrip(), None
    rest = rest.removesuffix("<s>").rstrip() if rest.endswith("<s>") and "</s>" in rest[-12:] else rest
    while end := next((mark for mark in ends if rest.endswith(mark)), None):
        rest, last = rest.removesuffix(end).rstrip(), last or end
    return (text, None) if last is None else (rest, last)


def find_prompt_family(text: str, families: tuple[MarkFamily, ...]) -> MarkFamily | None:
    """The one of `families` whose marks make up the whole of a prompt that waits for an answer, if there is one."""
    rendered = read_rendered(text, families)
    if rendered is None:
        return None
    ends_with_user = rendered.turns[-1]["role"] in ("user", "tool") and rendered.is_closed
    return rendered.family if rendered.is_open or ends_with_user else None


def find_chat_family(text: str, families: tuple[MarkFamily, ...]) -> MarkFamily | None:
    """The one of `families` whose marks make up the whole of a chat that ends with an answer, if there is one."""
    rendered = read_rendered(text, families)
    ends_with_answer = rendered is not None and not rendered.is_open and rendered.turns[-1]["role"] == "assistant"
    return rendered.family if rendered is not None and ends_with_answer else None


def find_answer_family(text: str, families: tuple[MarkFamily, ...]) -> MarkFamily | None:
    """The one of `families` whose marks an answer has: a whole chat, or an assistant turn from its mark to its end."""
    if not _may_be_rendered(text, families):
        return None
    if (family := find_chat_family(text, families)) is not None:
        return family
    for family in families:
        opened = family.turn.match(text.lstrip()) if family.is_control else None
        if (
            opened is not None
            and _MARK_ROLES.get(_role_name(opened)) == "assistant"
            and _split_end(text, family.ends)[1] is not None
        ):
            return family
    return None


def split_rendered_prompt(prompt: str, family: MarkFamily) -> tuple[Message, ...]:
    """The turns of a prompt; raises InvalidRow if it is not marked throughout, as the other rows' are."""
    if not prompt.strip():
        raise InvalidRow("empty turn in the prompt")
    rendered = read_rendered(prompt, (family,))
    if rendered is None or rendered.turns[-1]["role"] == "assistant":
        raise InvalidRow(f"prompt cannot be read as turns of {family.name} marks, as the other rows' are")
    return rendered.turns


def split_rendered_answer(answer: str, prompt: Sequence[Message] | None, family: MarkFamily) -> tuple[Message, ...]:
    """The turns of an answer: text with or without the mark that ends it, turns that go on, or the whole chat.

    A whole chat loses the turns of `prompt`; without a prompt it must be one. Raises InvalidRow if it is another chat.
    """
    rendered = read_rendered(answer, (family,))
    if rendered is not None and prompt is not None:
        if rendered.turns[: len(prompt)] != tuple(prompt):
            raise InvalidRow("prompt column is not the prompt of the chats")
        return rendered.turns[len(prompt) :]
    if rendered is not None:
        return rendered.turns
    if prompt is None:
        raise InvalidRow(f"a chat cannot be read as turns of {family.name} marks, as the other rows' are")
    opened = family.turn.match(answer.lstrip())
    if opened is not None and _MARK_ROLES.get(_role_name(opened)) == "assistant":
        answer = answer.lstrip()[opened.end() :]  # the prompt's open turn again
    following = family.turn.search(answer)
    if (
        following is not None
        and family.is_control
        and _split_end(answer[: following.start()], family.ends)[1] is not None
    ):
        raise InvalidRow("answer holds more than one turn")
    text, _ = _split_end(answer, family.ends)
    return ({"role": "assistant", "content": text.removeprefix(" ") if family.trims else text},)


def find_end_marks(answers: Iterable[str], known: tuple[str, ...]) -> frozenset[str]:
    """Those `known` marks that end at least half of these answers, as templates write them and people do not."""
    ends = [_split_end(answer, known)[1] for answer in answers]
    found = [end for end in ends if end is not None]
    return frozenset(found) if found and 2 * len(found) >= len(ends) else frozenset()


def strip_end_marks(
    answers: Sequence[str], marks: frozenset[str], known: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """The answers without a `known` mark at their very end, and the marks that were left out.

    A mark is one if it is among `marks`, or if all answers (two at least) end with it and none with a space before it,
    as a sentence about the mark would.
    """
    split = [_split_end(answer, known) for answer in answers]
    ends = [end for _, end in split]
    is_shared = len(answers) > 1 and None not in ends and len(set(ends)) == 1
    are_template_text = is_shared and not any(map(_may_be_mentioned, answers, split))
    kept = [
        body if end is not None and (are_template_text or end in marks) else answer
        for answer, (body, end) in zip(answers, split, strict=True)
    ]
    removed = [end for answer, text, end in zip(answers, kept, ends, strict=True) if end is not None and answer != text]
    return kept, list(dict.fromkeys(removed))


def _may_be_mentioned(answer: str, split: tuple[str, str | None]) -> bool:
    """True if an answer may be about the mark at its end: a space or a quote is before it, or it closes HTML."""
    body, _ = split
    return not body or answer[len(body)].isspace() or body[-1] in "\"'`([" or "<s>" in body
