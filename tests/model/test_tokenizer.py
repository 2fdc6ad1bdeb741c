"""The tokenizer of a base: padding, the chat template, and texts split as its own file says."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
from saved_adapters import save_base
from tokenizers import Tokenizer as TokenizerFile

from qlora_dpo import files
from qlora_dpo.errors import ModelError
from qlora_dpo.model import tokenizer as tokenizers_of_bases
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.model.tokenizer import load_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return ModelSource("base", save_base(tmp_path / "base"))


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(source: ModelSource) -> None:
    bare = tiny.tokenizer()
    bare.pad_token = None
    bare.save_pretrained(source.folder)
    assert load_tokenizer(source).pad_token == "<|im_end|>"


SPLIT_AT_E = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("model_type", "changed", "told"),
    [
        ("qwen2", {}, False),
        ("qwen2", {"normalizer": None}, True),
        ("qwen2", {"pre_tokenizer": SPLIT_AT_E}, True),
        ("llama", {}, True),  # GemmaTokenizer wants an unknown token that this vocabulary has not
    ],
)
def test_texts_are_split_as_the_models_own_file_says(
    source: ModelSource, model_type: str, changed: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The class of a family in transformers would replace the normalizer and the splitting rules of the file."""
    tiny.tokenizer().save_pretrained(source.folder)
    (source.folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = source.folder / "tokenizer_config.json"
    kind = "GemmaTokenizer" if model_type == "llama" else "Qwen2Tokenizer"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": kind}))
    file = source.folder / "tokenizer.json"
    written = json.loads(file.read_text())
    if "pre_tokenizer" in changed:
        both = [changed["pre_tokenizer"], written["pre_tokenizer"]]
        changed = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": both}}
    file.write_text(json.dumps(written | changed))
    caplog.set_level(logging.INFO)
    tokenizer, as_written = load_tokenizer(source), TokenizerFile.from_file(str(file))
    text = "cafe\u0301 12345 the bees"
    assert tokenizer.encode(text, add_special_tokens=False) == as_written.encode(text, add_special_tokens=False).ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template
    assert ("would split texts in another way" in caplog.text) == told


@pytest.mark.usefixtures("own_cache")
def test_what_a_tokenizers_file_says_is_read_once(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file takes half a second; a changed one is read again, and so is one under another release."""
    read = list[str]()

    class Recorded:
        @staticmethod
        def from_file(file: str) -> TokenizerFile:
            read.append(file)
            return TokenizerFile.from_file(file)

    monkeypatch.setattr(tokenizers_of_bases, "Tokenizer", Recorded)
    for times in (1, 1):
        load_tokenizer(source)
        assert len(read) == times
    for name, times in (("tokenizer.json", 2), ("tokenizer_config.json", 3)):
        file = source.folder / name
        file.write_text(json.dumps(json.loads(file.read_text())))
        file.write_text(file.read_text() + " ")
        load_tokenizer(source)
        assert len(read) == times
    monkeypatch.setattr(files, "version", lambda name: "another release")
    load_tokenizer(source)
    assert len(read) == 4


def test_a_padding_token_without_an_embedding_is_replaced_by_the_end_token(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(tmp_path)
    tiny.qwen2(vocab_size=len(tiny.tokenizer())).config.save_pretrained(tmp_path)
    assert load_tokenizer(ModelSource("org/model", tmp_path)).pad_token == "<|im_end|>"


def test_of_several_chat_templates_the_default_is_used(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": "other"}
    tokenizer.save_pretrained(tmp_path / "default")
    loaded = load_tokenizer(ModelSource("org/model", tmp_path / "default"))
    assert loaded.chat_template == tiny.CHATML
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == tiny.CHATML
    tokenizer.chat_template = {"rag": tiny.CHATML, "tool_use": "other"}
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ModelError, match=r"has several chat templates \(rag, tool_use\) and none is called default"):
        load_tokenizer(ModelSource("org/model", tmp_path / "none"))
