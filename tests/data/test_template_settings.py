"""A recipe gives a base model a chat template, and a template its settings; both are in what is saved."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizer_kinds
from pydantic import ValidationError

from qlora_dpo.data.encode import encode_pairs
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.data.templates.template_settings import apply_template_settings
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.recipe import load_recipe

SYSTEM, ASK, HELLO = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Late?"},
    {"role": "assistant", "content": "No."},
)


def table(**keys: Any) -> ModelTable:
    return ModelTable(name="./model", **keys)


def encoded(words: Any) -> tuple[str, str]:
    (pair,) = encode_pairs([Pair((SYSTEM, ASK, HELLO, ASK), "Yes.", "No.", 1, {})], words, detect_chat_format(words))
    assert isinstance(pair, EncodedPair), pair
    return words.decode(pair.prompt), words.decode(pair.chosen)


def test_plain_writes_names_and_ends_answers_with_the_end_token() -> None:
    words = tokenizer_kinds.with_bos()
    words.chat_template = None
    assert apply_template_settings(words, table(chat_template="plain"), "model") == []
    assert encoded(words) == (
        "<|begin_of_text|>System: Be kind.\nUser: Late?\nAssistant: No.<|eot_id|>\nUser: Late?\nAssistant:",
        " Yes.<|eot_id|>",
    )


def test_plain_writes_a_reply_in_a_conversation_as_it_was_generated() -> None:
    words = tokenizer_kinds.with_bos()
    apply_template_settings(words, table(chat_template="plain"), "model")
    prompt = words.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    chat = words.apply_chat_template([ASK, {"role": "assistant", "content": " No."}], tokenize=False)
    assert chat == f"{prompt} No.<|eot_id|>\n"


def test_plain_needs_no_start_token() -> None:
    words = tiny.tokenizer(None)
    apply_template_settings(words, table(chat_template="plain"), "model")
    assert encoded(words)[0].startswith("System: Be kind.\n")


def test_chatml_is_written_with_its_tokens_and_no_system_turn_of_its_own() -> None:
    words = tiny.tokenizer(None)
    words.eos_token = "<|endoftext|>"  # as bases have
    apply_template_settings(words, table(chat_template="chatml"), "model")
    assert encoded(words) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nLate?<|im_end|>\n<|im_start|>assistant\nNo."
        "<|im_end|>\n<|im_start|>user\nLate?<|im_end|>\n<|im_start|>assistant\n",
        "Yes.<|im_end|>",
    )
    assert words.eos_token == "<|im_end|>"


def test_a_template_of_ones_own_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}", encoding="utf-8")
    words = tiny.tokenizer()
    apply_template_settings(words, table(chat_template=str(file)), "model")
    assert words.chat_template == file.read_text()


@pytest.mark.parametrize("content", [None, b"\xff", b"{% for m in messages %}"])
def test_a_file_that_is_no_template_is_refused(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(
        RecipeError, match=rf"^model.chat_template: {re.escape(str(file))}(, line 1: is no Jinja| cannot)"
    ):
        apply_template_settings(tiny.tokenizer(), table(chat_template=str(file)), "model")


def test_what_a_template_needs_of_the_tokenizer_is_named() -> None:
    with pytest.raises(ModelError, match=r'has no token <\|im_start\|>, so a reply would not end; write "plain"$'):
        apply_template_settings(tokenizer_kinds.with_bos(), table(chat_template="chatml"), "model")
    with pytest.raises(ModelError, match="has no end-of-sequence token"):
        apply_template_settings(tokenizer_kinds.without_eos(), table(chat_template="plain"), "model")


def test_settings_are_the_templates_defaults_which_a_caller_still_changes() -> None:
    words = tiny.tokenizer("{{ mood }}{% for x in list %}{{ x }}{% endfor %}{{ of.a }}{{ 'on' if on else 'off' }}")
    settings = {"mood": 'so "so"\n', "list": [1, 2.5], "of": {"a": "é😀%}}}"}, "on": False}
    apply_template_settings(words, table(chat_template_kwargs=settings), "model")
    assert words.apply_chat_template([ASK], tokenize=False) == 'so "so"\n12.5é😀%}}}off'
    assert words.apply_chat_template([ASK], tokenize=False, on=True, mood="") == "12.5é😀%}}}on"


def test_a_setting_that_the_template_does_not_read_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the chat template of model reads no enable_thinking; leave it out$"):
        apply_template_settings(tiny.tokenizer(), table(chat_template_kwargs={"enable_thinking": False}), "model")


@pytest.mark.parametrize(
    "settings", [{"messages": []}, {"a-b": 1}, {"when": object()}, {"a": [None]}, {"a": float("inf")}]
)
def test_a_setting_that_no_template_can_have_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="chat_template_kwargs"):
        table(chat_template_kwargs=settings)


def test_the_path_of_a_template_is_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        '[model]\nname = "./m"\nchat_template = "own.jinja"\n[data]\ntrain = "./t.jsonl"\neval_share = 0.1\n'
    )
    assert load_recipe(str(tmp_path / "r.toml")).recipe.model.chat_template == str(tmp_path / "own.jinja")
    (tmp_path / "r.toml").write_text('[model]\nname = "./m"\nchat_template = "alpaca"\n[data]\ntrain = "./t.jsonl"\n')
    with pytest.raises(RecipeError, match=r'must be "chatml", "plain" or the path of a .jinja file'):
        load_recipe(str(tmp_path / "r.toml"))
