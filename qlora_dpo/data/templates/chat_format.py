"""Finds where an answer begins and ends in a chat template, by rendering a probe."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora_dpo.data.dialogue import InvalidRow, Message
from qlora_dpo.data.encoded import TokenIds
from qlora_dpo.data.templates.chat_template import TEMPLATE_ERRORS, render_chats, special_tokens, tokenize_texts
from qlora_dpo.data.templates.template_limits import LimitExceeded
from qlora_dpo.errors import ModelError

ANSWER_MERGES = "answer's first token merges with the prompt"
_PROBE_ANSWER = "Yes."
_EMPTY_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")
_PROBE_CHAT: list[Message] = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": _PROBE_ANSWER}]


@dataclass(frozen=True)
class ChatFormat:
    """The end of an assistant turn: what the template writes after an answer.

    The token `end_token_id` is the first special token after the answer (`<|im_end|>`, `<|eot_id|>`, `</s>`): a model
    stops there, so it is scored. The `num_trailing` tokens that the template writes behind it (a line break in ChatML)
    are never generated, because generation has stopped; they are cut off and not scored. TRL scores them.
    """

    end_token_id: int
    num_trailing: int
    eos_appended: bool
    """True if the template writes no special token after an answer; `end_token_id` is then the tokenizer's eos token,
    which is appended.
    """
    empty_thoughts: TokenIds = ()
    """The empty `<think>` block that the template writes between the generation prompt and an answer, if it does."""

    @property
    def note(self) -> str:
        """A sentence for the audit if the end token is appended; otherwise empty."""
        return (
            "the chat template ends no answer, so the end-of-text token is added to each" if self.eos_appended else ""
        )


def detect_chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Probe the chat template of `tokenizer`.

    Raises ModelError if there is none, if it fails, or if it does not keep the prompt as a prefix of the answer.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the model's tokenizer has no chat template, as base models have none; give it one with "
            'model.chat_template = "plain" (or "chatml", or a .jinja file), or name an instruct model in model.name'
        )
    try:
        prompt = render_chats(tokenizer, [_PROBE_CHAT[:1]], answered=False)[0]
        whole = render_chats(tokenizer, [_PROBE_CHAT], answered=True)[0]
    except TEMPLATE_ERRORS as error:
        raise ModelError(f"the model's chat template fails on a question and an answer: {error}") from error
    except LimitExceeded as error:
        raise ModelError(
            f"the model's chat template {error}; name another model, this one's files are broken"
        ) from error
    prompt_ids, whole_ids = tokenize_texts(tokenizer, [prompt, whole])
    if whole_ids[: len(prompt_ids)] != prompt_ids or _PROBE_ANSWER not in whole[len(prompt) :]:
        raise ModelError(
            "the model's chat template does not write an answer behind the prompt as generation sees it "
            f"(the prompt ends with {prompt[-30:]!r}), so answers cannot be scored; name a model with another template"
        )
    specials = special_tokens(tokenizer)
    tail = tokenize_texts(tokenizer, [whole[whole.rindex(_PROBE_ANSWER) + len(_PROBE_ANSWER) :]])[0]
    ends = [token for token in tail if token in specials]
    if not ends and tokenizer.eos_token_id is None:
        raise ModelError("the model's chat template ends no answer and its tokenizer has no end-of-text token")
    end = ends[0] if ends else int(tokenizer.eos_token_id)
    trailing = len(tail) - 1 - tail.index(end) if ends else 0
    before_answer = whole[: whole.rindex(_PROBE_ANSWER)]
    thoughts: TokenIds = ()
    if _EMPTY_THOUGHTS.fullmatch(before_answer[len(prompt) :]):
        before_ids = tokenize_texts(tokenizer, [before_answer])[0]
        thoughts = before_ids[len(prompt_ids) :] if whole_ids[: len(before_ids)] == before_ids else ()
    return ChatFormat(end, trailing, not ends, thoughts)


def prompt_ids_of(chat_format: ChatFormat, prompt: TokenIds, answered: Sequence[TokenIds]) -> TokenIds:
    """The ids before what is scored: those of the prompt, and of an empty `<think>` block that all answers begin with.

    The template writes the block, not the model. Where an answer has thoughts, they are scored.
    """
    whole = (*prompt, *chat_format.empty_thoughts)
    return whole if all(full[: len(whole)] == whole for full in answered) else prompt


def answer_ids(chat_format: ChatFormat, prompt: TokenIds, full: TokenIds) -> TokenIds:
    """The scored ids of an answer: the part of `full` after `prompt`, up to and including the end token.

    Raises InvalidRow if `prompt` is not a prefix of `full` (the tokenizer merges the answer's first characters with the
    prompt's last ones), or if the end token is not where the template puts it.
    """
    if full[: len(prompt)] != prompt:
        raise InvalidRow(ANSWER_MERGES)
    if chat_format.eos_appended:
        return (*full[len(prompt) :], chat_format.end_token_id)
    answer = full[len(prompt) : len(full) - chat_format.num_trailing]
    if not answer or answer[-1] != chat_format.end_token_id:
        raise InvalidRow("answer does not end with the template's end token")
    return answer
