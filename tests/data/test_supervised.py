"""Questions and answers for supervised tuning: which rows are read, which answers are trained on, what is held out."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from qlora_dpo.data.encode import load_pairs
from qlora_dpo.data.encoded import have_rejected
from qlora_dpo.data.formats import PreferenceFormat
from qlora_dpo.data.pairs import ParsedRows, first_question, parse_pairs
from qlora_dpo.data.rows.reader import ParseOptions
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.errors import DataError
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.recipe.data import DataTable

ASK, ANSWER = "Is the library open on Sunday?", "No, it opens again on Monday at nine."
AGAIN, SECOND = "And on Saturday?", "Until noon."


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [turn("user", ASK), turn("assistant", ANSWER), turn("user", AGAIN), turn("assistant", SECOND)]
ONE = ((turn("user", ASK),), ANSWER)
BOTH = [ONE, (tuple(CHAT[:3]), SECOND)]
SHAREGPT = [
    {"from": name, "value": text} for name, text in zip(("human", "gpt") * 2, (ASK, ANSWER, AGAIN, SECOND), strict=True)
]


def parsed(*content: dict[str, Any], supervised: bool = True, **options: Any) -> ParsedRows:
    rows = SourceRows("p.jsonl", list(content), lambda number: f"p.jsonl:{number}")
    return parse_pairs(rows, options=ParseOptions(supervised=supervised, **options))


def read(*content: dict[str, Any], **options: Any) -> list[tuple[tuple[dict[str, str], ...], str]]:
    found = parsed(*content, **options)
    assert found.format is PreferenceFormat.SUPERVISED
    assert {pair.rejected for pair in found.pairs} == {""}
    return [(pair.prompt, pair.chosen) for pair in found.pairs]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "completion": ANSWER},
        {"prompt": ASK, "response": ANSWER, "source": "web"},
        {"question": ASK, "answer": ANSWER},
        {"query": ASK, "response": ANSWER},
        {"instruction": ASK, "output": ANSWER},
        {"instruction": ASK, "input": "", "output": ANSWER, "text": "### Instruction:\n..."},
        {"input": ASK, "output": ANSWER},
        {"Question": ASK, "Answer": ANSWER},
        {"prompt": ASK, "chosen": ANSWER},
        {"prompt": [turn("user", ASK)], "completion": [turn("assistant", ANSWER)]},
        {"prompt": ASK, "completion": turn("assistant", ANSWER)},
        {"messages": CHAT[:2]},
        {"messages": json.dumps(CHAT[:2])},
        {"conversations": SHAREGPT[:2]},
        {"conversation": CHAT[:2]},
        {"prompt": f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n", "completion": f"{ANSWER}<|im_end|>"},
    ],
)  # fmt: skip
def test_a_question_and_its_answer_are_read_by_whatever_names(row: dict[str, Any]) -> None:
    assert read(row, row) == [ONE, ONE]


def test_input_history_and_system_become_turns() -> None:
    row = {"instruction": "Translate.", "input": "Haus", "output": "house", "history": [["Hi", "Hello"]]}
    earlier = turn("user", "Hi"), turn("assistant", "Hello")
    asked = (turn("system", "Be brief."), *earlier, turn("user", "Translate.\nHaus"))
    assert read(row | {"system": "Be brief."}) == [(asked, "house")]
    swift = {"query": "Haus?", "response": "house", "history": [["Hi", "Hello"]]}
    assert read(swift) == [((*earlier, turn("user", "Haus?")), "house")]


@pytest.mark.parametrize(
    "row", [{"messages": CHAT}, {"conversations": SHAREGPT}, {"prompt": CHAT[:1], "completion": CHAT[1:]}]
)
def test_every_answer_of_a_chat_is_trained_on_or_the_last_one(row: dict[str, Any]) -> None:
    assert read(row) == BOTH
    assert read(row, train_on="last") == BOTH[1:]


def test_a_chat_in_the_prompt_is_context_alone() -> None:
    assert read({"prompt": CHAT[:3], "completion": SECOND}) == BOTH[1:]
    assert read({"prompt": CHAT[:3], "completion": CHAT[3:]}) == BOTH[1:]


def test_texts_are_read_as_chats_only_if_the_recipe_says_so() -> None:
    chatml = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in CHAT)
    guanaco = f"### Human: {ASK}### Assistant: {ANSWER}### Human: {AGAIN}### Assistant: {SECOND}"
    assert read({"text": chatml}, format="text") == BOTH
    assert read({"text": guanaco}, {"text": chatml}, format="text") == BOTH * 2
    with pytest.raises(
        DataError, match="neither pairs nor questions and answers; it has text; understood for loss_type"
    ):
        parsed({"text": chatml})
    with pytest.raises(DataError, match=r"p\.jsonl:1: text has no turns in the marks of a known chat template"):
        parsed({"text": "Once upon a time."}, format="text")


def test_rows_that_are_no_chats_are_dropped_with_their_reason() -> None:
    found = parsed(
        {"messages": CHAT},
        {"messages": [turn("user", ASK)]},
        {"messages": CHAT[1:]},
        {"messages": [turn("user", ASK), turn("assistant", " ")]},
        {"prompt": ASK},
    )
    assert found.dropped == {
        "no turn of the assistant's": [2],
        "no user turn before the answer": [3],
        "empty answer": [4],
        "no chat, and no question with an answer": [5],
    }


def test_pairs_stay_pairs_and_labels_stay_labels() -> None:
    assert parsed({"prompt": ASK, "chosen": ANSWER, "rejected": "No."}).format is PreferenceFormat.STRINGS
    assert parsed({"prompt": ASK, "completion": ANSWER, "label": True}).format is PreferenceFormat.UNPAIRED
    with pytest.raises(DataError, match='has no column "chosen"'):
        parsed({"messages": CHAT}, supervised=False)


def chats(folder: Path, count: int) -> Path:
    file = folder / "chats.jsonl"
    rows = [{"messages": [turn("user", f"{ASK} {n}"), *CHAT[1:]]} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_a_chat_is_held_out_whole(tmp_path: Path) -> None:
    table = DataTable(train=str(chats(tmp_path, 40)), eval_share=0.3)
    train, heldout = (load_pairs(table, part, tiny.tokenizer(), 42, supervised=True) for part in ("train", "eval"))
    asked = [{first_question(pair.prompt)[0]["content"] for pair in part.pairs} for part in (train, heldout)]
    assert (len(train.pairs), len(heldout.pairs)) == (2 * len(asked[0]), 2 * len(asked[1]))
    assert not asked[0] & asked[1]
    assert len(asked[0] | asked[1]) == 40
    last = load_pairs(table.model_copy(update={"train_on": "last"}), "eval", tiny.tokenizer(), 42, supervised=True)
    assert [pair.row for pair in last.pairs] == [pair.row for pair in heldout.pairs][::2]


def test_the_answers_of_a_chat_share_their_turns_in_a_row(tmp_path: Path) -> None:
    pairs = load_pairs(
        DataTable(train=str(chats(tmp_path, 8)), eval_share=0.3), "train", tiny.tokenizer(), 42, supervised=True
    )
    chat = [pair for pair in pairs.encoded if pair.row == pairs.encoded[0].row]
    assert (len(chat), have_rejected(chat), sorted(pairs.audit.tokens)) == (2, False, ["answer", "prompt"])
    whole = len(chat[1].prompt) + len(chat[1].chosen)
    packing = Packing(whole, 0, backend="spans")
    assert micro_batches(chat, packing) == [[0, 1]]
    row = collate(chat, packing)
    assert row.input_ids_BL.tolist() == [[*chat[1].prompt, *chat[1].chosen]]
    assert row.tokens_S.tolist() == [len(chat[0].chosen), len(chat[1].chosen), 0, 0]
    assert tuple(row.target_N[row.scored_M].tolist()) == chat[0].chosen + chat[1].chosen
