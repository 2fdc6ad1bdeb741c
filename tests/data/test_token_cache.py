"""Pairs are tokenized once: cached ids are found by text and tokenizer, and never used damaged."""

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from qlora_dpo.data import encode as encoding
from qlora_dpo.data.arrow_cache import read_batches
from qlora_dpo.data.encoded_cache import EncodedIndex, EncodedRow, EncodedWriter, text_digest, tokenizer_key
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.data.templates.chat_template import template_date


def pair(number: int, chosen: str = "Ask the people.") -> Pair:
    return Pair(({"role": "user", "content": f"How do I cook {number} birds?"},), chosen, "Wait.", number, {})


PAIRS = [pair(1), pair(2, "Wait."), pair(3), pair(4, "\n\nNo.")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path))
    return tmp_path / "pairs"


def key_of(tokenizer: Any) -> str | None:
    return tokenizer_key(tokenizer, detect_chat_format(tokenizer))


def cached(tokenizer: Any, pairs: list[Pair] = PAIRS) -> list[Any]:
    return EncodedIndex(key_of(tokenizer)).find(pairs, [text_digest(each) for each in pairs])


def store(tokenizer: Any, pairs: list[Pair] = PAIRS, finish: bool = True) -> list[Any]:
    """Encode pairs and write them to the cache; without `finish`, as a run does that is killed then."""
    results = encoding.encode_pairs(pairs, tokenizer, detect_chat_format(tokenizer)) if pairs else []
    key = key_of(tokenizer)
    writer = EncodedWriter(key and f"{key}-rows")
    for position, (each, result) in enumerate(zip(pairs, results, strict=True)):
        writer.append(EncodedRow(position, each, text_digest(each), result, is_truncated=False, repairs=()))
    writer.flush()
    if finish:
        assert writer.finish().num_rows == len(pairs)
    return results


@pytest.mark.parametrize("finish", [True, False])
def test_the_same_ids_and_reasons_are_found_even_if_the_run_was_killed(finish: bool) -> None:
    words = tiny.tokenizer()
    first = store(words, finish=finish)
    assert [isinstance(each, str) for each in first] == [False, True, False, True]
    assert cached(words) == first


def test_a_cached_pair_has_the_row_number_it_is_looked_up_with() -> None:
    words = tiny.tokenizer()
    store(words, [pair(1)])
    moved = Pair(pair(1).prompt, pair(1).chosen, pair(1).rejected, 77, {})
    assert cached(words, [moved])[0].row == 77


def test_another_text_or_template_is_not_found() -> None:
    words, other = tiny.tokenizer(), tiny.tokenizer(tiny.CHATML.replace("helpful", "curt"))
    store(words)
    assert cached(words, [pair(4, "Sit."), pair(5)]) == [None, None]
    assert cached(other) == [None] * 4


def test_a_template_that_writes_the_date_is_never_cached(own_cache: Path) -> None:
    dated = tiny.tokenizer("{{ strftime_now('%d') }}" + tiny.CHATML)
    assert (template_date(tiny.tokenizer()), template_date(dated)) == ("", f"{date.today()}")
    store(dated)
    assert not own_cache.exists()


@pytest.mark.parametrize("damage", ["a flipped bit in the ids", "a flipped bit in a reason", "cut in half", "emptied"])
@pytest.mark.parametrize("finish", [True, False])
def test_a_damaged_entry_is_never_used(damage: str, finish: bool, own_cache: Path) -> None:
    words = tiny.tokenizer()
    first = store(words, finish=finish)
    (file,) = own_cache.iterdir()
    content = file.read_bytes()
    match damage:
        case "a flipped bit in the ids":
            place = content.index(np.array(first[0].prompt[:4], dtype=np.int32).tobytes())
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert cached(words) == [None, *first[1:]]
        case "a flipped bit in a reason":
            place = content.index(first[1].encode())
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert cached(words) == [first[0], None, *first[2:]]
        case "cut in half":
            file.write_bytes(content[: len(content) // 2])
            assert cached(words) == [None] * 4
        case "emptied":
            file.write_bytes(b"")
            assert cached(words) == [None] * 4


def test_whichever_byte_of_an_unfinished_file_is_lost_the_rest_is_true(own_cache: Path) -> None:
    words = tiny.tokenizer()
    first = store(words, finish=False)
    (file,) = own_cache.iterdir()
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        found = cached(words)
        assert all(each in (None, expected) for each, expected in zip(found, first, strict=True)), place
    for length in range(0, len(content), 97):
        file.write_bytes(content[:length])
        assert cached(words) in ([None] * 4, first)


def test_the_complete_batches_of_a_file_are_read_up_to_where_it_ends(own_cache: Path) -> None:
    words = tiny.tokenizer()
    key, form = key_of(words), detect_chat_format(words)
    writer = EncodedWriter(f"{key}-rows")
    for position, each in enumerate(PAIRS):
        (result,) = encoding.encode_pairs([each], words, form)
        writer.append(EncodedRow(position, each, text_digest(each), result, is_truncated=False, repairs=()))
        writer.flush()
    (file,) = own_cache.iterdir()
    assert [batch.num_rows for batch in read_batches(file)] == [1, 1, 1, 1]
    file.write_bytes(file.read_bytes()[:-5])
    assert [batch.num_rows for batch in read_batches(file)] == [1, 1, 1]


def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "file"))
    words = tiny.tokenizer()
    store(words)
    assert cached(words) == [None] * 4


def test_no_pairs_can_be_cached() -> None:
    words = tiny.tokenizer()
    assert store(words, []) == cached(words, []) == []
