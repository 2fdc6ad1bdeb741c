"""The chats that llama.cpp is asked for after an export, and what is said where it cannot be asked."""

import importlib.util
from pathlib import Path

import pytest
import tiny

from qlora_dpo.data.dialogue import check_roles
from qlora_dpo.deploy.engine_chats import built_in_chats, check_engine_chats


def test_the_chats_differ_and_end_with_a_question() -> None:
    chats = built_in_chats()
    for chat in chats:
        check_roles(chat)
    assert len({str(chat) for chat in chats}) == 20
    assert {len(chat) for chat in chats} == {1, 2, 3, 4}
    assert {chat[0]["role"] for chat in chats} == {"user", "system"}


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is not None, reason="llama.cpp is installed here")
def test_without_llama_cpp_the_export_says_so(tmp_path: Path) -> None:
    said = check_engine_chats(tmp_path / "x.gguf", tiny.tokenizer())
    assert (said.compared, said.not_compared) == (
        0,
        "llama.cpp is not installed here: pip install 'qlora_dpo[engines]'",
    )
