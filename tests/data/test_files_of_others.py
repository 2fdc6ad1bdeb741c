"""Files as people have them, and rows of two answers with a verdict: read as meant, or refused in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from qlora_dpo.data.encode import PairSet, load_pairs
from qlora_dpo.data.formats import PreferenceFormat
from qlora_dpo.data.pairs import Pair, parse_pairs
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.errors import DataError
from qlora_dpo.recipe.data import DataTable

CASES = Path(__file__).parents[3] / "shared" / "cases"
FROM_VALUE = "turns of from and value read as messages"
ONE_STRING = "a list of one string read as the string"
ONE_MESSAGE = "one message read as a list of it"
AS_LIST = "a list written as text read as the list"
ASK = {"role": "user", "content": "Is it late?"}
ASKED = (ASK,)
NO, YES = {"role": "assistant", "content": "No."}, {"role": "assistant", "content": "Yes."}


def rows(*content: dict[str, Any]) -> SourceRows:
    return SourceRows("p.jsonl", list(content), lambda number: f"p.jsonl:{number}")


READ_CASES = {
    "alpaca_pos_neg.jsonl": (PreferenceFormat.ALPACA, "output read as the better and the worse answer"),
    "arena.jsonl": (PreferenceFormat.STRINGS, "response_a and response_b read as chosen and rejected by winner"),
    "axolotl_messages_dict.jsonl": (PreferenceFormat.MESSAGES, "messages read as the prompt"),
    "chatml_strings.jsonl": (PreferenceFormat.MESSAGES, "ChatML marks read as turns"),
    "chatml_strings_whole.jsonl": (PreferenceFormat.MESSAGES, "ChatML marks read as turns"),
    "emoji_only.jsonl": (PreferenceFormat.STRINGS, None),
    "empty_system.jsonl": (PreferenceFormat.MESSAGES, "empty system turn left out"),
    "eos_in_answer.jsonl": (PreferenceFormat.STRINGS, "<|im_end|> at the end of an answer left out"),
    "fromvalue_chats.jsonl": (PreferenceFormat.CHATS, FROM_VALUE),
    "helpsteer.jsonl": (
        PreferenceFormat.STRINGS,
        "response_1 and response_2 read as chosen and rejected by preference_strength",
    ),
    "inst_strings.jsonl": (PreferenceFormat.MESSAGES, "Llama 2 and Mistral marks read as turns"),
    "kto.csv": (PreferenceFormat.UNPAIRED, "label written as text or as 0 and 1, read as true or false"),
    "kto_int.jsonl": (PreferenceFormat.UNPAIRED, "label written as text or as 0 and 1, read as true or false"),
    "list_of_one.jsonl": (PreferenceFormat.STRINGS, ONE_STRING),
    "null_prompt.jsonl": (PreferenceFormat.STRINGS, None),
    "prompt_list_chosen_dict.jsonl": (PreferenceFormat.MESSAGES, ONE_MESSAGE),
    "ranked_str_scores.jsonl": (PreferenceFormat.RANKED, "scores written as text read as numbers"),
    "roles_developer.jsonl": (PreferenceFormat.MESSAGES, 'role "developer" read as system'),
    "roles_human_gpt.jsonl": (PreferenceFormat.MESSAGES, 'role "human" read as user'),
    "roles_tool.jsonl": (PreferenceFormat.MESSAGES, None),
    "roles_user_model.jsonl": (PreferenceFormat.MESSAGES, 'role "model" read as assistant'),
    "sharegpt_observation.jsonl": (PreferenceFormat.SHAREGPT, 'role "observation" read as tool'),
    "stringified.jsonl": (PreferenceFormat.CHATS, AS_LIST),
    "stringified_json.csv": (PreferenceFormat.CHATS, AS_LIST),
    "stringified_py.csv": (PreferenceFormat.CHATS, AS_LIST),
    "swift.jsonl": (PreferenceFormat.CHATS, "messages and rejected_response read as two chats"),
    "reasoning_content.jsonl": (
        PreferenceFormat.MESSAGES,
        "reasoning_content written before its answer, as a <think> block",
    ),
    "text_parts.jsonl": (PreferenceFormat.MESSAGES, "content in parts read as text"),
}
REFUSED_CASES = {
    "earlier_differs.jsonl": 'data.answer = "from_difference" compares where they do',
    "images.jsonl": "images: pictures beside the text",
    "images_parts.jsonl": "images: pictures beside the text",
    "multi_turn_answer.jsonl": 'data.answer = "from_difference" compares where they do',
    "sft_only.jsonl": 'has no column "rejected"; it has prompt, chosen',
}


def load_case(name: str, **keys: Any) -> PairSet:
    if not (CASES / name).exists():
        pytest.skip("the small inputs are not beside this checkout")
    return load_pairs(DataTable(train=str(CASES / name), eval="./q.jsonl", **keys), "train", tiny.tokenizer(), 0)


@pytest.mark.parametrize("name", READ_CASES)
def test_a_file_as_people_have_it_is_read(name: str, empty_folder: Path) -> None:
    shape, repair = READ_CASES[name]
    held = load_case(name)
    assert held.audit.format == shape.value
    assert held.audit.rows == 20
    assert {reason: len(numbers) for reason, numbers in held.audit.dropped.items()} == (
        {"prompt is null": 10} if name == "null_prompt.jsonl" else {}
    )
    assert repair is None or len(held.audit.repaired[repair]) == 20
    assert not any(
        mark in text for pair in held.pairs for text in (pair.chosen, pair.rejected) for mark in ("<|", "[{")
    )


@pytest.mark.parametrize("name", REFUSED_CASES)
def test_or_it_is_refused_in_a_sentence(name: str, empty_folder: Path) -> None:
    with pytest.raises(DataError) as refused:
        load_case(name)
    assert REFUSED_CASES[name] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["earlier_differs.jsonl", "multi_turn_answer.jsonl"])
def test_files_whose_chats_part_earlier_are_read_where_the_recipe_says_how(name: str, empty_folder: Path) -> None:
    held = load_case(name, answer="from_difference")
    assert held.audit.repaired == {"turns behind the first difference left out": tuple(range(1, 21))}
    assert held.pairs[0].chosen == "Fold the sheet in half, then lift the corners. 0"


COMPARED: dict[str, tuple[dict[str, Any], str]] = {
    "arena's winner": ({"response_a": "No.", "response_b": "Yes.", "winner": "model_a"}, "winner"),
    "the second one": ({"response_a": "Yes.", "response_b": "No.", "winner": "B"}, "winner"),
    "a column's own name": ({"answer_1": "Yes.", "answer_2": "No.", "preferred": "answer_2"}, "preferred"),
    "a number beside numbered columns": ({"output_1": "Yes.", "output_2": "No.", "preference": 2}, "preference"),
    "numbers from 0": ({"response_0": "Yes.", "response_1": "No.", "better_response_id": 1}, "better_response_id"),
    "HelpSteer's strength": (
        {"response_1": "No.", "response_2": "Yes.", "preference_strength": -2},
        "preference_strength",
    ),
    "HelpSteer's preference as text": (
        {"response1": "Yes.", "response2": "No.", "overall_preference": "1"},
        "overall_preference",
    ),
    "one column a model": (
        {"response_a": "Yes.", "response_b": "No.", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0},
        "winner_model_a",
    ),
}


@pytest.mark.parametrize("case", COMPARED)
def test_of_two_answers_the_better_one_is_chosen(case: str) -> None:
    row, column = COMPARED[case]
    found = parse_pairs(rows({"prompt": "Is it late?"} | row))
    first, second, *_ = row
    repair = f"{first} and {second} read as chosen and rejected by {column}"
    assert found.pairs == [Pair(ASKED, "No.", "Yes.", 1, {}, repairs=(repair,))]


def test_two_whole_chats_of_an_arena_are_compared() -> None:
    row = {"conversation_a": [ASK, NO], "conversation_b": [ASK, YES], "winner": "model_a"}
    found = parse_pairs(rows(row))
    assert (found.format, found.pairs[0].prompt, found.pairs[0].chosen) == (PreferenceFormat.CHATS, ASKED, "No.")


def test_helpsteers_context_is_the_prompt() -> None:
    row = {"context": [ASK], "response1": "No.", "response2": "Yes.", "overall_preference": -1}
    assert [(pair.prompt, pair.chosen) for pair in parse_pairs(rows(row)).pairs] == [(ASKED, "No.")]


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        ("tie", "neither of two answers is the better one"),
        ("tie (bothbad)", "neither of two answers is the better one"),
        ("model_c", 'winner is "model_c", which names neither response_a nor response_b'),
        (1, 'winner is "1", which names neither response_a nor response_b'),
        (None, "winner is null"),
    ],
)
def test_answers_of_which_none_is_better_are_counted(verdict: Any, reason: str) -> None:
    row = {"prompt": "Is it late?", "response_a": "No.", "response_b": "Yes.", "winner": "model_a"}
    assert parse_pairs(rows(row, row | {"winner": verdict})).dropped == {reason: [2]}


def test_two_answers_without_a_word_on_which_is_better_are_refused() -> None:
    with pytest.raises(DataError) as refused:
        parse_pairs(rows({"prompt": "Is it late?", "response_a": "No.", "response_b": "Yes."}))
    assert str(refused.value) == (
        "p.jsonl:1: response_a and response_b are two answers, but no column says which is the better one (winner, "
        "preference, preferred, better, ...); no other row is a usable pair either"
    )
