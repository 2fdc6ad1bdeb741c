"""Every chat template that TRL ships is trained on and talked to, or refused in a sentence."""

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizer_kinds
import trl

from qlora_dpo.data.encode import encode_pairs
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.data.templates.template_settings import apply_template_settings
from qlora_dpo.errors import ModelError
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.talk.generate import stop_token_ids, tokenize_prompt

TEMPLATES = {file.stem: file for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
SHIPPED = sorted(name for name in TEMPLATES if not name.endswith("_training"))  # the others are TRL's own variants
OF_PICTURES = {
    "idefics3": "the model's chat template does not write an answer behind the prompt as generation sees it",
    "smolvlm": "the model's chat template does not write an answer behind the prompt as generation sees it",
    "llava_next": "the model's chat template fails on a question and an answer: 'str object' has no attribute 'text'",
}
"""Templates that read parts of messages, which models of pictures have, and what is said of them."""
NO_THINKING = ("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra")
THINKING_OFF = (*NO_THINKING, "qwen3_5_think", "qwen3_6", "qwen3_8")
NO_OPEN_THOUGHT = ("deepseek_r1_distill", "deepseekv3")
TABLE = ModelTable(name="./model")
THINKING = ModelTable(name="./model", chat_template_kwargs={"enable_thinking": True})
QUESTION = ({"role": "user", "content": "Is it so?"},)


def tokenizer_with(name: str) -> Any:
    """A tokenizer that has the template and, as control tokens, the marks in its text; as words, those of thoughts."""
    made, text = tokenizer_kinds.with_bos(), TEMPLATES[name].read_text(encoding="utf-8")
    made.add_tokens(["<think>", "</think>"])
    marks = {mark for mark in re.findall(r"<[|｜/]?[A-Za-z_▁|]+[|｜]?>", text) if mark not in made.get_vocab()}
    made.add_special_tokens({"additional_special_tokens": sorted(marks)})
    made.chat_template = text
    return made


def encoded(words: Any, chosen: str, rejected: str) -> EncodedPair:
    (pair,) = encode_pairs([Pair(QUESTION, chosen, rejected, 1, {})], words, detect_chat_format(words))
    assert isinstance(pair, EncodedPair), pair
    return pair


def test_trl_ships_templates() -> None:
    assert len(SHIPPED) >= 40
    assert {*OF_PICTURES, *THINKING_OFF, *NO_OPEN_THOUGHT} <= set(SHIPPED)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in OF_PICTURES])
def test_a_template_is_trained_on_as_it_writes_chats_and_talked_to_up_to_its_end(name: str) -> None:
    words = tokenizer_with(name)
    said = apply_template_settings(words, TABLE, "model")
    pair = encoded(words, "Yes.", "No, never.")
    whole = words.apply_chat_template([*QUESTION, {"role": "assistant", "content": "Yes."}], return_dict=False)
    scored = (*pair.prompt, *pair.chosen)
    assert tuple(whole[: len(scored)]) == scored or pair.chosen[-1] == words.eos_token_id
    asked = tokenize_prompt(words, QUESTION)
    assert list(pair.prompt[: len(asked)]) == asked
    assert re.fullmatch(r"\s*(<think>\s*</think>\s*)?", words.decode(pair.prompt[len(asked) :]))
    assert "think" not in words.decode(pair.chosen)
    assert pair.chosen[-1] in stop_token_ids(None, words)
    decided = [sentence.split(",")[0] for sentence in said]
    if name in THINKING_OFF:
        assert decided == ["template: enable_thinking = false"]
    elif name in NO_OPEN_THOUGHT:
        assert decided == ["template: the prompt of an answer no longer ends with <think>"]
    else:
        assert decided == []


@pytest.mark.parametrize("name", OF_PICTURES)
def test_a_template_for_pictures_is_refused_in_a_sentence(name: str) -> None:
    words = tokenizer_with(name)
    assert apply_template_settings(words, TABLE, "model") == []
    with pytest.raises(ModelError, match=re.escape(OF_PICTURES[name])):
        detect_chat_format(words)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_6"])
def test_thoughts_in_an_answer_are_trained_on_where_thinking_is_on(name: str) -> None:
    words = tokenizer_with(name)
    apply_template_settings(words, THINKING, "model")
    thoughtful = encoded(words, "<think>\nHm.\n</think>\n\nYes.", "<think>\nOh.\n</think>\n\nNo.")
    assert words.decode(thoughtful.chosen) == "<think>\nHm.\n</think>\n\nYes.<|im_end|>"
    assert list(thoughtful.prompt) == tokenize_prompt(words, QUESTION)
    mixed = encoded(words, "<think>\nHm.\n</think>\n\nYes.", "No.")
    assert words.decode(mixed.rejected) == "<think>\n\n</think>\n\nNo.<|im_end|>"
    assert mixed.prompt == thoughtful.prompt
    plain = encoded(words, "Yes.", "No.")
    assert words.decode(plain.prompt).endswith("assistant\n<think>\n\n</think>\n\n")


def test_thoughts_behind_a_prompt_that_closes_them_are_told() -> None:
    words = tokenizer_with("qwen3_6")
    apply_template_settings(words, TABLE, "model")
    pair = Pair(QUESTION, "<think>\nHm.\n</think>\n\nYes.", "No.", 1, {})
    assert encode_pairs([pair], words, detect_chat_format(words)) == [
        "answer has thoughts, and the prompt closes them: set model.chat_template_kwargs = { enable_thinking = true }"
    ]


def test_thoughts_that_a_template_would_write_behind_empty_ones_are_told() -> None:
    words = tokenizer_with("qwen3_8")  # it takes thoughts from a field of their own
    apply_template_settings(
        words, TABLE.model_copy(update={"chat_template_kwargs": {"enable_thinking": True}}), "model"
    )
    pair = Pair(QUESTION, "<think>\nHm.\n</think>\n\nYes.", "No.", 1, {})
    assert encode_pairs([pair], words, detect_chat_format(words)) == [
        "answer has thoughts, before which the chat template writes an empty <think> block"
    ]
