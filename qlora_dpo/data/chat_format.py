"""How a tokenizer's chat template writes a conversation: as text, as token ids, and where an assistant turn ends."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora_dpo.data.dialogue import Message, Unusable, printable
from qlora_dpo.data.encoded import Ids
from qlora_dpo.errors import ModelError

Chat = Sequence[Message]

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
    special: re.Pattern[str] | None
    """Finds the tokenizer's special tokens in text, where they would be read as tokens and forge or end turns."""

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
        prompt = render(tokenizer, [_PROBE[:1]], answered=False)[0]
        whole = render(tokenizer, [_PROBE], answered=True)[0]
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(f"the model's chat template fails on a question and an answer: {error}") from error
    prompt_ids, whole_ids = tokenize(tokenizer, [prompt, whole])
    if whole_ids[: len(prompt_ids)] != prompt_ids or _ANSWER not in whole[len(prompt) :]:
        raise ModelError(
            "the model's chat template does not write an answer behind the prompt as generation sees it "
            f"(the prompt ends with {prompt[-30:]!r}), so answers cannot be scored; name a model with another template"
        )
    specials = _special_tokens(tokenizer)
    tail = tokenize(tokenizer, [whole[whole.rindex(_ANSWER) + len(_ANSWER) :]])[0]
    ends = [each for each in tail if each in specials]
    if not ends and tokenizer.eos_token_id is None:
        raise ModelError("the model's chat template ends no answer and its tokenizer has no end-of-text token")
    end = ends[0] if ends else int(tokenizer.eos_token_id)
    trailing = len(tail) - 1 - tail.index(end) if ends else 0
    words = sorted(filter(str.strip, specials.values()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, words))) if words else None
    return ChatFormat(end, trailing, not ends, pattern)


def render(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], answered: bool) -> list[str]:
    """The template's text of each chat; without an answer, the text ends where the assistant starts to write."""
    texts = tokenizer.apply_chat_template(
        [list(chat) for chat in chats], tokenize=False, add_generation_prompt=not answered
    )
    return [str(text) for text in texts]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Token ids of rendered texts, nothing added: the ids that `apply_chat_template` gives."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(ids) for ids in encoded["input_ids"]]


def check_text(chat_format: ChatFormat, chat: Chat) -> None:
    """Raise Unusable if a turn holds a special token of the tokenizer as text."""
    if chat_format.special is None:
        return
    for turn in chat:
        if found := chat_format.special.search(turn["content"]):
            raise Unusable(f"text holds the special token {printable(found[0])}")


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


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = {int(number): token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added
