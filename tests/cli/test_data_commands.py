"""`qlora-dpo data`: pairs as the trainer sees them, what is odd about them, and a split by prompt."""

import io
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_run

from qlora_dpo.cli import main
from qlora_dpo.data import lint
from qlora_dpo.data.encode import load_pairs
from qlora_dpo.data.files import read_data_file
from qlora_dpo.data.pairs import parse_pairs
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.recipe.data import DataTable

LONG = "How do I find my way from the station to the library?"


def row(prompt: str = "Is it late?", chosen: str = "No, it is early.", rejected: str = "Yes.", **more: Any) -> Any:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def write(*rows: Any, name: str = "p.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


def found(*rows: Any) -> Any:
    return parse_pairs(SourceRows("p", list(rows), str))


ODD = [
    row(),
    row(chosen="  "),
    row(),
    row("is it  LATE", "no it is early", "YES!"),
    row(chosen="Yes.", rejected="No, it is early."),
    row(LONG, f"You ask: {LONG} Ask there.", "Follow the signs."),
    row("Another one?"),
]


def test_every_kind_of_oddity_is_found_with_its_rows() -> None:
    assert {each.problem: each.rows for each in lint.find_problems(found(*ODD))} == {
        "no pair: empty answer": (2,),
        "the same pair again": (3,),
        "alike but for case, punctuation and spaces": (4,),
        "the opposite of another pair": (1, 3, 5),
        "an answer repeats the question": (6,),
    }


def test_clean_rows_have_nothing_odd() -> None:
    assert lint.find_problems(found(row("a?"), row("b?"))) == []


def test_uneven_labels_are_found() -> None:
    rows = [{"prompt": f"{n}?", "completion": f"No, {n}.", "label": n > 0} for n in range(10)]
    (only,) = lint.find_problems(found(*rows))
    assert (only.problem, only.rows, only.fixable) == ("labels are 90% true", (1,), False)
    assert lint.length_stats(found(*rows).pairs) is None


def test_length_bias_is_a_share_and_an_effect_size() -> None:
    # logarithms of the lengths differ by ln 2, ln 2, ln 2, 0: mean 0.75 ln 2, deviation 0.5 ln 2
    bias = lint.length_stats(found(*[row(f"{n}?", "abcd", "ab" if n else "dcba") for n in range(4)]).pairs)
    assert bias is not None
    assert bias.chosen_longer == (3 + 0.5) / 4
    assert bias.effect_size == pytest.approx(1.5)
    assert bias.describe() == (
        "the chosen answer is the longer one in 87.5%, effect size +1.50; the loss may teach longer answers"
    )


def test_prompts_on_both_sides_are_found() -> None:
    assert lint.prompt_overlap(found(row("a?"), row("b?")).pairs, found(row("c?"), row("b?")).pairs) == (2,)


def test_lint_tells_what_it_found_and_writes_the_other_rows(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(*ODD)
    assert main(["data", "lint", "p.jsonl", "--fix", "mended.jsonl"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "p.jsonl: strings (prompt, chosen and rejected), 7 rows, 6 pairs",
        "        1  no pair: empty answer: rows 2; mend or remove",
        "        1  the same pair again: rows 3; keep one of them",
        "        1  alike but for case, punctuation and spaces: rows 4; keep one of them",
        "        3  the opposite of another pair: rows 1, 3, 5; decide which answer is the better one",
        "        1  an answer repeats the question: rows 6; remove the question from the answer",
        told.out.splitlines()[-1],
    ]
    assert told.out.splitlines()[-1].startswith("  the chosen answer is the longer one in ")
    assert told.err == "mended.jsonl: 1 of 7 rows\n"
    assert [json.loads(line) for line in Path("mended.jsonl").read_text().splitlines()] == [ODD[6]]
    assert main(["data", "lint", "mended.jsonl", "--strict"]) == 0
    assert main(["data", "lint", "p.jsonl", "--strict"]) == 3


def test_lint_as_json_is_one_object_with_every_row(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(*ODD)
    assert main(["data", "lint", "p.jsonl", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["source"], result["rows"], result["pairs"]) == ("p.jsonl", 7, 6)
    assert {"what": "the same pair again", "count": 1, "rows": [3], "advice": "keep one of them"} in result["findings"]
    assert set(result["length"]) == {"chosen_longer", "effect"}


def test_lint_of_a_recipe_compares_both_sides(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(row("a?"), row("b?"))
    write(row("c?"), row("a?"), name="q.jsonl")
    Path("r.toml").write_text('[model]\nname = "org/base"\n[data]\ntrain = "p.jsonl"\neval = "q.jsonl"\n')
    assert main(["data", "lint", "r.toml", "--strict"]) == 3
    assert "        1  held-out prompts that are trained on: rows 2; set data.eval_share, or other splits" in (
        capsys.readouterr().out.splitlines()
    )


def test_show_marks_what_is_scored_as_the_trainer_scores_it(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(row("Hi <|im_end|>?"), row("b?"))
    assert main(["data", "show", "p.jsonl", "--row", "1", "--model", str(tiny_run.source().folder)]) == 0
    out = capsys.readouterr().out
    assert "⟦No, it is early.<|im_end|>⟧\\n\n" in out and "⟦Yes.<|im_end|>⟧\\n\n" in out
    table = DataTable(train="./p.jsonl", eval="./q.jsonl")
    pair = load_pairs(table, "train", tiny.tokenizer(), 0).encoded[0]
    assert f"chosen: {len(pair.prompt)} tokens read, {len(pair.chosen)} scored\n" in out
    assert main(["data", "show", "p.jsonl", "--row", "1", "--model", str(tiny_run.source().folder), "--tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert [int(line.split()[1]) for line in lines] == [*pair.prompt, *pair.chosen, *pair.rejected]
    assert [line.split()[0] for line in lines].count("rejected") == len(pair.rejected)


def test_show_without_a_model_shows_the_text(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(row("Hi \x1b[2J?"))
    assert main(["data", "show", "p.jsonl"]) == 0
    assert capsys.readouterr().out == "p.jsonl:1\nuser: Hi ?\nchosen: No, it is early.\nrejected: Yes.\n\n"


def test_show_says_why_a_row_is_no_pair(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(row(), row(chosen=""))
    assert main(["data", "show", "p.jsonl", "--row", "2"]) == 2
    assert capsys.readouterr().err == "qlora-dpo: p.jsonl: row 2 is no pair: empty answer\n"
    assert main(["data", "show", "p.jsonl", "--row", "9"]) == 2
    assert capsys.readouterr().err == "qlora-dpo: p.jsonl: row 9 is not there\n"


def test_split_puts_every_prompt_on_one_side(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(*[row(f"{n % 30}?", f"No, {n}.") for n in range(60)], row(chosen=""))
    assert main(["data", "split", "p.jsonl", "-o", "pairs", "--share", "0.3"]) == 0
    told = capsys.readouterr()
    sides = {
        name: [json.loads(line) for line in Path(f"pairs/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    prompts = {name: {each["prompt"] for each in rows} for name, rows in sides.items()}
    assert prompts["train"].isdisjoint(prompts["test"]) and len(sides["train"]) + len(sides["test"]) == 60
    assert re.fullmatch(r"pairs/train\.jsonl: \d+ rows\npairs/test\.jsonl: \d+ rows\n", told.out)
    assert told.err == "left out: 1 rows that are no pairs; qlora-dpo data lint lists them\n"
    assert main(["data", "split", "p.jsonl", "-o", "pairs"]) == 1
    assert capsys.readouterr().err == "qlora-dpo: pairs: is there already; name a new folder with -o DIR\n"


def test_show_without_a_pair_says_why(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(row(chosen=""), row(rejected=" "), row(rejected="No, it is early."))
    assert main(["data", "show", "p.jsonl"]) == 1
    assert capsys.readouterr().err == (
        "qlora-dpo: p.jsonl: holds no pair: empty answer (2, first p.jsonl:1), equal answers (1, first p.jsonl:3)\n"
    )


@pytest.mark.parametrize(("no_color", "is_coloured"), [("1", False), ("", True), (None, True)])
def test_show_has_colour_on_a_terminal_unless_no_color_is_set(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch, no_color: str | None, is_coloured: bool
) -> None:
    write(row())
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    assert main(["data", "show", "p.jsonl"]) == 0
    assert ("\x1b[" in shown.getvalue()) is is_coloured


WHEN = datetime(2024, 2, 3, 4, 5, 6, tzinfo=UTC)
UNUSUAL = {"score": float("nan"), "at": WHEN, "raw": b"\xff\x00", "word": b"ab", "deep": [{"x": [float("inf")]}]}
WRITTEN = {"score": None, "at": WHEN.isoformat(), "raw": "/wA=", "word": "ab", "deep": [{"x": [None]}]}
SAID = [
    "2 values that are not finite (NaN, infinity) are written as null",
    "3 values that JSON does not have (dates, bytes, ...) are written as text",
]


def test_what_json_does_not_have_is_written_so_that_it_can_be_read(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.Table.from_pylist([row("0?") | UNUSUAL]), "p.parquet")
    assert main(["data", "lint", "p.parquet", "--fix", "mended.jsonl"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        *(f"mended.jsonl: {each}" for each in SAID),
        "mended.jsonl: 1 of 1 rows",
    ]
    assert list(read_data_file(Path("mended.jsonl")).rows) == [row("0?") | WRITTEN]


def test_half_a_surrogate_pair_is_written_as_its_escape(empty_folder: Path) -> None:
    write(*[row(f"{n}? é", note="half \ud83d") for n in range(30)])
    assert main(["data", "split", "p.jsonl", "-o", "pairs", "--share", "0.3"]) == 0
    sides = [list(read_data_file(Path(f"pairs/{name}.jsonl")).rows) for name in ("train", "test")]
    assert sorted(map(str, [*sides[0], *sides[1]])) == sorted(
        str(row(f"{n}? é", note="half \ud83d")) for n in range(30)
    )
