"""Each shape of preference data is recognised and read exactly, and each unusable row is counted with its reason."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.data.lint import find_problems
from qlora_dpo.data.pairs import Pair, PreferenceFormat, parse_pairs
from qlora_dpo.data.sources import SourceRows, concatenate_rows, read_sources
from qlora_dpo.recipe.data import DataTable

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real preference data is not beside this checkout")

SYSTEM = {"role": "system", "content": "Be kind."}
ASK = {"role": "user", "content": "Is it late?"}
NO = {"role": "assistant", "content": "No."}
YES = {"role": "assistant", "content": "Yes."}


def rows(*found: dict[str, Any]) -> SourceRows:
    return SourceRows("rows", list(found), lambda row: f"row {row}")


def real(name: str) -> SourceRows:
    return concatenate_rows(read_sources(DataTable(train=str(SHARED / name), eval="./other.jsonl"), "train"))


HH = {"chosen": "\n\nHuman: Is it late?\n\nAssistant: No.", "rejected": "\n\nHuman: Is it late?\n\nAssistant: Yes."}

SHAPES: list[tuple[PreferenceFormat, dict[str, Any], tuple[dict[str, str], ...]]] = [
    (PreferenceFormat.HH, HH, (ASK,)),
    (PreferenceFormat.HH, HH | {"prompt": None}, (ASK,)),
    (PreferenceFormat.STRINGS, {"prompt": "Is it late?", "chosen": "No.", "rejected": "Yes."}, (ASK,)),
    (
        PreferenceFormat.HH_PROMPT,
        {
            "prompt": "\n\nHuman: Is it late?\n\nAssistant: Yes.\n\nHuman: Is it late?\n\nAssistant:",
            "response": " No.",
            "chosen": " No.",
            "rejected": " Yes.",
        },
        (ASK, YES, ASK),
    ),
    (
        PreferenceFormat.HH_PROMPT,
        {"prompt": "Human: Is it late?\n\nAssistant: ", "chosen": "No.", "rejected": "Yes."},
        (ASK,),
    ),
    (PreferenceFormat.MESSAGES, {"prompt": [SYSTEM, ASK], "chosen": [NO], "rejected": [YES]}, (SYSTEM, ASK)),
    (PreferenceFormat.CHATS, {"prompt": "Is it late?", "chosen": [ASK, NO], "rejected": [ASK, YES]}, (ASK,)),
    (
        PreferenceFormat.CHATS,
        {"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, NO], "rejected": [SYSTEM, ASK, YES]},
        (SYSTEM, ASK),
    ),
    (PreferenceFormat.CHATS, {"chosen": [ASK, YES, ASK, NO], "rejected": [ASK, YES, ASK, YES]}, (ASK, YES, ASK)),
]


@pytest.mark.parametrize(("shape", "row", "prompt"), SHAPES)
def test_every_shape_gives_the_same_pair(
    shape: PreferenceFormat, row: dict[str, Any], prompt: tuple[dict[str, str], ...]
) -> None:
    found = parse_pairs(rows(row))
    assert found.format == shape
    assert found.dropped == {}
    assert found.pairs == [Pair(prompt, "No.", "Yes.", 1, {})]


def test_the_first_row_with_answers_decides_the_shape() -> None:
    found = parse_pairs(rows({"chosen": None, "rejected": None}, HH))
    assert (found.format, [pair.row for pair in found.pairs]) == (PreferenceFormat.HH, [2])
    assert found.dropped == {"chosen is null": [1]}


def test_a_defect_in_the_first_hh_row_does_not_hide_the_shape() -> None:
    found = parse_pairs(rows(HH | {"chosen": "No."}, HH))
    assert (found.format, [pair.row for pair in found.pairs]) == (PreferenceFormat.HH, [2])
    assert found.dropped == {"no Human turn at the start": [1]}


def test_a_marked_prompt_among_plain_ones_is_not_taken_as_plain_text() -> None:
    plain = {"prompt": "Is it late?", "chosen": "No.", "rejected": "Yes."}
    found = parse_pairs(rows(plain, plain | {"prompt": "\n\nHuman: Is it late?\n\nAssistant:"}))
    assert found.dropped == {"prompt is marked as HH text, unlike the first row's": [2]}


def test_columns_to_keep_stay_with_the_pair_as_text() -> None:
    plain = {"prompt": "Is it late?", "chosen": "No.", "rejected": "Yes.", "kind": 7, "note": None}
    found = parse_pairs(rows(plain), extra_columns={"kind": "a", "note": "b"})
    assert found.pairs[0].extra == {"kind": "7", "note": ""}


def test_white_space_of_plain_strings_is_kept() -> None:
    found = parse_pairs(rows({"prompt": " Is it?\n", "chosen": " No. ", "rejected": "\tYes."}))
    assert found.pairs == [Pair(({"role": "user", "content": " Is it?\n"},), " No. ", "\tYes.", 1, {})]


def defect(row: dict[str, str]) -> str | None:
    """What is wrong with a whole HH dialogue pair, found by string search alone."""
    cut = [row[side].rfind("\n\nAssistant:") for side in ("chosen", "rejected")]
    if any(row[side].rfind("\n\nHuman:") > at for side, at in zip(("chosen", "rejected"), cut, strict=True)):
        return "last turn is not the assistant's"
    for side, at in zip(("chosen", "rejected"), cut, strict=True):
        markers = "".join("HA"[part.startswith("Assistant:")] for part in row[side][:at].split("\n\n") if starts(part))
        if markers != "HA" * (len(markers) // 2) + "H":
            return "roles do not alternate"
    if row["chosen"][: cut[0]] != row["rejected"][: cut[1]]:
        return "prompts differ"
    turns = row["chosen"][: cut[0]].replace("\n\nAssistant:", "\n\nHuman:").split("\n\nHuman:")[1:]
    if not all(map(str.strip, turns)):
        return "empty turn in the prompt"
    answers = [row[side][at + len("\n\nAssistant:") :].strip() for side, at in zip(row, cut, strict=True)]
    if not all(answers):
        return "empty answer"
    return "equal answers" if answers[0] == answers[1] else None


def starts(part: str) -> bool:
    return part.startswith(("Human:", "Assistant:"))


@needs_shared
@pytest.mark.parametrize("name", ["hh/helpful-base/test.jsonl.gz", "hh/helpful-online/test.jsonl.gz"])
def test_defects_of_real_hh_rows_are_those_that_string_search_finds(name: str) -> None:
    found = parse_pairs(real(name))
    with gzip.open(SHARED / name, "rt", encoding="utf-8") as file:
        expected = [defect(json.loads(line)) for line in file]
    assert [pair.row for pair in found.pairs] == [row for row, reason in enumerate(expected, 1) if reason is None]
    named = {row: reason for reason, numbers in found.dropped.items() for row in numbers}
    assert named == {row: reason for row, reason in enumerate(expected, 1) if reason}
    assert len(Counter(named.values())) >= 3


@needs_shared
def test_marked_prompts_give_the_pairs_of_the_whole_dialogues_they_were_made_from() -> None:
    whole = {
        (pair.chosen, pair.rejected, json.dumps(pair.prompt))
        for name in ("hh/helpful-base/test.jsonl.gz", "hh/helpful-online/test.jsonl.gz")
        for pair in parse_pairs(real(name)).pairs
    }
    marked = parse_pairs(real("hh/full-hh-style.jsonl.gz"))
    assert marked.format == PreferenceFormat.HH_PROMPT
    assert {(pair.chosen, pair.rejected, json.dumps(pair.prompt)) for pair in marked.pairs} == whole


@needs_shared
def test_real_ultrafeedback_chats_are_split_before_the_last_turn() -> None:
    source = real("ultrafeedback/messages-train.jsonl.gz")
    found = parse_pairs(source)
    assert found.format == PreferenceFormat.CHATS
    for pair in found.pairs:
        row = source.rows[pair.row - 1]
        assert pair.prompt[-1]["content"] == row["prompt"]
        assert (pair.chosen, pair.rejected) == (row["chosen"][-1]["content"], row["rejected"][-1]["content"])
    assert set(found.dropped) == {"equal answers", "empty answer"}


@needs_shared
def test_every_real_oasst_pair_is_usable() -> None:
    found = parse_pairs(real("oasst/messages-pairs.jsonl.gz"))
    assert (found.format, len(found.pairs), found.dropped) == (PreferenceFormat.MESSAGES, 754, {})
    assert any(len(pair.prompt) > 1 for pair in found.pairs)


@pytest.mark.parametrize("text", ["\U0001fae8", "\U0001fadf\U0001fae9", "\u0378", "\ue000", "\U0001fbfa"])
def test_a_code_point_that_python_does_not_know_yet_is_text(text: str) -> None:
    parsed = parse_pairs(rows({"prompt": text, "chosen": text, "rejected": f"{text}!"}))
    assert [(pair.prompt[0]["content"], pair.chosen) for pair in parsed.pairs] == [(text, text)]
    assert parsed.dropped == {}


@pytest.mark.parametrize("text", ["\u200b\u2060\ufeff", "\u061c\u202e", "\x01\x7f\x9f", " \u2028\u3000", "\U000e0041"])
def test_control_format_and_bidi_characters_alone_are_no_text(text: str) -> None:
    parsed = parse_pairs(rows({"prompt": "Hi", "chosen": text, "rejected": "no"}))
    assert parsed.dropped == {"empty answer": [1]}


def test_answers_of_different_emoji_are_not_alike() -> None:
    emoji = ["\U0001f600", "\U0001f602", "\U0001fae8", "\U0001fae9"]
    found = rows(*({"prompt": "Which one?", "chosen": each, "rejected": "None."} for each in emoji))
    assert find_problems(parse_pairs(found)) == []
