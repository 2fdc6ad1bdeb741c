"""A long reading is kept whole: the next run finds the same without parsing or tokenizing, and damage is never used."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny

from qlora_dpo.data import arrow_cache, encode, pairs
from qlora_dpo.data.encoded import pair_digests, pair_lengths, pairs_without_rejected, sequence_lengths
from qlora_dpo.recipe.data import DataTable


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arrow_cache, "MIN_CACHED_ROWS", 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "pairs"


def write(**changes: Any) -> None:
    """Forty pairs, of which two are none, one is too long and one has a control token."""
    rows = [
        {"prompt": f"How do I cook {n} birds?", "chosen": f"Ask {n} people.", "rejected": f"Wait {n} days.", "note": n}
        for n in range(40)
    ]
    rows[3]["chosen"] = rows[3]["rejected"]
    rows[7]["prompt"] = None
    rows[11]["prompt"] = "Where is it? " * 60 + "Say <|im_end|>"
    rows[13] |= changes
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(part: Any = "train", seed: int = 0, train: str = "./p.jsonl", **keys: Any) -> Any:
    table = DataTable(train=train, **{"max_length": 200, **keys})
    return encode.load_pairs(table, part, tiny.tokenizer(), seed, {"note": "samples.group_by"})


def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode._Encoder, "encode_selected", lambda *arguments: pytest.fail("encoded again"))
    monkeypatch.setattr(pairs, "_scan_rows", lambda *arguments: pytest.fail("parsed again"))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"part": "eval"},
        {"overlong": "cut_prompt"},
        {"max_train_samples": 12, "seed": 3},
        {"eval": "./q.jsonl", "columns": {"chosen": "rejected", "rejected": "chosen"}},
    ],
)
def test_the_second_time_the_same_is_found_and_nothing_is_read(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    first = read(**keys)
    assert first.audit.rows == 40
    refused(monkeypatch)
    again = read(**keys)
    assert again.encoded == first.encoded
    assert again.pairs == first.pairs
    assert again.audit == first.audit
    assert json.dumps(again.audit.to_dict()) == json.dumps(first.audit.to_dict())


def test_answers_with_a_label_are_compared_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "Is it?", "completion": f"It is {n}.", "label": n % 2 == 0} for n in range(12)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = DataTable(train="./p.jsonl", eval="./q.jsonl")
    first = encode.load_pairs(table, "train", tiny.tokenizer(), 0)
    refused(monkeypatch)
    assert encode.load_pairs(table, "train", tiny.tokenizer(), 0) == first
    assert [pair.label for pair in first.pairs] == [True, False] * 6


def test_what_changes_the_pairs_is_read_anew(home: Path) -> None:
    write()
    first = read()
    kept = len(list(home.iterdir()))
    write(chosen="Never.")
    assert read().encoded != first.encoded
    read(max_train_samples=5)
    read(seed=1)
    encode.load_pairs(
        DataTable(train="./p.jsonl", max_length=200), "train", tiny.tokenizer(tiny.CHATML.replace("helpful", "curt")), 0
    )
    # the first reading keeps a scan and the pairs; other rows both; other samples and another seed pairs only; without
    # the column note another scan; another template other pairs
    assert (kept, len(list(home.iterdir()))) == (2, 2 + 2 + 1 + 1 + 2)


def test_rows_in_another_place_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    first = read()
    Path("moved").mkdir()
    Path("p.jsonl").rename("moved/other.jsonl")
    refused(monkeypatch)
    assert read(train="./moved/other.jsonl").encoded == first.encoded


@pytest.mark.parametrize("damage", ["flipped bits", "cut in half", "emptied"])
def test_a_damaged_reading_is_never_used(damage: str, home: Path) -> None:
    write()
    first = read()
    for file in list(home.iterdir()):
        content = file.read_bytes()
        file.unlink()  # `first` has mapped the old content
        match damage:
            case "flipped bits":
                middle = len(content) // 2  # within the values, so that Arrow alone would not notice
                flipped = bytes(byte ^ 1 for byte in content[middle : middle + 64])
                file.write_bytes(content[:middle] + flipped + content[middle + 64 :])
            case "cut in half":
                file.write_bytes(content[: len(content) // 2])
            case "emptied":
                file.write_bytes(b"")
    again = read()
    assert again.encoded == first.encoded
    assert again.audit == first.audit


def test_few_rows_are_parsed_again_but_not_tokenized(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_cache, "MIN_CACHED_ROWS", 41)
    write()
    first = read()
    assert len(list(home.iterdir())) == 1
    monkeypatch.setattr(encode._Encoder, "encode_selected", lambda *arguments: pytest.fail("encoded again"))
    assert read() == first


@pytest.mark.parametrize("keys", [{"max_length": 100}, {"max_train_samples": 12, "seed": 3}, {"seed": 1}])
def test_another_selection_of_the_same_rows_tokenizes_no_pair_again(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    read()
    with monkeypatch.context() as patched:
        patched.setattr(encode, "encode_pairs", lambda *arguments: pytest.fail("tokenized again"))
        again = read(**keys)
    monkeypatch.setenv("QLORA_DPO_CACHE", "elsewhere")
    fresh = read(**keys)
    assert (again.encoded, again.pairs, again.audit) == (fresh.encoded, fresh.pairs, fresh.audit)


def test_two_processes_may_write_the_same_table_at_once(home: Path) -> None:
    write()
    first = read()
    table, key = arrow_cache.load_table(next(home.glob("parsed-*")).name.split(".")[0]), "parsed-again"
    assert table is not None
    writers = [arrow_cache.TableWriter(key, table.schema) for _ in range(2)]
    for batch in table.to_batches():
        for writer in writers:
            writer.write(batch)
    assert [writer.finish() for writer in writers] == [table, table]
    assert len(list(home.glob(f"{key}.*"))) == 1
    assert arrow_cache.load_table(key) == table
    assert read() == first


def test_a_disk_that_fills_up_while_pairs_are_written_stops_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "ENCODE_CHUNK", 4)
    write()
    first = read()
    for file in home.iterdir():
        file.unlink()
    real = pa.ipc.new_stream

    class Full:
        def __init__(self, *arguments: Any) -> None:
            self.stream, self.left = real(*arguments), 2

        def write_batch(self, batch: Any) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.stream.write_batch(batch)

        def close(self) -> None:
            self.stream.close()

    monkeypatch.setattr(arrow_cache.pa.ipc, "new_stream", Full)
    assert read() == first
    assert not [file for file in home.iterdir() if not file.name.startswith("parsed-")]


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    first = read()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "file"))
    assert read().encoded == first.encoded


def test_what_is_told_of_all_pairs_at_once_is_what_each_says() -> None:
    write()
    some = read().encoded
    for each in (
        some,
        list(some),
        some.select([5, 2, 2]),
        some[3:9],
        pairs_without_rejected(some),
        list(pairs_without_rejected(some)),
    ):
        assert [bytes(one).ljust(32, b"\0") for one in pair_digests(each)] == [pair.digest for pair in each]
        assert pair_lengths(each).tolist() == [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in each]
        longest = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in each]
        assert np.array_equal(sequence_lengths(each), longest)


def test_parts_that_were_read_by_themselves_are_not_tokenized_again_as_a_whole(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "ENCODE_CHUNK", 4)
    rows = [{"prompt": f"Is {n} odd?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(11)]
    for number, some in enumerate((rows[:4], rows[4:8], rows[8:])):
        Path(f"part-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    parts = [read_plain(f"./part-{number}.jsonl") for number in range(3)]
    monkeypatch.setattr(encode, "encode_pairs", lambda *asked: pytest.fail("tokenized again"))
    whole = read_plain("./part-*.jsonl").encoded
    assert [pair.digest for pair in whole] == [pair.digest for part in parts for pair in part.encoded]


def read_plain(train: str) -> Any:
    return encode.load_pairs(DataTable(train=train, eval="./q.jsonl"), "train", tiny.tokenizer(), 0)
