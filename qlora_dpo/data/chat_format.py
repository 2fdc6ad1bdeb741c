"""Where an answer begins and ends in a chat template, found by looking at what it writes."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora_dpo.data.chat_template import REFUSALS, rendered, special_tokens, tokenize
from qlora_dpo.data.dialogue import Message, Unusable
from qlora_dpo.data.encoded import Ids
from qlora_dpo.data.template_limits import TooMuch
from qlora_dpo.errors import ModelError

_ANSWER = "Yes."
_PROBE: list[Message] = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": _ANSWER}]


@dataclass(frozen=True)
class ChatFormat:
    """The end of an assistant turn, found by looking at what the template writes after an answer.

    The token `end` is the first special token after the answer (`<|im_end|>`, `<|eot_id|>`, `</s>`): a model stops
    there, so it is scored. What the template writes behind it (a line break in ChatML, `trailing` tokens long) is
    never generated, because generation has stopped; it is cut off and not scored. TRL scores it.
    """

    end: int
    trailing: int
    appended: bool
    """True if the template writes no special token after an answer, and `end` is the tokenizer's eos, added here."""

    @property
    def note(self) -> str:
        """A sentence for the audit where answers do not end as the template says; else empty."""
        return "the chat template ends no answer, so the end-of-text token is added to each" if self.appended else ""


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """Probe the chat template of `tokenizer`.

    Raises ModelError if there is none, if it fails, or if an answer cannot be told from its prompt.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the model's tokenizer has no chat template, as base models have none; name an instruct model in model.name"
        )
    try:
        prompt = rendered(tokenizer, [_PROBE[:1]], answered=False)[0]
        whole = rendered(tokenizer, [_PROBE], answered=True)[0]
    except REFUSALS as error:
        raise ModelError(f"the model's chat template fails on a question and an answer: {error}") from error
    except TooMuch as error:
        raise ModelError(
            f"the model's chat template {error}; name another model, this one's files are broken"
        ) from error
    prompt_ids, whole_ids = tokenize(tokenizer, [prompt, whole])
    if whole_ids[: len(prompt_ids)] != prompt_ids or _ANSWER not in whole[len(prompt) :]:
        raise ModelError(
            "the model's chat template does not write an answer behind the prompt as generation sees it "
            f"(the prompt ends with {prompt[-30:]!r}), so answers cannot be scored; name a model with another template"
        )
    specials = special_tokens(tokenizer)
    tail = tokenize(tokenizer, [whole[whole.rindex(_ANSWER) + len(_ANSWER) :]])[0]
    ends = [each for each in tail if each in specials]
    if not ends and tokenizer.eos_token_id is None:
        raise ModelError("the model's chat template ends no answer and its tokenizer has no end-of-text token")
    end = ends[0] if ends else int(tokenizer.eos_token_id)
    trailing = len(tail) - 1 - tail.index(end) if ends else 0
    return ChatFormat(end, trailing, not ends)


def answer_ids(chat_format: ChatFormat, prompt: Ids, whole: Ids) -> Ids:
    """The scored ids of an answer: what stands in `whole` behind `prompt`, up to and with the end token.

    Raises Unusable if `prompt` is no prefix of `whole` (the tokenizer merges the answer's first characters with the
    prompt's last ones) or if `whole` does not end as the template's chats do.
    """
    if whole[: len(prompt)] != prompt:
        raise Unusable("answer's first token merges with the prompt")
    if chat_format.appended:
        return (*whole[len(prompt) :], chat_format.end)
    answer = whole[len(prompt) : len(whole) - chat_format.trailing]
    if not answer or answer[-1] != chat_format.end:
        raise Unusable("answer does not end with the template's end token")
    return answer
