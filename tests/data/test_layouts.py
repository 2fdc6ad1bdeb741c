"""Rows as people have them become the pairs that are meant, and the audit says how they were read; or a sentence says
why not.
"""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from qlora_dpo.data.encode import load_pairs
from qlora_dpo.data.formats import PreferenceFormat
from qlora_dpo.data.pairs import Pair, parse_pairs
from qlora_dpo.data.rows.messages import parse_list_text
from qlora_dpo.data.rows.reader import ParseOptions
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.errors import DataError
from qlora_dpo.recipe.data import DataTable


def rows(*content: dict[str, Any]) -> SourceRows:
    return SourceRows("p.jsonl", list(content), lambda number: f"p.jsonl:{number}")


def turn(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def said(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


ASK, NO, YES = turn("user", "Is it late?"), turn("assistant", "No."), turn("assistant", "Yes.")
SYSTEM = turn("system", "Be kind.")
ASKED = (ASK,)
LISTS = {"prompt": [ASK], "chosen": [NO], "rejected": [YES]}
STRINGS = {"prompt": "Is it late?", "chosen": "No.", "rejected": "Yes."}
FROM_VALUE = "turns of from and value read as messages"
ONE_STRING = "a list of one string read as the string"
ONE_MESSAGE = "one message read as a list of it"
AS_LIST = "a list written as text read as the list"

READ: dict[str, tuple[dict[str, Any], tuple[dict[str, str], ...], tuple[str, ...]]] = {
    "roles human and gpt": (
        {"prompt": [turn("human", "Is it late?")], "chosen": [turn("gpt", "No.")], "rejected": [turn("gpt", "Yes.")]},
        ASKED,
        ('role "human" read as user', 'role "gpt" read as assistant'),
    ),
    "role model": (LISTS | {"chosen": [turn("model", "No.")]}, ASKED, ('role "model" read as assistant',)),
    "role developer": (
        LISTS | {"prompt": [turn("developer", "Be kind."), ASK]},
        (SYSTEM, ASK),
        ('role "developer" read as system',),
    ),
    "a role with a capital": (
        LISTS | {"prompt": [turn("System", "Be kind."), ASK]},
        (SYSTEM, ASK),
        ('role "System" read as system',),
    ),
    "tool turns": (
        LISTS | {"prompt": [ASK, turn("assistant", "clock()"), turn("tool", "8"), turn("tool", "am")]},
        (ASK, turn("assistant", "clock()"), turn("tool", "8"), turn("tool", "am")),
        (),
    ),
    "a tool turn in the midst": (
        LISTS | {"prompt": [ASK, turn("assistant", "clock()"), turn("function", "8"), NO, ASK]},
        (ASK, turn("assistant", "clock()"), turn("tool", "8"), NO, ASK),
        ('role "function" read as tool',),
    ),
    "ShareGPT with a tool": (
        {
            "conversations": [said("human", "Is it late?"), said("function_call", "{}"), said("observation", "8")],
            "chosen": said("gpt", "No."),
            "rejected": said("gpt", "Yes."),
        },
        (ASK, turn("assistant", "{}"), turn("tool", "8")),
        ('role "function_call" read as assistant', 'role "observation" read as tool'),
    ),
    "whole chats of from and value": (
        {
            "chosen": [said("human", "Is it late?"), said("gpt", "No.")],
            "rejected": [said("human", "Is it late?"), said("gpt", "Yes.")],
        },
        ASKED,
        (FROM_VALUE,),
    ),
    "conversations beside strings": (
        {"conversations": [said("human", "Is it late?")], "chosen": "No.", "rejected": "Yes."},
        ASKED,
        ("conversations read as the prompt", FROM_VALUE, "a string read as the assistant's turn"),
    ),
    "one message for a list": (LISTS | {"chosen": NO, "rejected": YES}, ASKED, (ONE_MESSAGE,)),
    "one message for the prompt": (LISTS | {"prompt": ASK}, ASKED, (ONE_MESSAGE,)),
    "strings for answers": (
        LISTS | {"chosen": "No.", "rejected": "Yes."},
        ASKED,
        ("a string read as the assistant's turn",),
    ),
    "a string for the prompt": (LISTS | {"prompt": "Is it late?"}, ASKED, ("a string read as the user's turn",)),
    "lists of one string": (STRINGS | {"chosen": ["No."], "rejected": ["Yes."]}, ASKED, (ONE_STRING,)),
    "a prompt in a list": (STRINGS | {"prompt": ["Is it late?"]}, ASKED, (ONE_STRING,)),
    "a prompt of several strings": (
        STRINGS | {"prompt": ["Hi.", "Hello.", "Is it late?"]},
        (turn("user", "Hi."), turn("assistant", "Hello."), ASK),
        ("prompt: a list of strings read as turns, the user's first", "a string read as the assistant's turn"),
    ),
    "text parts": (
        LISTS | {"prompt": [turn("user", [{"type": "text", "text": "Is it "}, {"type": "text", "text": "late?"}])]},
        ASKED,
        ("content in parts read as text",),
    ),
    "an empty system column": (STRINGS | {"system": " "}, ASKED, ()),
    "JSON in JSON in strings": (
        {"chosen": json.dumps(json.dumps([ASK, NO])), "rejected": json.dumps(json.dumps([ASK, YES]))},
        ASKED,
        (AS_LIST,),
    ),
    "an empty system turn": (
        LISTS | {"prompt": [turn("system", " "), ASK]},
        ASKED,
        ("empty system turn left out",),
    ),
    "names with capitals and spaces": (
        {"Prompt": "Is it late?", " chosen": "No.", "REJECTED ": "Yes."},
        ASKED,
        ('column "Prompt" read as prompt', 'column " chosen" read as chosen', 'column "REJECTED " read as rejected'),
    ),
    "JSON in strings": (
        STRINGS | {"chosen": json.dumps([ASK, NO]), "rejected": json.dumps([ASK, YES])},
        ASKED,
        (AS_LIST,),
    ),
    "Python in strings": ({name: repr(value) for name, value in LISTS.items()}, ASKED, (AS_LIST,)),
    "NumPy's print in strings": (
        {"chosen": f"[{ASK!r}\n {NO!r}]", "rejected": f"array([{ASK!r}, {YES!r}], dtype=object)"},
        ASKED,
        (AS_LIST,),
    ),
    "ranked answers in strings": (
        {"prompt": "Is it late?", "responses": '["Yes.", "No."]', "scores": "[1, 2]"},
        ASKED,
        (AS_LIST,),
    ),
    "scores as strings": (
        {"prompt": "Is it late?", "responses": ["Yes.", "No."], "scores": ["3", "8.5"]},
        ASKED,
        ("scores written as text read as numbers",),
    ),
    "ms-swift's rejected_response": (
        {"messages": [SYSTEM, ASK, NO], "rejected_response": "Yes."},
        (SYSTEM, ASK),
        ("messages and rejected_response read as two chats",),
    ),
    "ms-swift's rejected_messages": (
        {"messages": [ASK, NO], "rejected_messages": [ASK, YES]},
        ASKED,
        ("messages and rejected_messages read as two chats",),
    ),
    "ms-swift's query and response": (
        {"query": "Is it late?", "response": "No.", "rejected_response": "Yes.", "history": [["Hi.", "Hello."]]},
        (turn("user", "Hi."), turn("assistant", "Hello."), ASK),
        ("query, response and rejected_response read as instruction, chosen and rejected",),
    ),
    "LLaMA-Factory's two outputs": (
        {"instruction": "Is it", "input": "late?", "output": ["No.", "Yes."]},
        (turn("user", "Is it\nlate?"),),
        ("output read as the better and the worse answer",),
    ),
    "axolotl's objects": (
        {"messages": [ASK], "chosen": NO, "rejected": YES},
        ASKED,
        ("messages read as the prompt", ONE_MESSAGE),
    ),
    "answers that go on alike": (
        {"prompt": [ASK], "chosen": [YES, ASK, NO], "rejected": [YES, ASK, YES]},
        (ASK, YES, ASK),
        (),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_row_is_read_as_it_is_meant_and_what_was_done_is_said(case: str) -> None:
    row, prompt, repairs = READ[case]
    found = parse_pairs(rows(row, row))
    assert found.dropped == {}
    assert found.pairs == [Pair(prompt, "No.", "Yes.", number, {}, repairs=repairs) for number in (1, 2)]


CALLS = {"tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": "{}"}}]}
NO_PAIR: dict[str, tuple[dict[str, Any], str]] = {
    "thoughts of a user": (
        LISTS | {"prompt": [turn("user", "Is it late?", reasoning="Hm.")]},
        "a message of prompt has reasoning, and is not the assistant's; write it into its content, or leave it out",
    ),
    "thoughts that are no text": (
        LISTS | {"rejected": [turn("assistant", "Yes.", thinking=["It is 8."])]},
        "a message of rejected has a list as its thinking, not a string",
    ),
    "tool calls": (
        LISTS | {"prompt": [ASK, turn("assistant", None, **CALLS), turn("tool", "8")]},
        "a message of prompt has tool_calls, which are not passed on; write the calls into its content",
    ),
    "a picture beside the text": (
        LISTS | {"image": "cat.png"},
        "image: a picture beside the text, which no text model is shown; leave the row out, or the column if the text "
        "says all",
    ),
    "pictures, videos and sound": (
        LISTS | {"audios": ["a.wav"]},
        "audios: sound beside the text, which no text model is shown; leave the row out, or the column if the text "
        "says all",
    ),
    "a column of thoughts": (
        LISTS | {"reasoning_content": "It is 8."},
        "reasoning_content: is not trained on; write it into the answers, or leave the column out",
    ),
    "a picture among the parts": (
        LISTS | {"prompt": [turn("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}])]},
        'a message of prompt holds a part of the type "image", which is no text',
    ),
    "a tool turn before the assistant": (LISTS | {"prompt": [ASK, turn("tool", "8")]}, "roles do not alternate"),
    "chats that part earlier": (
        {"prompt": [ASK], "chosen": [NO, ASK, NO], "rejected": [YES, ASK, YES]},
        'chats part before their last answers; data.answer = "from_difference" compares where they do',
    ),
    "answers with tools in them": (
        LISTS | {"chosen": [turn("assistant", "clock()"), turn("tool", "8"), NO]},
        "answer holds more than one turn",
    ),
}


@pytest.mark.parametrize("case", NO_PAIR)
def test_what_matters_and_cannot_be_trained_on_is_a_verdict_of_the_row(case: str) -> None:
    row, reason = NO_PAIR[case]
    assert parse_pairs(rows(LISTS, row)).dropped == {reason: [2]}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_beside_an_answer_are_written_into_it_as_templates_do(key: str) -> None:
    answers = {"chosen": [turn("assistant", "No.", **{key: "It is 8.\n"})], "rejected": [turn("assistant", "Yes.")]}
    (pair,) = parse_pairs(rows(LISTS | answers)).pairs
    assert (pair.chosen, pair.rejected) == ("<think>\nIt is 8.\n</think>\n\nNo.", "Yes.")
    assert pair.repairs == (f"{key} written before its answer, as a <think> block",)


@pytest.mark.parametrize("empty", [None, "", [], [None], [{"name": None}], {"url": None}, float("nan")])
def test_columns_and_keys_without_content_matter_to_nobody(empty: Any) -> None:
    answer = turn("assistant", "No.", tool_calls=empty, reasoning_content=empty)
    found = parse_pairs(rows(LISTS | {"images": empty, "chosen": [answer]}))
    assert found.pairs == [Pair(ASKED, "No.", "Yes.", 1, {})]


def test_a_source_of_pictures_is_refused_in_a_sentence() -> None:
    with pytest.raises(DataError) as refused:
        parse_pairs(rows(STRINGS | {"prompt": "<image>What is it?", "images": ["cat.png"]}))
    assert str(refused.value) == (
        "p.jsonl:1: images: pictures beside the text, which no text model is shown; leave the row out, or the column "
        "if the text says all; no other row is a usable pair either"
    )
    assert parse_pairs(rows(STRINGS | {"prompt": "What does <image> mean?"})).dropped == {}


@pytest.mark.parametrize("label", [True, 1, 1.0, "1", "True", " true", "desirable", "good"])
def test_a_label_may_be_a_number_or_a_word(label: Any) -> None:
    opposite = {bool: False, int: 0, float: 0.0}.get(type(label), "FALSE")
    found = parse_pairs(
        rows(
            {"prompt": "Is it late?", "completion": "No.", "label": label},
            {"prompt": "Is it late?", "completion": "Yes.", "label": opposite},
            {"prompt": "Is it late?", "completion": "Maybe.", "label": "unknown"},
        )
    )
    said = () if label is True else ("label written as text or as 0 and 1, read as true or false",)
    assert found.format is PreferenceFormat.UNPAIRED
    assert [(pair.label, pair.repairs) for pair in found.pairs] == [(True, said), (False, said)]
    assert found.dropped == {"label is a string, not true or false": [3]}


def test_labelled_answers_in_csv_are_read(empty_folder: Path) -> None:
    with Path("p.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("prompt", "completion", "label"), ("Is it?", "No.", "True"), ("Is it?", "Yes.", "False")]
        )
    held = load_pairs(DataTable(train="./p.csv", eval="./q.csv"), "train", tiny.tokenizer(), 0)
    assert [pair.label for pair in held.pairs] == [True, False]
    assert held.audit.repaired == {"label written as text or as 0 and 1, read as true or false": (1, 2)}


@pytest.mark.parametrize("nothing", [float("nan"), None, ""])
def test_an_answer_without_a_score_is_left_out_and_the_others_are_compared(nothing: Any) -> None:
    row = {"prompt": "Is it late?", "responses": ["A.", "B.", "C."], "scores": [1.0, nothing, 2.0]}
    found = parse_pairs(rows(row, {**row, "scores": [nothing, nothing, 2.0]}))
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("C.", "A.")]
    assert "an answer without a score left out" in found.pairs[0].repairs
    assert found.dropped == {"fewer than two responses have a score that is a number": [2]}


def test_text_that_is_a_list_in_a_few_rows_alone_is_text() -> None:
    listed = STRINGS | {"prompt": "Write a chat in JSON.", "chosen": json.dumps([ASK, NO])}
    found = parse_pairs(rows(STRINGS, listed, STRINGS | {"prompt": "Why?"}))
    assert [pair.chosen for pair in found.pairs] == ["No.", json.dumps([ASK, NO]), "No."]
    assert found.pairs[1].repairs == ()


def test_text_that_should_be_a_list_and_is_none_drops_the_row() -> None:
    row = {"chosen": json.dumps([ASK, NO]), "rejected": json.dumps([ASK, YES])}
    assert parse_pairs(rows(row, row, row | {"chosen": row["chosen"][:-9]})).dropped == {
        "chosen is text that cannot be read as a list, unlike most rows'": [3]
    }


def test_strings_stay_as_they_are_where_the_recipe_says_so() -> None:
    row = {"prompt": "[1, 2]", "chosen": json.dumps([ASK, NO]), "rejected": "No.<|im_end|>"}
    (pair,) = parse_pairs(rows(row), options=ParseOptions(format="strings")).pairs
    assert pair == Pair((turn("user", "[1, 2]"),), row["chosen"], row["rejected"], 1, {})


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "[" * 50_000 + "]" * 50_000, "[\\d]", "[1", "{'a': b}", "['\0']", "[]x"]
)
def test_text_that_no_parser_reads_is_no_list(text: str) -> None:
    assert parse_list_text(text) is None


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (
            {"question": "a", "chosen": "b", "rejected": "c"},
            'set data.columns = { prompt = "question" } if "question" is meant',
        ),
        (
            {"instruction": "a", "chosen_response": "b", "rejected_response": "c"},
            'set data.columns = { prompt = "instruction", chosen = "chosen_response", rejected = "rejected_response" } '
            'if "instruction" and "chosen_response" and "rejected_response" are meant',
        ),
        (
            {"question": "a", "good": "b", "bad": "c"},
            'set data.columns = { prompt = "question", chosen = "good", rejected = "bad" } if "question" and "good" '
            'and "bad" are meant',
        ),
    ],
)
def test_rows_of_other_columns_are_shown_with_the_line_that_might_help(row: dict[str, str], advice: str) -> None:
    with pytest.raises(DataError) as refused:
        parse_pairs(rows(row))
    assert str(refused.value).endswith(f"; {advice}; the row: {json.dumps(row)}")


PARTED: dict[str, tuple[PreferenceFormat, dict[str, Any]]] = {
    "message lists": (
        PreferenceFormat.MESSAGES,
        {"prompt": [ASK], "chosen": [NO, ASK, NO], "rejected": [YES, ASK, NO]},
    ),
    "answers of other lengths": (
        PreferenceFormat.MESSAGES,
        {"prompt": [ASK], "chosen": [NO, turn("tool", "8"), NO], "rejected": [YES]},
    ),
    "whole chats": (PreferenceFormat.CHATS, {"chosen": [ASK, NO, ASK, NO], "rejected": [ASK, YES]}),
    "HH dialogues": (
        PreferenceFormat.HH,
        {
            "chosen": "\n\nHuman: Is it late?\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: So.",
            "rejected": "\n\nHuman: Is it late?\n\nAssistant: Yes.\n\nHuman: Oh?\n\nAssistant: So.",
        },
    ),
}


@pytest.mark.parametrize("case", PARTED)
def test_from_difference_compares_the_first_answers_that_differ(case: str) -> None:
    shape, row = PARTED[case]
    found = parse_pairs(rows(row), options=ParseOptions(answer="from_difference"))
    assert found.format is shape
    assert found.pairs == [Pair(ASKED, "No.", "Yes.", 1, {}, repairs=("turns behind the first difference left out",))]
    assert parse_pairs(rows(row)).pairs == []


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([ASK, NO], [turn("user", "Is it early?"), NO], "last turn is not the assistant's"),
        ([ASK, NO, ASK, NO], [ASK, NO], "equal answers"),
        ([ASK, NO, ASK, NO], [ASK, NO, turn("user", "Why?"), NO], "last turn is not the assistant's"),
    ],
)
def test_chats_that_part_in_no_answer_have_a_reason(chosen: Any, rejected: Any, reason: str) -> None:
    row = {"chosen": chosen, "rejected": rejected}
    assert parse_pairs(rows(row), options=ParseOptions(answer="from_difference")).dropped == {reason: [1]}


def test_from_difference_changes_nothing_for_chats_that_part_at_the_end() -> None:
    row = {"chosen": [ASK, YES, ASK, NO], "rejected": [ASK, YES, ASK, YES]}
    last, first = (parse_pairs(rows(row), options=ParseOptions(answer=each)) for each in ("last", "from_difference"))
    assert last.pairs == first.pairs == [Pair((ASK, YES, ASK), "No.", "Yes.", 1, {})]


def write(*content: dict[str, Any]) -> None:
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


TOOLS = LISTS | {"prompt": [ASK, turn("assistant", "clock()"), turn("tool", "It is 8.")]}


def test_the_template_writes_a_tool_turn_or_the_row_is_dropped(empty_folder: Path) -> None:
    write(LISTS, TOOLS)
    deaf = (
        "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    )
    deaf += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for template, dropped in (
        (tiny.CHATML, {}),
        (deaf, {"the chat template leaves out tool turns": (2,)}),
        ("{% if messages[2:] %}{{ raise_exception('No tools.') }}{% endif %}" + tiny.CHATML, None),
    ):
        words = tiny.tokenizer(template)
        held = load_pairs(DataTable(train="./p.jsonl", eval="./q.jsonl"), "train", words, 0)
        assert dropped is None or held.audit.dropped == dropped
        assert ("It is 8." in words.decode(held.encoded[-1].prompt)) == (dropped == {})


def test_a_prompt_with_tools_is_cut_at_a_question(empty_folder: Path) -> None:
    long = [*TOOLS["prompt"], turn("assistant", "No. " * 30), turn("user", "Why is that? " * 9)]
    write(LISTS | {"prompt": long})
    table = DataTable(train="./p.jsonl", eval="./q.jsonl", max_length=60, overlong="cut_prompt")
    (pair,) = load_pairs(table, "train", tiny.tokenizer(), 0).pairs
    assert [each["role"] for each in pair.prompt] == ["user"]
    assert "Why is that? Why is that? ".endswith(pair.prompt[0]["content"][-20:])


def test_answers_that_differ_in_thoughts_alone_are_told_from_equal_ones(empty_folder: Path) -> None:
    row = {"prompt": "Is it late?", "chosen": "<think>It is 8.</think>No.", "rejected": "<think>Hm.</think>No."}
    write(row, STRINGS)
    thoughtless = tiny.CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    audit = load_pairs(DataTable(train="./p.jsonl", eval="./q.jsonl"), "train", tiny.tokenizer(thoughtless), 0).audit
    assert audit.dropped == {"answers that differ only in what the chat template leaves out, such as thoughts": (1,)}


def test_a_first_row_of_another_shape_is_what_a_part_without_pairs_is_put_down_to(empty_folder: Path) -> None:
    write(STRINGS, *[LISTS] * 19)
    table = DataTable(train="./p.jsonl")
    part = "eval" if load_pairs(table, "train", tiny.tokenizer(), 0).audit.used else "train"
    with pytest.raises(DataError) as refused:
        load_pairs(table, part, tiny.tokenizer(), 0)
    assert str(refused.value) == (
        "p.jsonl: 19 of its 20 rows are no usable pairs, and no other is a held-out pair; most often: prompt is a "
        "list, not a string (19, first p.jsonl:2); they are read as strings (prompt, chosen and rejected), the format "
        "of the first row that has one; data.format names another"
    )


def test_labels_that_are_no_labels_are_what_a_file_is_refused_for() -> None:
    with pytest.raises(DataError) as refused:
        parse_pairs(rows({"prompt": "Is it late?", "completion": "No.", "label": "yes"}))
    assert str(refused.value) == (
        "p.jsonl:1: label is a string, not true or false; write true or 1 for a good answer and false or 0 for a bad "
        'one; the row: {"prompt": "Is it late?", "completion": "No.", "label": "yes"}'
    )
