"""Rows are read from files, folders and a hub; each keeps its place, and a cached data set needs no network."""

import csv
import errno
import gzip
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError
from hub import Hub
from hub_caller import HubCaller

from qlora_dpo.data.hub import explain_dataset_error
from qlora_dpo.data.sources import SourceRows, concatenate_rows, read_sources
from qlora_dpo.errors import RecipeError, SourceError
from qlora_dpo.recipe.data import DataTable

ROWS = [
    {"prompt": "Is it late?", "chosen": 'No, "early".\nVery.', "rejected": "Yes."},
    {"prompt": "Café 世界\u2028🦜?", "chosen": "Oui.", "rejected": "Non.\r\nNon."},
]


def json_lines(rows: list[dict[str, str]] = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def comma_separated() -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "chosen", "rejected"])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


FORMATS: dict[str, tuple[bytes, list[str]]] = {
    "p.jsonl": (json_lines(), ["p.jsonl:1", "p.jsonl:2"]),
    "windows.jsonl": (b"\xef\xbb\xbf" + json_lines().replace(b"\n", b"\r\n"), ["windows.jsonl:1", "windows.jsonl:2"]),
    "blank.jsonl": (b"\n" + json_lines().replace(b"\n", b"\n\n"), ["blank.jsonl:2", "blank.jsonl:4"]),
    "no-newline.jsonl": (json_lines().rstrip(b"\n"), ["no-newline.jsonl:1", "no-newline.jsonl:2"]),
    "p.jsonl.gz": (gzip.compress(json_lines()), ["p.jsonl.gz:1", "p.jsonl.gz:2"]),
    "P.JSONL.gz": (gzip.compress(json_lines()), ["P.JSONL.gz:1", "P.JSONL.gz:2"]),
    "p.json": (json.dumps(ROWS, indent=1).encode(), ["p.json, row 1", "p.json, row 2"]),
    "p.json.gz": (gzip.compress(json.dumps(ROWS).encode()), ["p.json.gz, row 1", "p.json.gz, row 2"]),
    "lines.json": (json_lines(), ["lines.json:1", "lines.json:2"]),
    "p.csv": (comma_separated(), ["p.csv:3", "p.csv:5"]),
    "p.parquet": (parquet(), ["p.parquet, row 1", "p.parquet, row 2"]),
}


def read(train: str, part: Any = "train", **keys: Any) -> SourceRows:
    return concatenate_rows(read_sources(DataTable(train=train, **keys), part))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows_and_knows_their_places(empty_folder: Path, name: str) -> None:
    content, places = FORMATS[name]
    Path(name).write_bytes(content)
    found = read(f"./{name}", eval="./held-out.jsonl")
    assert found.rows == ROWS
    assert [found.location(1), found.location(2)] == places
    assert found.name == name


def test_a_long_csv_field_is_read(empty_folder: Path) -> None:
    Path("p.csv").write_text("prompt,chosen,rejected\na,b," + "c" * 300_000 + "\n")
    assert len(read("./p.csv", eval="./held-out.jsonl").rows[0]["rejected"]) == 300_000


def test_a_file_outside_the_current_folder_is_named_in_full(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(json_lines())
    assert read(str(tmp_path / "p.jsonl"), eval="./held-out.jsonl").location(2) == f"{tmp_path}/p.jsonl:2"


def fill(folder: str, *names: str) -> None:
    """Write one-row files whose prompt is the file's own name."""
    Path(folder).mkdir()
    for name in names:
        Path(folder, name).write_bytes(json_lines([{"prompt": name, "chosen": "a", "rejected": "b"}]))


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["TRAIN.jsonl", "pairs_test.jsonl"], ["TRAIN.jsonl"], ["pairs_test.jsonl"]),
        (
            ["messages-train.jsonl", "messages-test.jsonl", "pretrain.jsonl"],
            ["messages-train.jsonl"],
            ["messages-test.jsonl"],
        ),
        (
            ["train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "test.jsonl", "contest.jsonl"],
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            ["test.jsonl"],
        ),
        (["train.jsonl", "test.jsonl", ".train.jsonl", "train.md"], ["train.jsonl"], ["test.jsonl"]),
    ],
)
def test_a_file_serves_the_split_that_its_name_holds_as_a_word(
    empty_folder: Path, names: list[str], train: list[str], test: list[str]
) -> None:
    fill("pairs", *names)
    assert [row["prompt"] for row in read("./pairs").rows] == train
    assert [row["prompt"] for row in read("./pairs", "eval").rows] == test


@pytest.mark.parametrize("split", ["../secret", "..", "/etc/passwd", "train/../../secret"])
def test_the_name_of_a_split_leads_out_of_no_folder(empty_folder: Path, split: str) -> None:
    (empty_folder / "data").mkdir()
    (empty_folder / "data" / "train.jsonl").write_bytes(json_lines())
    (empty_folder / "secret.jsonl").write_bytes(json_lines())
    table = DataTable(train=str(empty_folder / "data"), train_split=split)
    with pytest.raises(RecipeError, match="no file has the split's name"):
        concatenate_rows(read_sources(table, "train"))


def test_rows_of_several_files_are_numbered_through_and_keep_their_own_places(empty_folder: Path) -> None:
    Path("pairs").mkdir()
    Path("pairs/train-0.jsonl").write_bytes(json_lines())
    Path("pairs/train-1.jsonl").write_bytes(b"\n" + json_lines())
    found = read("./pairs")
    assert found.name == "pairs, split train"
    assert [found.location(row) for row in range(1, 5)] == [
        "pairs/train-0.jsonl:1",
        "pairs/train-0.jsonl:2",
        "pairs/train-1.jsonl:2",
        "pairs/train-1.jsonl:3",
    ]


def test_held_out_pairs_may_come_from_a_source_of_their_own(empty_folder: Path) -> None:
    fill("pairs", "train.jsonl", "test.jsonl")
    Path("other.jsonl").write_bytes(json_lines())
    assert read("./pairs", "eval", eval="./other.jsonl").rows == ROWS


@pytest.mark.parametrize(("train", "held"), [("train", "train[:10]"), ("train[10:]", "train")])
def test_a_slice_of_the_training_split_is_not_held_out(train: str, held: str) -> None:
    with pytest.raises(RecipeError) as refused:
        read("acme/pairs", "eval", train_split=train, eval_split=held)
    assert str(refused.value) == (
        f'acme/pairs: data.train_split is "{train}" and data.eval_split is "{held}", so held-out pairs would be '
        "training pairs; name two splits that share no rows"
    )


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubCaller]:
    root = tmp_path_factory.mktemp("hub")
    folder = root / "datasets" / "acme" / "Some-Pairs"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"prompt": f"{split} {number}", "chosen": "a", "rejected": "b"} for number in range(3)]
        (folder / f"{split}.jsonl").write_bytes(json_lines(rows))
    code = root / "datasets" / "acme" / "code"
    code.mkdir(parents=True)
    (code / "code.py").write_text("raise SystemExit('code of a data set was run')")
    broken = root / "datasets" / "acme" / "broken"
    broken.mkdir(parents=True)
    (broken / "train.jsonl").write_text('{"prompt": "a"')
    with Hub(root) as hub:
        made = HubCaller(hub.url, tmp_path_factory.mktemp("home"))
        made.ask(({"train": "acme/Some-Pairs"}, "train"))
        yield made


TRAIN = ["train 0", "train 1", "train 2"]
PLACE = "acme/Some-Pairs, split train, row 1"


def test_splits_and_slices_of_a_hub_data_set_are_read(caller: HubCaller) -> None:
    name = "acme/Some-Pairs"
    train, test, part, slices = caller.ask(
        ({"train": name}, "train"),
        ({"train": name}, "eval"),
        ({"train": name, "train_split": "train[:2]"}, "train"),
        ({"train": name, "train_split": "train[:2]", "eval_split": "train[2:]", "revision": "main"}, "eval"),
    )
    assert train[:2] == [TRAIN, PLACE]
    assert test[:2] == [["test 0", "test 1", "test 2"], "acme/Some-Pairs, split test, row 1"]
    assert part[0] == TRAIN[:2]
    assert slices[0] == TRAIN[2:]


def test_what_a_hub_does_not_have_is_named(caller: HubCaller) -> None:
    said = caller.ask(
        ({"train": "acme/none"}, "train"),
        ({"train": "acme/Some-Pairs", "train_split": "dev"}, "train"),
        ({"train": "acme/Some-Pairs", "revision": "v9"}, "train"),
        ({"train": "some/data/set"}, "train"),
        ({"train": "acme/code"}, "train"),
        ({"train": "acme/broken"}, "train"),
    )
    assert [each[:2] for each in said[:5]] == [
        [
            "RecipeError",
            "acme/none: there is no such data set on the hub, or it is private; correct the name, log in with "
            "`hf auth login`, or write ./ before a local path",
        ],
        [
            "RecipeError",
            'acme/Some-Pairs: has no split "dev"; it has train, test; set data.train_split or data.eval_split',
        ],
        ["RecipeError", 'acme/Some-Pairs: has no revision "v9"; correct or remove data.revision'],
        [
            "RecipeError",
            "some/data/set: is no name of a hub data set (OWNER/NAME); a local path starts with ./ or ends in .jsonl, "
            ".json, .csv or .parquet",
        ],
        ["DataError", "acme/code: needs Python code of its own to be read, and code from a data set is never run"],
    ]
    assert said[5][0] == "DataError"
    assert said[5][1].startswith("acme/broken: its files cannot be read: ")


def closed_port() -> str:
    """An address on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


CACHED = ({"train": "acme/Some-Pairs"}, "train")
UNKNOWN = ({"train": "acme/other"}, "train")
BRANCH = ({"train": "acme/Some-Pairs", "revision": "v2"}, "train")


@pytest.mark.parametrize("offline", [True, False], ids=["offline mode", "hub away"])
def test_a_cached_data_set_is_read_at_once_without_a_hub(caller: HubCaller, offline: bool) -> None:
    env = {"HF_HUB_OFFLINE": "1"} if offline else {}
    cached, unknown, branch = caller.ask(CACHED, UNKNOWN, BRANCH, endpoint=closed_port(), **env)
    assert cached[:2] == [TRAIN, PLACE]
    assert max(cached[2], unknown[2], branch[2]) < 10
    assert unknown[:2] == [
        "SourceError",
        "acme/other: the hub cannot be reached, and it is not in the cache; connect this machine to the network once, "
        "or name a local file in the recipe",
    ]
    assert branch[:2] == [
        "SourceError",
        'acme/Some-Pairs: the hub cannot be reached, and revision "v2" is not in the cache; connect this machine to '
        "the network once, or name a local file in the recipe",
    ]


def test_a_pinned_commit_that_is_cached_asks_the_hub_nothing(caller: HubCaller) -> None:
    cached = next((caller.home / "datasets").glob("acme___*/*/*/*/dataset_info.json"))
    with socket.socket() as silent:  # takes calls and never answers, so any question would last its 10 seconds
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        revision = cached.parent.name
        said = caller.ask(({"train": "acme/Some-Pairs", "revision": revision}, "train"), endpoint=endpoint)
    assert said[0][:2] == [TRAIN, PLACE]
    assert said[0][2] < 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(number: int) -> None:
    failed = DatasetGenerationError("An error occurred while generating the dataset")
    failed.__cause__ = OSError(number, "no room")
    error = explain_dataset_error(failed, "acme/pairs", "train")
    assert type(error) is SourceError
    assert str(error) == (
        f"acme/pairs: the disk is full; free space in {datasets.config.HF_DATASETS_CACHE}, or set HF_HOME to a folder "
        "on a larger disk"
    )
