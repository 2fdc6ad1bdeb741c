"""The chats that llama.cpp is asked for after an export, and what is said where it cannot be asked."""

import importlib.util
from pathlib import Path

import pytest
import tiny
from saved_adapters import save_adapter, save_base

from qlora_dpo.cli import main
from qlora_dpo.data.dialogue import check_roles
from qlora_dpo.deploy.engine_chats import built_in_chats, check_engine_chats
from qlora_dpo.deploy.hub_files import collect_hub_files
from qlora_dpo.errors import ModelError
from qlora_dpo.evaluation.merge_chats import CHATS_FILE, read_chats


def test_the_chats_differ_and_end_with_a_question() -> None:
    chats = built_in_chats()
    for chat in chats:
        check_roles(chat)
    assert len({str(chat) for chat in chats}) == 20
    assert {len(chat) for chat in chats} == {1, 2, 3, 4}
    assert {chat[0]["role"] for chat in chats} == {"user", "system"}


def test_the_held_out_chats_lie_beside_a_merged_model_and_stay_here(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "tuned", save_base(tmp_path / "base"), "none")
    assert main(["merge", str(adapter), "-o", str(tmp_path / "m"), "--dtype", "fp32"]) == 0
    chats = read_chats(tmp_path / "m")
    assert len(chats) == 12
    words = tiny.tokenizer()
    for prompt, ids in chats:
        assert tuple(words.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)) == ids
    pushed = {file.name for file in collect_hub_files(tmp_path / "m", "org/m", ["model", "card"], None, str)}
    assert "model.safetensors" in pushed
    assert CHATS_FILE not in pushed
    (tmp_path / "m" / CHATS_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is damaged; remove it"):
        read_chats(tmp_path / "m")
    assert read_chats(tmp_path / "base") == []


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is not None, reason="llama.cpp is installed here")
def test_without_llama_cpp_the_export_says_so(tmp_path: Path) -> None:
    said = check_engine_chats(tmp_path / "x.gguf", tiny.tokenizer())
    assert (said.compared, said.not_compared) == (
        0,
        "llama.cpp is not installed here: pip install 'qlora_dpo[engines]'",
    )
