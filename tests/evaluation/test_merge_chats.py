"""The tokens of held-out chats, as other programs get them from a merged model, are those that were trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizer_kinds

from qlora_dpo.data.encode import PairSet, load_pairs
from qlora_dpo.data.templates.template_settings import apply_template_settings
from qlora_dpo.deploy.merge import _check_chats
from qlora_dpo.errors import ModelError
from qlora_dpo.evaluation.merge_chats import ChatComparison, compare_chats, select_chats
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.recipe.model import ModelTable

FORGED = {"prompt": "<|im_end|> is what?", "chosen": "A token.", "rejected": "No idea."}


def pairs(words: Any, count: int) -> PairSet:
    rows = [{"prompt": f"Is it {n}?", "chosen": f"It is {n}.", "rejected": "Who knows."} for n in range(count)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [FORGED, *rows]))
    return load_pairs(DataTable(train="./q.jsonl", eval="./p.jsonl"), "eval", words, 0)


def compared(words: Any, folder: Path, count: int = 3) -> ChatComparison:
    chats = select_chats(pairs(words, count), words)
    words.save_pretrained(folder)
    return compare_chats(folder, chats)


@pytest.mark.parametrize("kind", [tiny.tokenizer, tokenizer_kinds.with_bos, tokenizer_kinds.smollm2])
def test_what_is_written_gives_the_trained_tokens_of_twenty_chats(kind: Any, empty_folder: Path) -> None:
    assert compared(kind(), empty_folder / "model", 30) == ChatComparison(20, 0, "")


def test_chats_with_control_tokens_in_their_text_are_left_out(empty_folder: Path) -> None:
    chats = select_chats(pairs(tiny.tokenizer(), 3), tiny.tokenizer())
    assert [chat.answer for chat in chats] == ["It is 0.", "It is 1.", "It is 2."]


def test_a_template_that_ends_no_answer_and_one_with_empty_thoughts_agree(empty_folder: Path) -> None:
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain = tiny.tokenizer(turns + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert compared(plain, empty_folder / "plain").different == 0
    thinking = tokenizer_kinds.with_bos()
    thinking.chat_template = (
        "{% for m in messages %}{{ m.role }}<|end_header_id|>{% if m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}assistant<|end_header_id|>{% endif %}"
    )
    assert compared(thinking, empty_folder / "thinking").different == 0


def test_settings_of_the_recipe_are_in_what_is_written(empty_folder: Path) -> None:
    words = tiny.tokenizer("{{ mood }}" + tiny.CHATML)
    apply_template_settings(words, ModelTable(name="./m", chat_template_kwargs={"mood": "Well. "}), "m")
    assert compared(words, empty_folder / "model").different == 0


def test_another_template_is_refused_with_the_first_token_that_differs(empty_folder: Path) -> None:
    chats = select_chats(pairs(tiny.tokenizer(), 3), tiny.tokenizer())
    other = tiny.tokenizer(tiny.CHATML.replace("+ '<|im_end|>' +", "+ '<|endoftext|>' +"))
    other.save_pretrained(empty_folder / "model")
    found = compare_chats(empty_folder / "model", chats)
    assert (found.compared, found.different) == (3, 3)
    words = tiny.tokenizer()
    place = len(
        words("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nIs it 0?").input_ids
    )
    end, other_end = words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert found.first_difference == (
        f"token {place + 1} of the prompt is {other_end} '<|endoftext|>', and {end} '<|im_end|>' was trained on"
    )
    with pytest.raises(
        ModelError, match=r"^in 3 of 3 held-out chats .*: token \d+ of the prompt is .*; nothing was kept$"
    ):
        _check_chats({"chats": {"compared": 3, "different": 3, "first_difference": found.first_difference}})
