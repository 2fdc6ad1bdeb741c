"""A base without a chat template is trained, talked to and merged with the one that the recipe names."""

import json
import tomllib
from pathlib import Path

import commands_in_process
import pytest
import tiny
from cli_sandbox import furnish
from transformers import AutoTokenizer, GenerationConfig

RECIPE = """
[model]
name = "./base"
quantization = "none"
dtype = "fp32"
[data]
train = "./train.jsonl"
eval = "./eval.jsonl"
[train]
batch_size = 4
max_steps = 1
[samples]
prompts = 1
max_new_tokens = 2
"""
TEMPLATE = "{{ mood }}" + tiny.CHATML


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base with no template, whose replies end with another token than ChatML's turns, and recipes for it."""
    furnish(tmp_path, RECIPE)
    words = tiny.tokenizer(None)
    words.eos_token = "<|endoftext|>"
    words.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    GenerationConfig(eos_token_id=words.eos_token_id).save_pretrained(tmp_path / "base")
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    (tmp_path / "shown.toml").write_text(RECIPE.replace("[data]", 'chat_template = "chatml"\n[data]'))
    return tmp_path


def test_a_base_without_a_template_is_refused_until_the_recipe_names_one(place: Path) -> None:
    chatml, own = ["--set", "model.chat_template=chatml"], ["--set", "model.chat_template=own.jinja"]
    mood = ["--set", 'model.chat_template_kwargs={ mood = "Well: " }']
    refused, *others = commands_in_process.said(
        [
            ["train", "tiny.toml", "-o", "refused"],
            ["train", "tiny.toml", "-o", "chatml", *chatml],
            ["merge", "chatml", "-o", "merged"],
            ["eval", "chatml"],
            ["train", "tiny.toml", "-o", "own", *own, *mood],
            ["data", "show", "shown.toml", "--row", "1"],
        ],
        place,
        commands_in_process.here(),
    )
    assert refused.code == 1
    assert refused.last[1].endswith(
        'has no chat template, as base models have none; give it one with model.chat_template = "plain" (or "chatml", '
        "or a .jinja file), or name an instruct model in model.name"
    )
    assert [each.code for each in others] == [0, 0, 0, 0, 0], [each.err for each in others]
    assert "<|im_start|>assistant" in others[-1].out
    trained, merged = (AutoTokenizer.from_pretrained(place / name) for name in ("chatml", "merged"))
    assert trained.chat_template == merged.chat_template != TEMPLATE
    end = trained.convert_tokens_to_ids("<|im_end|>")
    settings = json.loads((place / "merged" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [end, trained.convert_tokens_to_ids("<|endoftext|>")]
    assert merged.eos_token_id == end
    chat = [{"role": "user", "content": "Late?"}]
    own_words = AutoTokenizer.from_pretrained(place / "own")
    assert own_words.apply_chat_template(chat, tokenize=False).startswith("Well: <|im_start|>system\n")
    assert json.loads((place / "own" / "run.json").read_text())["tokenizer"]["template"]
    resolved = tomllib.loads((place / "own" / "resolved.toml").read_text())["model"]
    assert resolved["chat_template_kwargs"] == {"mood": "Well: "}
    assert resolved["chat_template"] == str(place / "own.jinja")
