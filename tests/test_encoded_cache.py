"""Pairs are tokenized once: what is kept is the same, is told apart by all that changes it, and never used damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from qlora_dpo.data import encode as encoding
from qlora_dpo.data.chat_format import detect_chat_format
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.token_cache import load_tokens, store_tokens, token_cache_key


def pair(number: int, chosen: str = "Ask the people.") -> Pair:
    return Pair(({"role": "user", "content": f"How do I cook {number} birds?"},), chosen, "Wait.", number, {})


PAIRS = [pair(1), pair(2, "Wait."), pair(3), pair(4, "\n\nNo.")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path))
    return tmp_path / "encoded"


def encoded(tokenizer: Any, pairs: list[Pair] = PAIRS) -> list[Any]:
    return encoding._encode_cached(pairs, tokenizer, detect_chat_format(tokenizer))


def test_the_second_time_nothing_is_tokenized_and_the_same_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.tokenizer()
    first = encoded(words)
    assert first == encoding.encode_pairs(PAIRS, words, detect_chat_format(words))
    assert [isinstance(each, str) for each in first] == [False, True, False, True]
    monkeypatch.setattr(encoding, "encode_pairs", lambda *asked: pytest.fail("tokenized again"))
    assert encoded(words) == first


def test_a_kept_pair_has_the_row_number_it_is_asked_with() -> None:
    words = tiny.tokenizer()
    encoded(words, [pair(1)])
    moved = Pair(pair(1).prompt, pair(1).chosen, pair(1).rejected, 77, {})
    assert encoded(words, [moved])[0].row == 77


def test_another_text_or_template_has_another_name() -> None:
    words, other = tiny.tokenizer(), tiny.tokenizer(tiny.CHATML.replace("helpful", "curt"))
    names = {
        token_cache_key(PAIRS, words, detect_chat_format(words)),
        token_cache_key(PAIRS[:3], words, detect_chat_format(words)),
        token_cache_key([*PAIRS[:3], pair(4, "Sit.")], words, detect_chat_format(words)),
        token_cache_key(PAIRS, other, detect_chat_format(other)),
    }
    assert len(names) == 4


def test_a_template_that_writes_the_date_is_never_kept(own_cache: Path) -> None:
    dated = tiny.tokenizer("{{ strftime_now('%d') }}" + tiny.CHATML)
    encoded(dated)
    assert not own_cache.exists()


@pytest.mark.parametrize("damage", ["a flipped bit", "cut in half", "emptied"])
def test_a_damaged_file_is_never_used(damage: str, own_cache: Path) -> None:
    words = tiny.tokenizer()
    first = encoded(words)
    (file,) = own_cache.iterdir()
    content = file.read_bytes()
    ids = content.index(np.array(first[0].prompt[:4], dtype=np.int32).tobytes())
    match damage:
        case "a flipped bit":
            file.write_bytes(content[:ids] + bytes([content[ids] ^ 1]) + content[ids + 1 :])
        case "cut in half":
            file.write_bytes(content[: len(content) // 2])
        case "emptied":
            file.write_bytes(b"")
    assert load_tokens(file.stem, PAIRS) is None
    assert encoded(words) == first


def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "file"))
    words = tiny.tokenizer()
    assert encoded(words) == encoding.encode_pairs(PAIRS, words, detect_chat_format(words))


def test_no_pairs_can_be_kept() -> None:
    words = tiny.tokenizer()
    key = token_cache_key([], words, detect_chat_format(words))
    assert key is not None
    store_tokens(key, [])
    assert load_tokens(key, []) == []
