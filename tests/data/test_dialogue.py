"""HH text becomes turns at its markers, and text for a terminal steers none."""

import gzip
import json
import re
from pathlib import Path

import pytest

from qlora_dpo.data.dialogue import InvalidRow, check_roles, parse_hh, sanitize_text, split_chats, split_hh

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real preference data is not beside this checkout")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_hh_text_is_split_at_its_markers() -> None:
    text = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHow are you?\n\nHuman: Fine."
    assert parse_hh(text) == [user("Hi."), assistant("Hello.\n\nHow are you?"), user("Fine.")]


def test_exactly_one_space_belongs_to_a_marker() -> None:
    assert parse_hh("\n\nHuman:  two\n\nAssistant:none \n") == [user(" two"), assistant("none \n")]


def test_the_first_blank_line_may_be_missing() -> None:
    assert parse_hh("Human: Hi.\n\nAssistant: Hello.") == [user("Hi."), assistant("Hello.")]


def test_a_marker_inside_a_line_is_text() -> None:
    assert parse_hh("\n\nHuman: Write\nAssistant: or Human: there.") == [user("Write\nAssistant: or Human: there.")]


NEW_LETTERS = "\U0001fae8\U0001fadf \u0378\ue000 \U000e0002\u2065"
"""Emoji of a later Unicode version than Python's tables, and code points that no version has given a meaning."""


@pytest.mark.parametrize("text", ["", "Hello", "\n\nAssistant: Hello.", " \n\nHuman: Hi."])
def test_text_that_begins_otherwise_has_no_turns(text: str) -> None:
    with pytest.raises(InvalidRow, match=r"^no Human turn at the start$"):
        parse_hh(text)


def test_replies_that_begin_alike_are_split_before_their_first_character() -> None:
    start = "\n\nHuman: Hi.\n\nAssistant:"
    split = split_hh(start + " I think so.", start + " I think not.")
    assert split == ((user("Hi."),), "I think so.", "I think not.")


def test_replies_with_paragraphs_stay_whole() -> None:
    start = "\n\nHuman: Hi.\n\nAssistant: A.\n\nHuman: B.\n\nAssistant:"
    split = split_hh(start + " C.\n\nD.", start + " C.\n\nE.")
    assert split == ((user("Hi."), assistant("A."), user("B.")), "C.\n\nD.", "C.\n\nE.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("a"), assistant("b")], [user("c"), assistant("b")], "prompts differ"),
        ([user("a"), assistant("b")], [user("a")], "last turn is not the assistant's"),
        ([], [user("a"), assistant("b")], "last turn is not the assistant's"),
        ([user("a"), assistant("b")], [user("a"), user("a"), assistant("b")], "roles do not alternate"),
        ([assistant("b")], [assistant("c")], "no user turn before the answer"),
    ],
)
def test_chats_that_cannot_be_split_have_a_reason(
    chosen: list[dict[str, str]], rejected: list[dict[str, str]], reason: str
) -> None:
    with pytest.raises(InvalidRow) as unusable:
        split_chats(chosen, rejected)
    assert str(unusable.value) == reason


def test_a_prompt_is_an_optional_system_turn_then_user_and_assistant_in_turn() -> None:
    system = {"role": "system", "content": "Be kind."}
    check_roles([user("a")])
    check_roles([system, user("a"), assistant("b"), user("c")])
    for wrong in ([user("a"), assistant("b")], [user("a"), system, user("b")], [system, system, user("a")]):
        with pytest.raises(InvalidRow, match=r"^roles do not alternate$"):
            check_roles(wrong)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext, Café, 世界 🦜", "plain\n\ttext, Café, 世界 🦜"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1H\x1b[?25lgone", "gone"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://bad.example\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;cm0gLXJm\x07clipboard", "clipboard"),
        ("\x1bPdevice\x1b\\after", "after"),
        ("\x1b_private\x1b\\after", "after"),
        ("\x1b(0line\x1b7\x1bc", "line"),
        ("\x9b31mred\x9d0;title\x9c.", "red."),
        ("\x1b]0;never closed\nnext", "0;never closed\nnext"),
        ("\x1b", ""),
        ("bell\x07 back\x08 return\r nul\x00 del\x7f", "bell back return nul del"),
        ("abc\u202edcba\u202c \u2066x\u2069 \u200f\u061c", "abcdcba x "),
        ("half \ud83d", "half \ufffd"),
        ("pass\u200bword\u200d\u2060\ufeff \u00adx\U000e0041", "password x"),
        (NEW_LETTERS, NEW_LETTERS),
        ("one\u2028line\u2029", "oneline"),
        ("\x1b\u200b[31mred", "[31mred"),
        ("\x1b\x1b[31m[31mtwice", "[31mtwice"),
    ],
)
def test_printable_text_steers_no_terminal(text: str, shown: str) -> None:
    assert sanitize_text(text) == shown


def test_printable_leaves_nothing_for_a_second_pass() -> None:
    tricky = "\x1b[\x1b[31m31m\x9b\x1b]0;\x1b]0;x\x07\x07\u202e\x00\x1b"
    assert sanitize_text(sanitize_text(tricky)) == sanitize_text(tricky)
    assert not set(sanitize_text(tricky)) & {"\x1b", "\x9b", "\x07", "\u202e"}


@needs_shared
def test_real_hh_dialogues_are_rebuilt_from_prompt_and_answers() -> None:
    names = {"user": "Human", "assistant": "Assistant"}
    split = 0
    with gzip.open(SHARED / "hh/helpful-base/test.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            try:
                prompt, chosen, rejected = split_hh(row["chosen"], row["rejected"])
            except InvalidRow:
                continue
            text = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in prompt) + "\n\nAssistant: "
            if re.search(r"\n\n(Human|Assistant):(?! )", row["chosen"] + row["rejected"]):
                continue  # a marker without its space: an empty turn, which cannot be told from one with a space
            assert (text + chosen, text + rejected) == (row["chosen"], row["rejected"])
            split += 1
    assert split > 2_300
