"""Every shape of preference data becomes pairs without a map, or with one; what is guessed is said."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import commands_in_process
import pytest
import tiny
import tiny_run

from qlora_dpo.data.encode import load_pairs
from qlora_dpo.data.formats import FORMATS_BY_NAME, PreferenceFormat
from qlora_dpo.data.pairs import Pair, parse_pairs
from qlora_dpo.data.rows.reader import ParseOptions
from qlora_dpo.data.sources import SourceRows, concatenate_rows, read_sources
from qlora_dpo.errors import DataError
from qlora_dpo.recipe.data import DataTable, FormatName

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real preference data is not beside this checkout")


def rows(*content: dict[str, Any]) -> SourceRows:
    return SourceRows("p.jsonl", list(content), lambda number: f"p.jsonl:{number}")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


ASKED = (user("Is it late?"),)
SAID = {"role": "assistant", "content": "No."}
SHAREGPT = {
    "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Is it late?"}],
    "chosen": {"from": "gpt", "value": "No."},
    "rejected": {"from": "gpt", "value": "Yes."},
}
CASES: dict[str, tuple[dict[str, Any], PreferenceFormat, tuple[Any, ...]]] = {
    "ShareGPT": (SHAREGPT, PreferenceFormat.SHAREGPT, ({"role": "system", "content": "Be kind."}, *ASKED)),
    "Alpaca": (
        {"instruction": "Is it late?", "input": "", "chosen": "No.", "rejected": "Yes.", "output": "No."},
        PreferenceFormat.ALPACA,
        ASKED,
    ),
    "Alpaca with an input": (
        {"instruction": "Is it late?", "input": "It is 8.", "chosen": "No.", "rejected": "Yes."},
        PreferenceFormat.ALPACA,
        (user("Is it late?\nIt is 8."),),
    ),
    "Alpaca with history and a system text": (
        {
            "system": "Be kind.",
            "history": [["Hi.", "Hello."]],
            "instruction": "Is it late?",
            "chosen": "No.",
            "rejected": "Yes.",
        },
        PreferenceFormat.ALPACA,
        (
            {"role": "system", "content": "Be kind."},
            user("Hi."),
            {"role": "assistant", "content": "Hello."},
            user("Is it late?"),
        ),
    ),
    "strings with a system column": (
        {"system": "Be kind.", "prompt": "Is it late?", "chosen": "No.", "rejected": "Yes."},
        PreferenceFormat.STRINGS,
        ({"role": "system", "content": "Be kind."}, *ASKED),
    ),
    "chats with a system column": (
        {"system": "Be kind.", "chosen": [*ASKED, SAID], "rejected": [*ASKED, {**SAID, "content": "Yes."}]},
        PreferenceFormat.CHATS,
        ({"role": "system", "content": "Be kind."}, *ASKED),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_shape_is_recognised_and_read(case: str) -> None:
    row, shape, prompt = CASES[case]
    found = parse_pairs(rows(row))
    assert found.format is shape
    assert found.pairs == [Pair(prompt, "No.", "Yes.", 1, {})]


def test_columns_are_renamed_as_the_recipe_says() -> None:
    row = {"question": "Is it late?", "good": "No.", "bad": "Yes."}
    reading = ParseOptions(columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert parse_pairs(rows(row), options=reading).pairs == [Pair(ASKED, "No.", "Yes.", 1, {})]


def test_a_shape_can_be_forced() -> None:
    row = {"prompt": "\n\nHuman: Is it late?\n\nAssistant:", "chosen": "No.", "rejected": "Yes."}
    assert parse_pairs(rows(row)).format is PreferenceFormat.HH_PROMPT
    found = parse_pairs(rows(row), options=ParseOptions(format="strings"))
    prompt = (user("\n\nHuman: Is it late?\n\nAssistant:"),)
    assert (found.format, found.pairs) == (PreferenceFormat.STRINGS, [Pair(prompt, "No.", "Yes.", 1, {})])
    assert {*FORMATS_BY_NAME, "auto", "compared", "text"} == set(get_args(FormatName))


RANKED = {"prompt": "Is it late?", "responses": ["A.", {"content": "B."}, "C.", "D."], "scores": [1, 5, 3, 3]}


def test_ranked_answers_make_every_pair_of_different_rank() -> None:
    found = parse_pairs(rows(RANKED))
    assert found.format is PreferenceFormat.RANKED
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [
        ("B.", "C."),
        ("B.", "D."),
        ("B.", "A."),
        ("C.", "A."),
        ("D.", "A."),
    ]
    assert {pair.row for pair in found.pairs} == {1}


def test_or_the_best_and_the_worst_alone() -> None:
    (pair,) = parse_pairs(rows(RANKED), options=ParseOptions(every_pair=False)).pairs
    assert (pair.chosen, pair.rejected) == ("B.", "A.")
    ranks = {"prompt": "Is it late?", "responses": ["A.", "B."], "ranks": [2, 1]}
    (pair,) = parse_pairs(rows(ranks), options=ParseOptions(every_pair=False)).pairs
    assert (pair.chosen, pair.rejected) == ("B.", "A.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scores": [1]}, "another number of scores than of responses"),
        ({"scores": [2, 2, 2, 2]}, "no two responses of different rank"),
        ({"scores": None}, "scores is no list of numbers"),
        ({"scores": ["a"]}, "scores is no list of numbers"),
        ({"responses": [1, 2, 3, 4]}, "an answer is a number, not a string"),
        ({"responses": []}, "another number of scores than of responses"),
        ({"prompt": 3}, "prompt is a number, not a string or a list"),
        ({"responses": ["A.", "A.", "A.", "A."]}, "equal answers"),
    ],
)
def test_bad_ranked_rows_get_a_verdict(change: dict[str, Any], reason: str) -> None:
    assert parse_pairs(rows(RANKED, {**RANKED, **change})).dropped == {reason: [2]}


def test_the_account_of_ranked_rows_adds_up(empty_folder: Path) -> None:
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (RANKED, {**RANKED, "scores": [1]}, RANKED)))
    audit = load_pairs(DataTable(train="./p.jsonl", eval="./q.jsonl"), "train", tiny.tokenizer(), 0).audit
    assert (audit.rows, audit.used, audit.extra_pairs) == (3, 10, 8)
    assert audit.rows == audit.used - audit.extra_pairs + audit.not_sampled + sum(map(len, audit.dropped.values()))
    assert "  of them beyond one a row" in "\n".join(audit.lines())
    drawn = load_pairs(
        DataTable(train="./p.jsonl", eval="./q.jsonl", max_train_samples=3), "train", tiny.tokenizer(), 0
    ).audit
    assert drawn.rows == drawn.used - drawn.extra_pairs + drawn.not_sampled + sum(map(len, drawn.dropped.values()))
    assert drawn.used == 3


UNPAIRED = [
    {"messages": [*ASKED, SAID], "label": True},
    {"prompt": "Is it late?", "completion": "Yes.", "label": False},
    {"prompt": [*ASKED], "completion": [{"role": "assistant", "content": "Maybe."}], "label": True},
    {
        "conversations": [{"from": "human", "value": "Is it late?"}, {"from": "gpt", "value": "Ask again."}],
        "label": False,
    },
]


def test_unpaired_answers_stand_beside_the_next_answer_that_differs() -> None:
    found = parse_pairs(rows(*UNPAIRED))
    assert found.format is PreferenceFormat.UNPAIRED
    assert [(pair.chosen, pair.rejected, pair.label) for pair in found.pairs] == [
        ("No.", "Yes.", True),
        ("Yes.", "Maybe.", False),
        ("Maybe.", "Ask again.", True),
        ("Ask again.", "No.", False),
    ]
    assert all(pair.prompt == ASKED for pair in found.pairs)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [*ASKED], "label": True}, "last turn is not the assistant's"),
        ({"prompt": "a", "completion": 3, "label": True}, "an answer is a number, not a string"),
        ({"prompt": "a", "completion": " ", "label": True}, "empty answer"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "label is a string, not true or false"),
        ({"prompt": "a", "completion": "b"}, "label is null, not true or false"),
    ],
)
def test_bad_unpaired_rows_get_a_verdict(row: dict[str, Any], reason: str) -> None:
    assert parse_pairs(rows(*UNPAIRED, row)).dropped == {reason: [5]}


def test_one_answer_alone_cannot_be_compared() -> None:
    found = parse_pairs(rows(UNPAIRED[0], UNPAIRED[0]))
    assert found.dropped == {"no other answer to compare with": [1, 2]}


FILES: dict[str, tuple[PreferenceFormat, int, dict[str, int]]] = {
    "alpaca/instruction-data-with-preference.json": (PreferenceFormat.ALPACA, 1100, {"equal answers": 6}),
    "hh/full-hh-style.jsonl.gz": (PreferenceFormat.HH_PROMPT, 3469, {}),
    "hh/helpful-base/test.jsonl.gz": (PreferenceFormat.HH, 2354, {}),
    "hh/helpful-online/test.jsonl.gz": (PreferenceFormat.HH, 1137, {}),
    "oasst/messages-pairs.jsonl.gz": (PreferenceFormat.MESSAGES, 754, {}),
    "sharegpt/dpo_en_demo.json": (PreferenceFormat.SHAREGPT, 300, {}),
    "sharegpt/dpo_zh_demo.json": (PreferenceFormat.SHAREGPT, 300, {}),
    "sharegpt/kto_en_demo.json": (PreferenceFormat.UNPAIRED, 300, {}),
    "ultrafeedback/messages-eval.jsonl.gz": (PreferenceFormat.CHATS, 200, {}),
    "ultrafeedback/messages-train.jsonl.gz": (PreferenceFormat.CHATS, 1000, {}),
}


@needs_shared
@pytest.mark.parametrize("file", FILES)
def test_real_files_load_without_a_map_and_every_row_is_accounted_for(file: str) -> None:
    shape, count, dropped = FILES[file]
    table = DataTable(train=str(SHARED / file), eval="./other.jsonl", max_length=100_000, max_train_samples=200)
    held = load_pairs(table, "train", tiny.tokenizer(), seed=0)
    assert held.audit.format == shape.value
    assert held.audit.rows == count
    assert held.audit.rows == held.audit.used + held.audit.not_sampled + sum(map(len, held.audit.dropped.values()))
    for reason, number in dropped.items():
        assert len(held.audit.dropped[reason]) == number
    assert held.audit.used == min(200, count - sum(map(len, held.audit.dropped.values())))


@needs_shared
def test_on_all_of_hh_no_prompt_ends_in_the_middle_of_a_word() -> None:
    for file in ("hh/helpful-base/test.jsonl.gz", "hh/helpful-online/test.jsonl.gz"):
        source = concatenate_rows(read_sources(DataTable(train=str(SHARED / file), eval="./other.jsonl"), "train"))
        found = parse_pairs(source)
        assert len(found.pairs) > 0.9 * len(source.rows)
        for pair in found.pairs:
            row = source.rows[pair.row - 1]
            for answer, whole in ((pair.chosen, row["chosen"]), (pair.rejected, row["rejected"])):
                start = whole.rindex("\n\nAssistant:") + len("\n\nAssistant:")
                assert whole[start:].removeprefix(" ") == answer


def test_a_share_of_the_prompts_is_held_out_and_none_stands_on_both_sides(empty_folder: Path) -> None:
    content = [
        {"prompt": f"Is {number % 60} even?", "chosen": f"No, {number}.", "rejected": "Yes."} for number in range(120)
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    table = DataTable(train="./p.jsonl", eval_share=0.25)
    train, held = (load_pairs(table, part, tiny.tokenizer(), 0) for part in ("train", "eval"))
    assert {pair.prompt[0]["content"] for pair in train.pairs}.isdisjoint(
        pair.prompt[0]["content"] for pair in held.pairs
    )
    assert sorted(pair.row for side in (train, held) for pair in side.pairs) == list(range(1, 121))
    assert 15 < len(held.pairs) < 45
    assert (train.audit.other_split, held.audit.other_split) == (len(held.pairs), len(train.pairs))
    assert "  of prompts of the other part" in "\n".join(train.audit.lines())
    # rows that are added later move no prompt to the other side
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*content, {**content[0], "prompt": "New?"})))
    again = load_pairs(table, "eval", tiny.tokenizer(), 0)
    assert [pair for pair in again.pairs if pair.prompt[0]["content"] != "New?"] == held.pairs


def test_a_file_alone_has_a_tenth_of_its_prompts_held_out() -> None:
    assert DataTable(train="./p.jsonl").effective_eval_share == 0.1
    assert DataTable(train="./p.jsonl", eval="./q.jsonl").effective_eval_share is None
    assert DataTable(train="owner/name").effective_eval_share is None
    assert DataTable(train="owner/name", eval_share=0.02).effective_eval_share == 0.02


SOME = (
    "alpaca/instruction-data-with-preference.json",
    "sharegpt/kto_en_demo.json",
    "ultrafeedback/messages-eval.jsonl.gz",
)
"""Strings, labelled answers and lists of messages; all files are slow, and loading them is tested above."""


@needs_shared
@pytest.mark.parametrize("files", [SOME, pytest.param(list(FILES), marks=pytest.mark.slow)])
def test_real_files_train_five_steps_from_a_recipe_of_two_lines(files: Sequence[str], tmp_path: Path) -> None:
    model = tiny_run.source().folder
    commands = []
    for number, file in enumerate(files):
        recipe = tmp_path / f"r{number}.toml"
        recipe.write_text(f'model = {{ name = "{model}" }}\ndata = {{ train = "{SHARED / file}" }}\n')
        quick = ("data.max_train_samples=20", "data.max_eval_samples=4", "train.batch_size=4", "samples.prompts=0")
        sets = [word for change in quick for word in ("--set", change)]
        sets += ["--set", "objective.loss_type=kto"] if "kto" in file else []
        commands.append(["train", str(recipe), "-o", f"adapters/r{number}", "--max-steps", "5", *sets])
    found = commands_in_process.said(commands, tmp_path, commands_in_process.here())
    assert [each.code for each in found] == [0] * len(files), found
    for number, file in enumerate(files):
        shape, *_ = FILES[file]
        told = json.loads((tmp_path / "adapters" / f"r{number}" / "audit.json").read_text())
        assert told["train"]["shape"] == told["eval"]["shape"] == shape.value, file


def test_a_file_without_any_shape_is_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"^p\.jsonl: has no column \"chosen\"; it has text; understood are .*; the row: {\"text\": \"a\"}$",
    ):
        parse_pairs(rows({"text": "a"}))
