"""Large data: a turn is tokenized once, rows and ids stay on disk, and what was encoded before a kill is not lost."""

import gc
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tokenizer_kinds import KINDS

from qlora_dpo.data import encode, files, spool
from qlora_dpo.data.dialogue import Message
from qlora_dpo.data.encoded import EncodedPair, EncodedPairs, digest_ids
from qlora_dpo.data.encoded_cache import ENCODED_SCHEMA, EncodedRow, EncodedWriter
from qlora_dpo.data.files import read_data_file
from qlora_dpo.data.lazy_sequence import LazySequence, concatenate_sequences
from qlora_dpo.data.pairs import Pair, parse_pairs
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.data.templates import chat_template
from qlora_dpo.data.templates.chat_template import fold_system, render_chats, template_traits, tokenize_chats
from qlora_dpo.recipe.data import DataTable

SHARED = Path(__file__).parents[3] / "shared" / "data"
FILES = sorted(each for each in SHARED.rglob("*") if each.name.endswith((".json", ".jsonl.gz")))
needs_shared = pytest.mark.skipif(not FILES, reason="the real preference data is not beside this checkout")


def row(number: int, words: int = 3) -> dict[str, str]:
    return {"prompt": f"Is {number} even?" + " Is it?" * words, "chosen": "No." * words, "rejected": "Yes."}


def write(count: int, words: int = 3, name: str = "p.jsonl") -> DataTable:
    Path(name).write_text("".join(json.dumps(row(number, words)) + "\n" for number in range(count)))
    return DataTable(train=f"./{name}", eval="./q.jsonl")


def chats(pairs: list[Pair]) -> list[list[Message]]:
    return [
        [*pair.prompt, {"role": "assistant", "content": text}]
        for pair in pairs
        for text in (pair.chosen, pair.rejected)
    ]


@needs_shared
@pytest.mark.parametrize("file", FILES, ids=lambda each: each.name)
@pytest.mark.parametrize("kind", ["qwen2", "with_bos", "with_word_starts"])
def test_turns_by_themselves_have_the_ids_of_whole_chats(file: Path, kind: str) -> None:
    words = KINDS[kind]()
    read = read_data_file(file)
    found = parse_pairs(SourceRows(read.name, read.rows[:12], read.location)).pairs
    # a text with a control token is spelt out, and has tests of its own
    own = template_traits(words)
    pairs = [each for each in found if not (own.special_pattern and own.special_pattern.search(str(each)))]
    prompts, answered = [pair.prompt for pair in pairs], chats(pairs)
    plain = [
        tuple(words.apply_chat_template(fold_system(own, chat), return_dict=False, add_generation_prompt=open_))
        for some, open_ in ((prompts, True), (answered, False))
        for chat in some
    ]
    assert len(plain) >= 30
    assert tokenize_chats(words, prompts, answered) == plain


def test_each_turn_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.tokenizer()
    added = chat_template._added_tokens(words)
    assert added is not None
    asked = list[str]()
    backend = words.backend_tokenizer

    class Counted:
        def encode_batch_fast(self, texts: list[str], **keys: Any) -> Any:
            asked.extend(texts)
            return backend.encode_batch_fast(texts, **keys)

    monkeypatch.setattr(type(words), "backend_tokenizer", Counted())
    monkeypatch.setattr(chat_template, "_added_tokens", lambda tokenizer: added)
    prompt: list[Message] = [{"role": "user", "content": "Is it late?"}]
    texts = render_chats(words, [prompt], answered=False)
    texts += render_chats(words, [[*prompt, {"role": "assistant", "content": each}] for each in ("No.", "Yes.")], True)
    first = chat_template.tokenize_texts(words, texts)
    assert chat_template.tokenize_texts(words, texts) == first
    assert sorted(asked) == sorted(
        [
            "system\nYou are a helpful assistant.",
            "\n",
            "user\nIs it late?",
            "assistant\n",
            "assistant\nNo.",
            "assistant\nYes.",
        ]
    )


def test_turns_are_forgotten_oldest_first_and_come_out_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = tiny.tokenizer().backend_tokenizer
    monkeypatch.setattr(chat_template, "MAX_CACHED_TURN_TOKENS", 25)
    turns = chat_template._TurnCache(backend)
    some = [f"user\nIs {number} even?" for number in range(12)]
    for number in range(0, 12, 2):
        found = turns.token_ids(some[number : number + 2])
        assert {text: list(ids) for text, ids in found.items()} == {
            text: backend.encode(text, add_special_tokens=False).ids for text in some[number : number + 2]
        }
        assert turns.num_tokens == sum(map(len, turns.ids_by_turn.values())) <= 25
    assert 0 < len(turns.ids_by_turn) < 12
    assert list(turns.ids_by_turn) == some[-len(turns.ids_by_turn) :]


def test_a_template_that_asks_for_more_than_chats_is_written_by_transformers() -> None:
    words = tiny.tokenizer("{{ 'tools' if tools is none else '' }}" + tiny.CHATML)
    some: list[list[Message]] = [[{"role": "user", "content": each}] for each in ("Hi.", "Oh.")]
    assert render_chats(words, some, answered=False) == [
        words.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in some
    ]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_rows_on_disk_are_the_rows_in_memory(empty_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    lines = "\n".join(json.dumps(row(number)) + "\n" * (number % 3) for number in range(9)).encode()
    Path(name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    before = read_data_file(Path(name))
    monkeypatch.setattr(files, "SPOOL_MEMORY_BYTES", 0)
    monkeypatch.setattr(spool, "SPOOL_MEMORY_BYTES", 1)
    after = read_data_file(Path(name))
    assert after.rows == before.rows == [row(number) for number in range(9)]
    assert [after.location(number) for number in range(1, 10)] == [before.location(number) for number in range(1, 10)]


@pytest.mark.parametrize("batch_rows", [1, 2, 3])
def test_encoded_pairs_come_back_as_they_were(batch_rows: int) -> None:
    pairs = [
        EncodedPair(ids, (7, 151_643), (8,), number, digest_ids(ids, (7, 151_643), (8,)))
        for number, ids in enumerate([(1, 2, 3), (4,), (2**31 - 1,)], 1)
    ]
    writer = EncodedWriter(None)
    for pair in pairs:
        text = Pair((), "", "", pair.row, {})
        writer.append(EncodedRow(pair.row - 1, text, bytes(16), pair, is_truncated=False, repairs=()))
        if pair.row % batch_rows == 0:
            writer.flush()
    table = writer.finish()
    assert table.schema == ENCODED_SCHEMA
    kept = EncodedPairs(table)
    assert kept.pairs() == pairs
    assert kept.pairs().select([2, 0]) == EncodedPairs(table, np.array([2, 0])).pairs() == [pairs[2], pairs[0]]
    assert kept.lengths().tolist() == [[3, 2, 1], [1, 2, 1], [1, 2, 1]]
    assert kept.row_numbers().tolist() == [1, 2, 3]


def test_items_made_when_asked_for_make_a_sequence() -> None:
    squares = LazySequence(4, lambda index: index * index)
    assert squares == [0, 1, 4, 9]
    assert squares != [0, 1, 4, 8]
    assert (squares[-1], squares[1:3], squares.select([3, 3])) == (9, [1, 4], [9, 9])
    assert concatenate_sequences([squares, [], [16]]) == [0, 1, 4, 9, 16]
    with pytest.raises(IndexError):
        squares[4]


def held_bytes(table: DataTable, words: Any) -> int:
    """What the pairs hold in Python's memory after they were read."""
    tracemalloc.start()
    held = encode.load_pairs(table, "train", words, 0)
    gc.collect()  # which reading rows puts off
    now = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(held.pairs) == 200
    return now


def test_ten_times_the_text_takes_no_more_memory(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SPOOL_MEMORY_BYTES", 0)
    monkeypatch.setattr(spool, "SPOOL_MEMORY_BYTES", 1)
    words = tiny.tokenizer()
    held_bytes(write(200), words)  # caches of the libraries
    short, long = held_bytes(write(200, 3, "a.jsonl"), words), held_bytes(write(200, 30, "b.jsonl"), words)
    assert Path("b.jsonl").stat().st_size - Path("a.jsonl").stat().st_size > 50_000
    assert long - short < 25_000  # buffers, half of what the text grows by


def test_an_encoding_that_was_killed_goes_on_where_it_was(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encode, "ENCODE_CHUNK", 4)
    table, words, asked = write(12), tiny.tokenizer(), list[int]()
    whole = encode.encode_pairs

    def killed_after_two(pairs: Any, *others: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(pairs[0].row)
        return whole(pairs, *others)

    monkeypatch.setattr(encode, "encode_pairs", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        encode.load_pairs(table, "train", words, 0)
    assert asked == [1, 5]
    asked.clear()
    held = encode.load_pairs(table, "train", words, 0)
    assert asked == [9]
    assert [pair.row for pair in held.encoded] == list(range(1, 13))
