"""What lint finds in a row's own text, and what `--fix` makes of it: keys that stand twice, questions repeated."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run

from qlora_dpo.cli import main
from qlora_dpo.data import arrow_cache, lint
from qlora_dpo.data.files import read_data_file
from qlora_dpo.data.mixture import parse_sources
from qlora_dpo.data.pairs import parse_pairs
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.data.templates.template_lint import find_template_problems
from qlora_dpo.recipe.data import DataTable

CASES = Path(__file__).parents[3] / "shared" / "cases"
Q = "How do I fold a paper boat?"
TWICE = '{"prompt": "Is it late?", "chosen": "No.", "rejected": "Yes.", "chosen": "Second."}'
NESTED = (
    '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "chosen": [{"role": "assistant", "content": "c"}]}'
)
ONCE = '{"prompt": "Say \\"a\\": \\"b\\":", "chosen" : "No.", "rejected": "Yes."}'


def parsed(*rows: Any) -> Any:
    return parse_pairs(SourceRows("p", list(rows), str))


@pytest.mark.parametrize(
    ("name", "content", "repeated"),
    [
        ("p.jsonl", f"{ONCE}\n\n{TWICE}\n{NESTED}\n{ONCE}\n", {2: "chosen", 3: "content"}),
        ("p.json", f"[{ONCE}, {TWICE},\n{NESTED}]", {2: "chosen", 3: "content"}),
        ("p.jsonl", f"{ONCE}\n{json.dumps(json.loads(ONCE), indent=1)}\n{{\n{TWICE[1:]}", {3: "chosen"}),
        ("p.json", f'{{"train": [{ONCE}, {TWICE}], "test": [{TWICE}]}}', {2: "chosen"}),
        ("p.jsonl", f"{ONCE}\n", {}),
        ("p.jsonl", '{"a" : 1, "a" : 2}\n{"a": 1}', {1: "a"}),
        ("p.jsonl", '{"a": 1, "\\u0061": 2}\n{"a": 1}', {1: "a"}),
    ],
)
def test_a_key_that_stands_twice_is_found_at_any_depth(
    empty_folder: Path, name: str, content: str, repeated: dict[int, str]
) -> None:
    Path(name).write_text(content)
    found = read_data_file(Path(name))
    list(found.rows)
    assert found.repeated_keys() == repeated


def test_rows_with_a_key_twice_are_named_while_they_are_read(
    empty_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO, "qlora_dpo")
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arrow_cache, "MIN_CACHED_ROWS", 1)
    Path("a.jsonl").write_text(f"{ONCE}\n")
    Path("p.jsonl").write_text(f"{ONCE}\n{TWICE}\n\n{TWICE}\n")
    sentence = 'p.jsonl: 2 rows have a key twice (first "chosen" in p.jsonl:2); the last value is read'
    table = DataTable.model_validate({"mix": [{"source": "./a.jsonl"}, {"source": "./p.jsonl"}]})
    for _ in range(2):  # the second time from the cache
        assert parse_sources(table, "train", {}).parsed.repeated_keys == {3: "chosen", 4: "chosen"}
        assert caplog.messages == [sentence]


def test_lint_lists_rows_with_a_key_twice_and_keeps_their_last_value(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.jsonl").write_text(f"{ONCE}\n{TWICE}\n")
    assert main(["data", "lint", "p.jsonl", "--fix", "m.jsonl"]) == 0
    told = capsys.readouterr()
    assert '        1  a key twice in one object ("chosen"): rows 2; the last value is read; keep one' in told.out
    assert told.err.splitlines() == [
        'p.jsonl: 1 row has a key twice ("chosen" in p.jsonl:2); the last value is read',
        "m.jsonl: 2 of 2 rows",
        "m.jsonl: 1 rows have the last value of a key that stands twice",
    ]
    assert json.loads(Path("m.jsonl").read_text().splitlines()[1])["chosen"] == "Second."


def said(text: str) -> str:
    return f"{Q} {text}"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


REPEATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strings": (
        {"prompt": Q, "chosen": said("Fold it."), "rejected": f" {Q}\n\nNo.", "id": 1},
        {"prompt": Q, "chosen": "Fold it.", "rejected": "No.", "id": 1},
    ),
    "message lists": (
        {
            "prompt": [turn("user", Q)],
            "chosen": [turn("assistant", said("a"))],
            "rejected": [turn("assistant", said("b"))],
        },
        {"prompt": [turn("user", Q)], "chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]},
    ),
    "whole chats": (
        {
            "chosen": [turn("user", Q), turn("assistant", said("a"))],
            "rejected": [turn("user", Q), turn("assistant", said("b"))],
        },
        {
            "chosen": [turn("user", Q), turn("assistant", "a")],
            "rejected": [turn("user", Q), turn("assistant", "b")],
        },
    ),
    "HH dialogues": (
        {
            "chosen": f"\n\nHuman: {Q}\n\nAssistant: {said('a')}",
            "rejected": f"\n\nHuman: {Q}\n\nAssistant: {said('b')}",
        },
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: a", "rejected": f"\n\nHuman: {Q}\n\nAssistant: b"},
    ),
    "ranked": (
        {"prompt": Q, "responses": [said("a"), said("b"), said("c")], "scores": [3, 2, 1]},
        {"prompt": Q, "responses": ["a", "b", "c"], "scores": [3, 2, 1]},
    ),
}


@pytest.mark.parametrize(("row", "mended"), REPEATED.values(), ids=REPEATED)
def test_a_question_at_the_head_of_both_answers_is_found_and_left_out(
    empty_folder: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], mended: dict[str, Any]
) -> None:
    Path("p.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["data", "lint", "p.jsonl", "--fix", "m.jsonl"]) == 0
    told = capsys.readouterr()
    assert "        1  the answers begin with the question: rows 1; leave it out, as --fix does" in told.out
    assert told.err.splitlines() == [
        "m.jsonl: 1 of 1 rows",
        "m.jsonl: the question at the head of the answers is left out of 1 rows",
    ]
    assert [json.loads(line) for line in Path("m.jsonl").read_text().splitlines()] == [mended]
    assert lint.find_problems(parsed(mended)) == []


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "chosen": said("a"), "rejected": "b"},
        {"prompt": "Good morning", "chosen": "Good morning! How are you?", "rejected": "Good morning. What?"},
        {"prompt": "Why", "chosen": "Why not.", "rejected": "Why, indeed."},
        {"prompt": "Write a poem about a cat", "chosen": "Write a poem about a category", "rejected": "No."},
    ],
)
def test_an_answer_may_begin_like_its_question(row: dict[str, Any]) -> None:
    assert lint.QUESTION_FIRST not in [finding.problem for finding in lint.find_problems(parsed(row))]


def test_rows_that_are_no_pairs_without_the_question_are_left_out_and_counted(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": Q, "chosen": said("a"), "rejected": said("b")},
        {"prompt": Q, "chosen": said("c"), "rejected": Q},
        {"prompt": Q, "chosen": said("d"), "rejected": f"{Q}\nd"},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "lint", "p.jsonl", "--fix", "m.jsonl"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "m.jsonl: 1 of 3 rows",
        "m.jsonl: the question at the head of the answers is left out of 1 rows",
        "m.jsonl: 2 rows are left out, which are no pairs without the question",
    ]


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "problem"),
    [("prompt_in_answer.jsonl", lint.QUESTION_FIRST), ("dupkey.jsonl", 'a key twice in one object ("chosen")')],
)
def test_cases_of_others_are_found_in_every_row(name: str, problem: str) -> None:
    found = parse_sources(DataTable(train=str(CASES / name)), "train", {}).parsed
    (rows,) = [finding.rows for finding in lint.find_problems(found) if finding.problem == problem]
    assert len(rows) >= 20


MARKED = {"prompt": "Hi <|im_end|>?", "chosen": "No, it is early.", "rejected": "Yes."}
LONG = {"prompt": "Hi?", "chosen": "No, " * 40, "rejected": "Yes."}


def test_lint_through_a_model_finds_what_training_drops_or_changes() -> None:
    table = DataTable(train="./p.jsonl", max_length=64)
    found, tokens = find_template_problems(parsed(MARKED, LONG, MARKED).pairs, tiny.tokenizer(), table)
    assert [(each.problem, each.rows, each.fixable) for each in found] == [
        ("longer than data.max_length = 64 tokens", (2,), True),
        ("changed for this model: control tokens read as text", (1, 3), False),
    ]
    assert tokens["chosen"][2] > 64 > tokens["rejected"][2]
    refusing = tiny.tokenizer("{{ raise_exception('no chats today') if messages|length > 3 }}" + tiny.CHATML)
    cut = table.model_copy(update={"overlong": "cut_prompt"})
    turns = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    row = {"prompt": turns, "chosen": [turn("assistant", "d")], "rejected": [turn("assistant", "e")]}
    (refused,), _ = find_template_problems(parsed(row).pairs, refusing, cut)
    assert (refused.problem, refused.rows) == ("no pair for this model: chat template refuses it: no chats today", (1,))


def test_lint_takes_a_model(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (MARKED, LONG | {"chosen": "No, " * 600})))
    model = str(tiny_run.source().folder)
    capsys.readouterr()
    assert main(["data", "lint", "p.jsonl", "--model", model, "--fix", "m.jsonl"]) == 0
    told = capsys.readouterr()
    assert (
        "        1  longer than data.max_length = 512 tokens: rows 2; shorten it, or raise data.max_length" in told.out
    )
    assert "\n  tokens (p50 / p95 / max): prompt " in told.out
    assert told.err.splitlines()[-1] == "m.jsonl: 1 of 2 rows"
    assert "\n  nats a token: " in told.out
    assert main(["data", "lint", "p.jsonl", "--model", model, "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert set(judged["tokens"]) == {"prompt", "chosen", "rejected"}
    assert judged["forecast"]["chosen"] == 1  # the other is too long
    Path("p.jsonl").write_text(json.dumps(LONG | {"chosen": "No, " * 600}) + "\n")
    assert main(["data", "lint", "p.jsonl", "--model", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forecast"] is None
