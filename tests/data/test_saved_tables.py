"""Arrow and Parquet tables: what `datasets` saved, names that stand twice, times that Python cannot hold; folders."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_dpo.cli import main
from qlora_dpo.data.files import read_data_file
from qlora_dpo.data.sources import concatenate_rows, read_sources
from qlora_dpo.errors import DataError, RecipeError, SourceError
from qlora_dpo.recipe import load_recipe
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.recipe.tables import is_glob, is_local_path

ROWS = [{"prompt": f"{number}?", "chosen": "No.", "rejected": "Yes."} for number in range(5)]
WHEN = datetime(2024, 2, 3, 4, 5, 6, tzinfo=UTC)


def prompts(part: Any = "train", **keys: Any) -> list[str]:
    return [row["prompt"] for row in concatenate_rows(read_sources(DataTable(**keys), part)).rows]


@pytest.fixture
def saved(empty_folder: Path) -> Path:
    datasets.disable_progress_bars()
    one, other = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:2])
    one.save_to_disk("one", num_shards=2)
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk("both")
    return empty_folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_datasets_saved_is_read(saved: Path) -> None:
    assert prompts(train="./one") == [f"{number}?" for number in range(5)]
    assert DataTable(train="./one").effective_eval_share == 0.1
    assert prompts(train="./both") == [f"{number}?" for number in range(5)]
    assert prompts("eval", train="./both") == ["0?", "1?"]
    assert DataTable(train="./both").effective_eval_share is None
    file = next(Path("one").glob("*.arrow"))
    assert read_data_file(file).rows[0] == ROWS[0]
    for keys, sentence in (
        (
            {"train": "./both", "train_split": "dev"},
            'both: has no split "dev"; it has train, test; set data.train_split',
        ),
        (
            {"train": "./one", "train_split": "dev"},
            'data.train_split is "dev", but one is one saved data set and has no splits; remove the key',
        ),
    ):
        with pytest.raises(RecipeError) as refused:
            prompts(**keys)
        assert str(refused.value) == sentence
    Path("both/test/state.json").write_text("{}")
    with pytest.raises(DataError, match=r"both/test: its state\.json is damaged; save the data set again"):
        prompts("eval", train="./both")


def test_an_arrow_file_of_either_kind_is_read_and_a_damaged_one_is_named(empty_folder: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    for name, make in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with pa.OSFile(name, "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table)
        assert list(read_data_file(Path(name)).rows) == ROWS
    Path("bad.arrow").write_bytes(Path("stream.arrow").read_bytes()[:300])
    with pytest.raises(DataError, match=r"bad\.arrow: is not Arrow data, or is damaged; copy or download the file"):
        read_data_file(Path("bad.arrow"))


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            [("prompt", pa.array(["a"])), ("chosen", pa.array(["b"])), ("chosen", pa.array(["c"]))],
            'p.parquet: has two columns called "chosen", of which only one could be read; give them different names',
        ),
        (
            [
                (
                    "turns",
                    pa.array(
                        [[{"a": 1}]],
                        pa.list_(pa.struct([pa.field("role", pa.int64()), pa.field("role", pa.int64())])),
                    ),
                )
            ],
            'p.parquet: column "turns": has two fields called "role", of which only one could be read; give them '
            "different names",
        ),
    ],
)
def test_a_name_that_stands_twice_in_a_table_is_refused(empty_folder: Path, columns: Any, sentence: str) -> None:
    names, arrays = zip(*columns, strict=True)
    pq.write_table(pa.Table.from_arrays(list(arrays), names=list(names)), "p.parquet")
    with pytest.raises(DataError) as refused:
        read_data_file(Path("p.parquet"))
    assert str(refused.value) == sentence


FAR = 40_000 * 365 * 86_400_000  # milliseconds; Arrow writes no such year, but it keeps the number
MARS = pa.timestamp("ms", tz="Mars/Olympus")
TIMES = {
    "a far date": (pa.array([3_000_000], pa.date32()), str(np.datetime64(3_000_000, "D"))),
    "a far time": (pa.array([FAR], pa.timestamp("ms")), f"<value out of range: {FAR}>"),
    "an unknown zone": (pa.array([86_400_000], MARS), "1970-01-02 00:00:00.000"),
    "in lists of objects": (
        pa.array([[{"at": 0}, None]], pa.list_(pa.struct([("at", MARS)]))),
        [{"at": "1970-01-01 00:00:00.000"}, None],
    ),
}


@pytest.mark.parametrize(("times", "text"), TIMES.values(), ids=TIMES)
def test_times_that_python_cannot_hold_are_text(empty_folder: Path, times: pa.Array, text: Any) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS[:1]).append_column("at", times), "p.parquet")
    found = read_data_file(Path("p.parquet"))
    assert list(found.rows) == [ROWS[0] | {"at": text}]
    assert found.notes == ('p.parquet: the times in "at" are read as text, since Python cannot hold all of them',)
    assert main(["data", "lint", "p.parquet", "--fix", "m.jsonl"]) == 0
    assert json.loads(Path("m.jsonl").read_text())["at"] == text


def test_other_times_are_what_they_were(empty_folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ROWS[0] | {"at": WHEN}]), "p.parquet")
    found = read_data_file(Path("p.parquet"))
    assert (found.rows[0]["at"], found.notes) == (WHEN, ())


@pytest.mark.parametrize("name", ["runs[1]", "what?", "all*", "[a]/[b]"])
def test_a_folder_named_with_the_letters_of_a_pattern_is_that_folder(empty_folder: Path, name: str) -> None:
    Path(name).mkdir(parents=True)
    for split in ("train", "test"):
        line = json.dumps({"prompt": split, "chosen": "a", "rejected": "b"}) + "\n"
        Path(name, f"{split}.jsonl").write_text(line)
    table = DataTable(train=f"./{name}")
    assert table.effective_eval_share is None
    assert (prompts(train=f"./{name}"), prompts("eval", train=f"./{name}")) == (["train"], ["test"])
    assert prompts(train=f"./{name}/t*.jsonl") == ["test", "train"]
    assert [is_glob(f"./{name}/{file}") for file in ("train.jsonl", "none.jsonl", "[st]*.jsonl")] == [
        False,
        False,
        True,
    ]
    Path(name, "r.toml").write_text('[model]\nname = "org/base"\n[data]\ntrain = "train.jsonl"\neval = "test.jsonl"\n')
    data = load_recipe(f"{name}/r.toml").recipe.data
    assert [row["prompt"] for row in concatenate_rows(read_sources(data, "eval")).rows] == ["test"]


@pytest.mark.parametrize("name", ["PAIRS.JSONL", "pairs.Parquet", "Data.CSV", "pairs.ndjson", "x.TSV"])
def test_the_ending_of_a_data_file_may_have_capital_letters(name: str) -> None:
    assert is_local_path(name)
    assert DataTable(train=name).effective_eval_share == 0.1


def test_a_folder_that_is_called_like_a_hub_data_set_is_named(
    empty_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("my/pairs").mkdir(parents=True)
    with pytest.raises(SourceError) as refused:  # the tests are offline
        read_sources(DataTable(train="my/pairs"), "train")
    assert str(refused.value).endswith(
        '; a folder here has that name: write "./my/pairs" in data.train if it is meant (in a recipe, relative to the '
        "recipe's own folder)"
    )
    caplog.set_level(logging.INFO, "qlora_dpo")
    Path("recipes/pairs").mkdir(parents=True)
    Path("recipes/r.toml").write_text('[model]\nname = "org/base"\n[data]\ntrain = "pairs"\n')
    load_recipe("recipes/r.toml")
    assert caplog.messages == ['data.train = "pairs" names a hub data set; the folder beside the recipe is "./pairs"']
