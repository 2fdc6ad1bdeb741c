"""Preference data that cannot be trained on: each file gets one sentence, the right exit code and no traceback."""

import gzip
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from qlora_dpo.data.encode import load_pairs
from qlora_dpo.data.formats import SUPPORTED_FORMATS
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.recipe.data import DataTable

GOOD = {"prompt": "Is it late?", "chosen": "No, it is early.", "rejected": "Yes."}
ENDINGS = ".jsonl, .jsonl.gz, .ndjson, .ndjson.gz, .json, .json.gz, .csv, .csv.gz, .tsv, .tsv.gz, .parquet, .arrow"


def lines(*rows: Any) -> bytes:
    """JSON lines of `rows`; strings are taken as they are."""
    return b"".join((row if isinstance(row, str) else json.dumps(row)).encode() + b"\n" for row in rows)


def good(**changed: Any) -> dict[str, Any]:
    return GOOD | changed


def without(column: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != column}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def one(name: str, content: bytes, code: int, message: str, **keys: Any) -> Any:
    """A case of one file that the recipe names as `data.train`."""
    return {name: content}, {"train": f"./{name}", "eval": "./held-out.jsonl"} | keys, "train", code, message


def folder(files: Mapping[str, bytes], code: int, message: str, part: str = "train", **keys: Any) -> Any:
    """A case of a folder `pairs` that the recipe names as `data.train`."""
    return (
        {f"pairs/{name}": content for name, content in files.items()},
        {"train": "./pairs"} | keys,
        part,
        code,
        message,
    )


TEXT = {
    "bad JSON": one(
        "p.jsonl",
        lines(GOOD, '{"prompt": "a" "chosen": "b"}'),
        1,
        "p.jsonl:2: is not valid JSON (column 16): Expecting ',' delimiter",
    ),
    "trailing comma": one(
        "p.jsonl",
        lines(GOOD, "", '{"prompt": "a",}'),
        1,
        "p.jsonl:3: is not valid JSON (column 15): Illegal trailing comma before end of object"
        if sys.version_info >= (3, 13)
        else "p.jsonl:3: is not valid JSON (column 16): Expecting property name enclosed in double quotes",
    ),
    "trailing comma in an array": one(
        "p.json",
        b'[\n{"prompt": "a", "chosen": "b", "rejected": "c"},\n]',
        1,
        "p.json:2: is not valid JSON (column 48): Illegal trailing comma before end of array"
        if sys.version_info >= (3, 13)
        else "p.json:3: is not valid JSON (column 1): Expecting value",
    ),
    "cut off in mid-row": one(
        "p.jsonl",
        lines(GOOD) + b'{"prompt": "a", "chos',
        1,
        "p.jsonl:2: is not valid JSON (column 17): Unterminated string starting at",
    ),
    "two objects on a line": one(
        "p.jsonl", lines(json.dumps(GOOD) * 2), 1, "p.jsonl:1: is not valid JSON (column 76): Extra data"
    ),
    "a pretty-printed object that was cut off": one(
        "p.json",
        json.dumps(GOOD, indent=1).encode()[:-3],
        1,
        "p.json:4: is not valid JSON (column 14): Unterminated string starting at",
    ),
    "a bad object after pretty-printed ones": one(
        "p.jsonl",
        (json.dumps(GOOD, indent=1) + '\n\n{\n "prompt": x\n}').encode(),
        1,
        "p.jsonl:8: is not valid JSON (column 12): Expecting value",
    ),
    "an array that was cut off": one(
        "p.jsonl",
        json.dumps([GOOD, GOOD], indent=1).encode()[:-2],
        1,
        "p.jsonl:11: is not valid JSON (column 3): Expecting ',' delimiter",
    ),
    "arrays one a line": one(
        "p.jsonl",
        b'["a", "b"]\n["c", "d"]\n',
        1,
        "p.jsonl:1: is a list; every row must be an object with named columns",
    ),
    "splits without the one that is read": one(
        "p.json",
        json.dumps({"dev": [GOOD], "test": [GOOD, GOOD]}).encode(),
        2,
        'p.json: holds the splits dev (1 row), test (2 rows), and none is called "train"; set data.train_split or '
        "data.eval_split to one of them",
    ),
    "pandas' split orient with a cell too few": one(
        "p.json",
        json.dumps({"columns": ["prompt", "chosen"], "data": [["a", "b"], ["c"]]}).encode(),
        1,
        "p.json, row 2: has 1 values where there are 2 columns",
    ),
    "bad JSON behind a comment": one(
        "p.jsonl",
        b"# mine\n" + lines(GOOD, "{x}"),
        1,
        "p.jsonl:3: is not valid JSON (column 2): Expecting property name enclosed in double quotes",
    ),
    "bad JSON behind CR line ends": one(
        "p.jsonl",
        lines(GOOD, GOOD, "{x}").replace(b"\n", b"\r"),
        1,
        "p.jsonl:3: is not valid JSON (column 2): Expecting property name enclosed in double quotes",
    ),
    "no UTF-8 behind CR line ends": one(
        "p.csv",
        b"prompt,chosen,rejected\ra,b,c\rd,e,\xff\r",
        1,
        "p.csv:3: is not UTF-8 text (byte 33); save it as UTF-8",
    ),
    "not JSON at all": one(
        "p.jsonl", b"chosen,rejected\n", 1, "p.jsonl:1: is not valid JSON (column 1): Expecting value"
    ),
    "NaN": one("p.jsonl", lines(GOOD, '{"chosen": NaN}'), 1, "p.jsonl:2: is not valid JSON: NaN is no JSON value"),
    "endless nesting": one("p.jsonl", b"[" * 200_000, 1, "p.jsonl:1: is nested too deeply to be a preference pair"),
    "a line that is a list": one(
        "p.jsonl",
        lines(GOOD, "[1, 2]"),
        1,
        "p.jsonl:2: is a list; every row must be an object with named columns",
    ),
    "an array of strings": one(
        "p.json", b'["a", "b"]', 1, "p.json, row 1: is a string; every row must be an object with named columns"
    ),
    "empty file": one("p.jsonl", b"", 1, "p.jsonl: holds no rows; a preference set has one pair per row"),
    "only blank lines": one(
        "p.jsonl", b"\n \n\t\n", 1, "p.jsonl: holds no rows; a preference set has one pair per row"
    ),
    "empty array": one("p.json", b"[]", 1, "p.json: holds no rows; a preference set has one pair per row"),
    "not UTF-8": one(
        "p.jsonl",
        lines(GOOD) + "{'prompt': 'Café'}".encode("latin-1"),
        1,
        f"p.jsonl:2: is not UTF-8 text (byte {len(lines(GOOD)) + 15}); save it as UTF-8",
    ),
    "UTF-16": one("p.jsonl", json.dumps(GOOD).encode("utf-16"), 1, "p.jsonl: is UTF-16 text; save the file as UTF-8"),
    "truncated gzip": one(
        "p.jsonl.gz",
        gzip.compress(lines(*[GOOD] * 50))[:-9],
        1,
        "p.jsonl.gz: the gzip data ends too early; copy or download the file again",
    ),
    "not gzip": one(
        "p.jsonl.gz",
        lines(GOOD),
        1,
        "p.jsonl.gz: is not gzip data, or is damaged; take .gz off its name if it is plain text, else copy or "
        "download the file again",
    ),
    "damaged gzip": one(
        "p.jsonl.gz",
        gzip.compress(lines(GOOD))[:-8] + bytes(8),
        1,
        "p.jsonl.gz: is not gzip data, or is damaged; take .gz off its name if it is plain text, else copy or "
        "download the file again",
    ),
    "gzip without its ending": one(
        "p.jsonl",
        gzip.compress(lines(GOOD), mtime=0),
        1,
        "p.jsonl:1: is not UTF-8 text (byte 1); save it as UTF-8",
    ),
}

FILES = {
    "wrong ending": one(
        "p.txt",
        lines(GOOD),
        2,
        f"p.txt: is not a data file that can be read; its name must end in one of {ENDINGS}",
    ),
    "missing file": one(
        "p.jsonl", b"", 2, "q.jsonl: there is no such file; correct the path in the recipe", train="./q.jsonl"
    ),
    "missing folder": one(
        "p.jsonl",
        b"",
        2,
        f"pears: is not a data file that can be read; its name must end in one of {ENDINGS}",
        train="./pears",
    ),
    "folder in place of a file": (
        {"p.jsonl/x.txt": b""},
        {"train": "./p.jsonl", "eval": "./held-out.jsonl"},
        "train",
        2,
        f"p.jsonl: is a folder without data files; they end in {ENDINGS}",
    ),
    "a split of a file": one(
        "p.jsonl",
        lines(GOOD),
        2,
        'data.train_split is "dev", but p.jsonl is one file and has no splits; remove the key, or name a folder with '
        "one file per split",
        train_split="dev",
    ),
    "folder without data": folder(
        {"README.md": b"", ".train.jsonl": lines(GOOD)},
        2,
        f"pairs: is a folder without data files; they end in {ENDINGS}",
    ),
    "folder without the split": folder(
        {"train.jsonl": lines(GOOD), "contest.jsonl": lines(GOOD)},
        2,
        'pairs: no file has the split\'s name "test" in its own; it has contest.jsonl, train.jsonl; set '
        "data.eval_split, or name the file itself in data.eval",
        part="eval",
    ),
    "two kinds of files for a split": folder(
        {"train.csv": b"", "train.jsonl": lines(GOOD)},
        2,
        'pairs: it is not clear which files are the split "train": train.csv, train.jsonl; leave one of them, or name '
        "the file itself in data.train",
    ),
    "two sets in a folder": folder(
        {"cats-train.jsonl": lines(GOOD), "dogs-train.jsonl": lines(GOOD)},
        2,
        'pairs: it is not clear which files are the split "train": cats-train.jsonl, dogs-train.jsonl; leave one of '
        "them, or name the file itself in data.train",
    ),
    "one file for both splits": folder(
        {"train-and-test.jsonl": lines(GOOD)},
        2,
        "pairs/train-and-test.jsonl: would give both the training and the held-out pairs; name two files that share "
        "no rows, in data.train and data.eval or by data.train_split and data.eval_split",
        part="eval",
    ),
    "held-out file is the training file": folder(
        {"train.jsonl": lines(GOOD)},
        2,
        "pairs/train.jsonl: would give both the training and the held-out pairs; name two files that share no rows, "
        "in data.train and data.eval or by data.train_split and data.eval_split",
        part="eval",
        eval="./pairs/train.jsonl",
    ),
    "CSV without header": one(
        "p.csv",
        b"Is it late?,No.,Yes.\nIs it early?,Yes.,No.\n",
        1,
        f'p.csv: has no column "chosen"; it has Is it late?, No., Yes.; {SUPPORTED_FORMATS}'
        '; the row: {"Is it late?": "Is it early?", "No.": "Yes.", "Yes.": "No."}',
    ),
    "CSV header only": one(
        "p.csv", b"prompt,chosen,rejected\n", 1, "p.csv: holds no rows; a preference set has one pair per row"
    ),
    "CSV row too long": one(
        "p.csv",
        b'prompt,chosen,rejected\n"a\nb",c,d\nWell, now,b,c\n',
        1,
        "p.csv:4: has 4 fields where the header has 3; put text with commas, quotes or line breaks in double quotes",
    ),
    "CSV row too short": one(
        "p.csv",
        b"prompt,chosen,rejected\na,b\n",
        1,
        "p.csv:2: has 2 fields where the header has 3; put text with commas, quotes or line breaks in double quotes",
    ),
    "CSV with semicolons, a comment and a row too long": one(
        "p.csv",
        b"# mine\nsep=;\nprompt;chosen;rejected\na;b;c\nWell; now;b;c\n",
        1,
        "p.csv:5: has 4 fields where the header has 3; put text with semicolons, quotes or line breaks in double "
        "quotes",
    ),
    "CSV with an open quote": one(
        "p.csv",
        b'prompt,chosen,rejected\na,b,"c\n',
        1,
        "p.csv:2: is not valid CSV: unexpected end of data",
    ),
    "CSV with a column twice": one(
        "p.csv",
        b"prompt,chosen,chosen\na,b,c\n",
        1,
        'p.csv:1: names the column "chosen" twice; column names must differ',
    ),
    "not Parquet": one(
        "p.parquet",
        lines(GOOD),
        1,
        "p.parquet: is not Parquet data, or is damaged; copy or download the file again",
    ),
    "truncated Parquet": one(
        "p.parquet",
        parquet([GOOD])[:-20],
        1,
        "p.parquet: is not Parquet data, or is damaged; copy or download the file again",
    ),
    "Parquet without rows": one(
        "p.parquet",
        parquet([GOOD])[:0],
        1,
        "p.parquet: is not Parquet data, or is damaged; copy or download the file again",
    ),
    "Parquet of numbers": one(
        "p.parquet",
        parquet([good(chosen=1)]),
        1,
        'p.parquet, row 1: "prompt" is a string, "chosen" is a number and "rejected" is a string; it has the columns '
        f'prompt, chosen, rejected; {SUPPORTED_FORMATS}; the row: {{"prompt": "Is it late?", "chosen": 1, "rejected": '
        '"Yes."}',
    ),
}

COLUMNS = {
    "missing column": one(
        "p.jsonl",
        lines(without("rejected")),
        1,
        f'p.jsonl: has no column "rejected"; it has prompt, chosen; {SUPPORTED_FORMATS}'
        '; the row: {"prompt": "Is it late?", "chosen": "No, it is early."}',
    ),
    "misspelt column": one(
        "p.jsonl",
        lines(without("rejected") | {"rejcted": "b"}),
        1,
        'p.jsonl: has no column "rejected"; it has prompt, chosen, rejcted; set data.columns = '
        '{ rejected = "rejcted" } if "rejcted" is meant; the row: {"prompt": "Is it late?", "chosen": "No, it is '
        'early.", "rejcted": "b"}',
    ),
    "terminal escapes in a column name": one(
        "p.jsonl",
        lines({"\x1b[2J\u202ewords": 1}),
        1,
        f'p.jsonl: has no column "chosen"; it has words; {SUPPORTED_FORMATS}; the row: {{"words": 1}}',
    ),
    "string beside a list": one(
        "p.jsonl",
        lines(good(rejected=["Yes.", "No."])),
        1,
        'p.jsonl:1: "prompt" is a string, "chosen" is a string and "rejected" is a list; it has the columns prompt, '
        f'chosen, rejected; {SUPPORTED_FORMATS}; the row: {{"prompt": "Is it late?", "chosen": "No, it is early.", '
        '"rejected": ["Yes.", "No."]}',
    ),
    "answers null everywhere": one(
        "p.jsonl",
        lines(good(chosen=None), good(rejected=None)),
        1,
        'p.jsonl: "chosen" or "rejected" is null in every row',
    ),
}


LENGTHS = {
    "all over-long": one(
        "p.jsonl",
        lines(GOOD, GOOD),
        1,
        "p.jsonl: none of its 2 rows is a usable pair: longer than max_length (2, first p.jsonl:1)",
        max_length=8,
    ),
    "answers that leave no room": one(
        "p.jsonl",
        lines("", good(chosen="No. " * 40)),
        1,
        "p.jsonl: its only row is no usable pair: answer leaves no room for a prompt in max_length (1, first "
        "p.jsonl:2)",
        max_length=60,
        overlong="cut_prompt",
    ),
    "over-long is an error": one(
        "p.jsonl",
        lines(GOOD, *[good(chosen="No. " * 99)] * 7),
        1,
        "p.jsonl: 7 pairs are longer than data.max_length = 80 tokens (row 2, 3, 4, 5, 6, ...); raise it, or set "
        'data.overlong to "drop" or "cut_prompt"',
        max_length=80,
        overlong="error",
    ),
}

CASES = TEXT | FILES | COLUMNS | LENGTHS


def write(files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


@pytest.mark.parametrize(("files", "keys", "part", "code", "message"), CASES.values(), ids=CASES)
def test_bad_data_is_refused_in_one_sentence(
    empty_folder: Path, files: Mapping[str, bytes], keys: dict[str, Any], part: Any, code: int, message: str
) -> None:
    write(files)
    with pytest.raises(QloraDpoError) as refused:
        load_pairs(DataTable(**keys), part, tiny.tokenizer(), seed=0)
    assert str(refused.value) == message
    assert refused.value.exit_code == code
    assert "\n" not in message


def test_there_are_forty_cases_and_more() -> None:
    assert len(CASES) >= 40


def test_a_column_to_keep_must_exist(empty_folder: Path) -> None:
    write({"p.jsonl": lines(GOOD)})
    with pytest.raises(QloraDpoError) as refused:
        load_pairs(
            DataTable(train="./p.jsonl", eval="./q.jsonl"),
            "train",
            tiny.tokenizer(),
            0,
            extra_columns={"kind": "samples.group_by"},
        )
    assert str(refused.value) == (
        'p.jsonl: has no column "kind", which samples.group_by names; it has prompt, chosen, rejected'
    )
    assert refused.value.exit_code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file, so none can be made unreadable")
def test_an_unreadable_file_is_named(empty_folder: Path) -> None:
    write({"p.jsonl": lines(GOOD)})
    Path("p.jsonl").chmod(0)
    with pytest.raises(QloraDpoError) as refused:
        load_pairs(DataTable(train="./p.jsonl", eval="./q.jsonl"), "train", tiny.tokenizer(), seed=0)
    assert str(refused.value) == "p.jsonl: cannot be read: Permission denied"
    assert refused.value.exit_code == 1


def test_a_tokenizer_without_chat_template_is_refused(empty_folder: Path) -> None:
    write({"p.jsonl": lines(GOOD)})
    with pytest.raises(QloraDpoError) as refused:
        load_pairs(DataTable(train="./p.jsonl", eval="./q.jsonl"), "train", tiny.tokenizer(None), seed=0)
    assert str(refused.value) == (
        "the model's tokenizer has no chat template, as base models have none; give it one with "
        'model.chat_template = "plain" (or "chatml", or a .jinja file), or name an instruct model in model.name'
    )
