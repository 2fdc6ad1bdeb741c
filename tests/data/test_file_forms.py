"""Files as people have them: each form is recognised, named in a sentence, and read as the same rows."""

import csv
import gzip
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.data.files import FileRows, read_data_file
from qlora_dpo.data.pairs import parse_pairs
from qlora_dpo.data.sources import concatenate_rows, read_sources
from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe.data import DataTable

CASES = Path(__file__).parents[3] / "shared" / "cases"
ROWS = [
    {"prompt": "Is it late?", "chosen": "No; it is early, # I think.", "rejected": "Yes."},
    {"prompt": 'Say "café" 🦜', "chosen": "Café | crème.", "rejected": "No, // never."},
    {"prompt": "1 + 1", "chosen": "2", "rejected": "3"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLES = {key: [row[key] for row in ROWS] for key in ROWS[0]}


def separated(separator: str, end: str = "\n", header: str | None = None) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator, lineterminator=end)
    if header is None:
        writer.writerow(ROWS[0])
    writer.writerows(row.values() for row in ROWS)
    return (header or "") + text.getvalue()


def read(name: str, content: str | bytes, split: str = "train") -> FileRows:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_data_file(Path(name), split)


def places(found: FileRows) -> list[str]:
    return [found.location(number).removeprefix(found.name) for number in range(1, len(found.rows) + 1)]


IN_ROWS = [", row 1", ", row 2", ", row 3"]
FORMS: dict[str, tuple[str, str | bytes, list[str], list[str]]] = {
    "JSON lines": ("p.ndjson", LINES, [], [":1", ":2", ":3"]),
    "JSON lines, packed": ("P.NDJSON.GZ", gzip.compress(LINES.encode()), [], [":1", ":2", ":3"]),
    "an array": (
        "p.jsonl",
        json.dumps(ROWS),
        ["is one JSON array of 3 rows, not JSON lines; read as an array"],
        IN_ROWS,
    ),
    "an array over several lines": (
        "p.ndjson",
        "\n" + json.dumps(ROWS, indent=2),
        ["is one JSON array of 3 rows, not JSON lines; read as an array"],
        IN_ROWS,
    ),
    "pretty-printed objects": (
        "p.jsonl",
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        ["holds 3 objects over several lines each, not JSON lines; read one by one"],
        [":1", ":6", ":11"],
    ),
    "pretty-printed objects with commas between": (
        "p.json",
        ",\n\n".join(json.dumps(row, indent=2) for row in ROWS),
        ["holds 3 objects over several lines each, not JSON lines; read one by one"],
        [":1", ":7", ":13"],
    ),
    "an object a line with commas between": (
        "p.jsonl",
        LINES.replace("\n", ",\n"),
        ["holds 3 objects with commas between them, not JSON lines; read one by one"],
        [":1", ":2", ":3"],
    ),
    "a pretty-printed object behind JSON lines": (
        "p.jsonl",
        "".join(LINES.splitlines(keepends=True)[:2]) + json.dumps(ROWS[2], indent=2),
        ["holds 3 objects over several lines each, not JSON lines; read one by one"],
        [":1", ":2", ":3"],
    ),
    "comments": (
        "p.jsonl",
        "# by hand\n\n// all of it\n" + LINES.replace("\n", "\n#\n", 1),
        ["3 comment lines left out"],
        [":4", ":6", ":7"],
    ),
    "comments in an array": (
        "p.json",
        "// mine\n" + json.dumps(ROWS, indent=2).replace("\n", "\n  // more\n", 1),
        ["2 comment lines left out"],
        IN_ROWS,
    ),
    "carriage returns": (
        "p.jsonl",
        "\ufeff" + LINES.replace("\n", "\r"),
        ["its lines end with a carriage return alone, as on old Macs; read as lines"],
        [":1", ":2", ":3"],
    ),
    "a dictionary of splits": (
        "p.json",
        json.dumps({"train": ROWS, "test": ROWS[:1], "version": 2}),
        [
            "holds the splits train (3 rows), test (1 row); train is read here, and data.train_split names another; "
            "1 other key left out"
        ],
        IN_ROWS,
    ),
    "a dictionary of splits over several lines, in capitals": (
        "p.jsonl",
        json.dumps({"Train": ROWS, "Test": []}, indent=1),
        ["holds the splits Train (3 rows), Test (0 rows); Train is read here, and data.train_split names another"],
        IN_ROWS,
    ),
    "splits of column lists": (
        "p.json",
        json.dumps({"train": TABLES, "test": TABLES}),
        ["holds the splits train (3 rows), test (3 rows); train is read here, and data.train_split names another"],
        IN_ROWS,
    ),
    "rows under a key": (
        "p.json",
        json.dumps({"version": 1, "data": ROWS}),
        ['is an object that holds its rows under "data"; 1 other key left out'],
        IN_ROWS,
    ),
    "a list for each column": (
        "p.json",
        json.dumps(TABLES),
        ["is a table with a list for each column; read as 3 rows"],
        IN_ROWS,
    ),
    "pandas' columns": (
        "p.json",
        json.dumps({key: {str(number): row[key] for number, row in enumerate(ROWS)} for key in ROWS[0]}),
        ["is a table of columns by row number, as pandas' to_json writes it; read as 3 rows"],
        IN_ROWS,
    ),
    "pandas' index": (
        "p.json",
        json.dumps({str(number): row for number, row in enumerate(ROWS)}),
        ['is a table of rows by their index, as pandas writes it with orient="index"; read as 3 rows'],
        IN_ROWS,
    ),
    "pandas' index of names": (
        "p.json",
        json.dumps({f"id-{number}": row for number, row in enumerate(ROWS)}),
        ['is a table of rows by their index, as pandas writes it with orient="index"; read as 3 rows'],
        IN_ROWS,
    ),
    "pandas' split": (
        "p.json",
        json.dumps({"columns": list(ROWS[0]), "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]}),
        ['is a table of columns and data, as pandas writes it with orient="split"; read as 3 rows'],
        IN_ROWS,
    ),
    "pandas' table": (
        "p.json",
        json.dumps(
            {
                "schema": {"fields": [{"name": "index", "type": "integer"}], "primaryKey": ["index"]},
                "data": [{"index": number, **row} for number, row in enumerate(ROWS)],
            }
        ),
        [
            'is a table with its schema, as pandas writes it with orient="table", its index index left out; read as '
            "3 rows"
        ],
        IN_ROWS,
    ),
    "CSV, packed": ("p.csv.gz", gzip.compress(separated(",").encode()), [], [":2", ":3", ":4"]),
    "tabs": ("p.tsv", separated("\t"), [], [":2", ":3", ":4"]),
    "semicolons": (
        "p.csv",
        separated(";"),
        ["its columns are separated by semicolons, not commas"],
        [":2", ":3", ":4"],
    ),
    "tabs in .csv": ("p.csv", separated("\t"), ["its columns are separated by tabs, not commas"], [":2", ":3", ":4"]),
    "commas in .tsv": ("p.tsv", separated(","), ["its columns are separated by commas, not tabs"], [":2", ":3", ":4"]),
    "bars": (
        "p.csv",
        separated("|"),
        ["its columns are separated by vertical bars, not commas"],
        [":2", ":3", ":4"],
    ),
    "a line that names the separator": (
        "p.csv",
        "\ufeffsep=;\r\n" + separated(";", "\r\n"),
        ["its first line says that columns are separated by semicolons; that line is left out"],
        [":3", ":4", ":5"],
    ),
    "a comment, then tabs": (
        "p.csv",
        "# made by hand, in 2024, v2\n\n" + separated("\t"),
        ["1 comment line before the header left out", "its columns are separated by tabs, not commas"],
        [":4", ":5", ":6"],
    ),
    "CSV with carriage returns": (
        "p.csv",
        separated(",", "\r"),
        ["its lines end with a carriage return alone, as on old Macs; read as lines"],
        [":2", ":3", ":4"],
    ),
    "spaces around names": (
        "p.csv",
        separated(",", header="prompt , chosen\t,rejected\n"),
        ["spaces around the names of columns are left out"],
        [":2", ":3", ":4"],
    ),
    "a space behind each comma": (
        "p.csv",
        "prompt, chosen, rejected\n"
        + "".join(", ".join('"' + text.replace('"', '""') + '"' for text in row.values()) + "\n" for row in ROWS),
        ["the space after each separator is left out"],
        [":2", ":3", ":4"],
    ),
}


@pytest.mark.parametrize(("name", "content", "notes", "where"), FORMS.values(), ids=FORMS)
def test_each_form_is_named_and_gives_the_same_rows(
    empty_folder: Path, name: str, content: str | bytes, notes: list[str], where: list[str]
) -> None:
    found = read(name, content)
    assert list(found.rows) == ROWS
    assert list(found.notes) == [f"{name}: {note}" for note in notes]
    assert places(found) == where


def test_what_was_recognised_is_logged_once_a_command(empty_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qlora_dpo")
    read("p.csv", separated(";"))
    read_data_file(Path("p.csv"))
    assert caplog.messages == ["p.csv: its columns are separated by semicolons, not commas"]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SINGLE: dict[str, dict[str, Any]] = {
    "strings": ROWS[0],
    "message lists": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
    "whole chats": {"chosen": CHAT, "rejected": CHAT},
    "messages as objects": {"chosen": CHAT[1], "rejected": CHAT[1]},
    "ranked": {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2]},
    "other names": {"question": "Hi", "good": "a", "bad": "b"},
}


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "several lines"])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
@pytest.mark.parametrize("row", SINGLE.values(), ids=SINGLE)
def test_a_file_of_one_row_is_that_row(empty_folder: Path, row: dict[str, Any], name: str, indent: int | None) -> None:
    found = read(name, json.dumps(row, indent=indent))
    assert (list(found.rows), found.notes, places(found)) == ([row], (), [":1"])


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("prompt;note,chosen,rejected", ["prompt;note", "chosen", "rejected"]),
        ("#id,prompt,chosen", ["#id", "prompt", "chosen"]),
        ("a;b,c", ["a;b", "c"]),
        ("prompt", ["prompt"]),
    ],
)
def test_a_header_of_commas_is_read_as_before(empty_folder: Path, header: str, columns: list[str]) -> None:
    cells = ["1", "2", "3"][: len(columns)]
    found = read("p.csv", f"{header}\n{','.join(cells)}\n")
    assert (list(found.rows), found.notes) == ([dict(zip(columns, cells, strict=True))], ())


def test_both_parts_may_be_splits_of_one_file(empty_folder: Path) -> None:
    Path("p.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:1], "dev": ROWS[1:]}))

    def rows(part: Any, **keys: Any) -> list[Any]:
        return list(concatenate_rows(read_sources(DataTable(train="./p.json", **keys), part)).rows)

    assert rows("train", train_split="dev") == ROWS[1:]
    assert rows("eval", eval="./p.json") == ROWS[:1]
    assert rows("train", eval="./p.json") == ROWS
    with pytest.raises(RecipeError, match='none is called "other"'):
        rows("train", train_split="other")


def test_a_file_without_splits_is_not_held_out_from_itself(empty_folder: Path) -> None:
    Path("p.json").write_text(json.dumps(ROWS))
    table = DataTable(train="./p.json", eval="./p.json")
    with pytest.raises(RecipeError, match=r"p\.json: would give both the training and the held-out pairs"):
        read_sources(table, "eval")
    with pytest.raises(RecipeError, match=r'data\.train_split is "dev", but p\.json is one file and has no splits'):
        read_sources(DataTable(train="./p.json", train_split="dev"), "train")


SHARED = {
    "array.jsonl": ["is one JSON array of 20 rows, not JSON lines; read as an array"],
    "pretty_objects.jsonl": ["holds 20 objects over several lines each, not JSON lines; read one by one"],
    "semicolon.csv": ["its columns are separated by semicolons, not commas"],
    "sep_line.csv": ["its first line says that columns are separated by commas; that line is left out"],
    "tab.csv": ["its columns are separated by tabs, not commas"],
}


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside this checkout")
def test_cases_of_new_emoji_are_all_pairs() -> None:
    (rows,) = read_sources(DataTable(train=str(CASES / "emoji_only.jsonl")), "train")
    parsed = parse_pairs(rows)
    assert (parsed.dropped, len(parsed.pairs)) == ({}, len(rows.rows))


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside this checkout")
@pytest.mark.parametrize("name", [*SHARED, "splits.json"])
def test_cases_of_others_are_read(name: str) -> None:
    found = read_data_file(CASES / name)
    assert set(found.rows[0]) == {"prompt", "chosen", "rejected"}
    assert len(found.rows) >= 8
    if name in SHARED:
        assert [note.removeprefix(f"{found.name}: ") for note in found.notes] == SHARED[name]
