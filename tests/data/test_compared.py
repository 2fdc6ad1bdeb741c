"""Two answers and who won, as public sets and people's own files have them; the texts are invented."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from qlora_dpo.data.encode import load_pairs
from qlora_dpo.data.formats import PreferenceFormat
from qlora_dpo.data.pairs import ParsedRows, parse_pairs
from qlora_dpo.data.rows.compared import TIE
from qlora_dpo.data.rows.reader import ParseOptions
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.errors import DataError
from qlora_dpo.recipe.data import DataTable

ASK = "Is the library open on Sunday?"
GOOD, BAD = "No, it opens again on Monday at nine.", "Who knows."


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def parsed(*content: dict[str, Any], **options: Any) -> ParsedRows:
    rows = SourceRows("p.jsonl", list(content), lambda number: f"p.jsonl:{number}")
    return parse_pairs(rows, options=ParseOptions(**options))


CHATS = [[turn("user", ASK), turn("assistant", text)] for text in (GOOD, BAD)]
PUBLISHED: dict[str, dict[str, Any]] = {
    "Chatbot Arena": {
        "model_a": "kind-7b", "model_b": "curt-7b", "winner": "model_a", "conversation_a": CHATS[0],
        "conversation_b": CHATS[1], "turn": 1, "language": "English",
    },
    "PKU-SafeRLHF": {
        "prompt": ASK, "response_0": BAD, "response_1": GOOD, "is_response_0_safe": True, "is_response_1_safe": True,
        "better_response_id": 1, "safer_response_id": 0,
    },
    "SHP": {
        "post_id": "p1", "domain": "askacademia_train", "history": ASK, "human_ref_A": BAD, "human_ref_B": GOOD,
        "labels": 0, "score_A": 3, "score_B": 9,
    },
    "HelpSteer 3": {
        "context": [turn("user", ASK)], "response1": BAD, "response2": GOOD, "overall_preference": 2,
        "individual_preference": [],
    },
    "UltraFeedback, raw": {
        "source": "evol", "instruction": ASK, "models": ["m", "n"],
        "completions": [
            {"model": "n", "response": BAD, "overall_score": 2.5, "critique": "Rude."},
            {"model": "m", "response": GOOD, "overall_score": 8.0, "critique": "Good."},
        ],
    },
    "WebGPT": {
        "question": {"dataset": "eli5", "id": "q", "full_text": ASK}, "answer_0": BAD, "answer_1": GOOD,
        "score_0": -0.5, "score_1": 0.5, "tokens_0": {}, "tokens_1": {},
    },
    "LLMBar": {"input": ASK, "output_1": GOOD, "output_2": BAD, "label": 1},
    "PandaLM": {
        "instruction": ASK, "input": "", "response1": BAD, "response2": GOOD, "annotator1": 2, "annotator2": 0,
        "annotator3": 2,
    },
    "LLaMA-Factory": {"instruction": ASK, "input": "", "output": [GOOD, BAD]},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_of_a_public_set_is_a_pair_without_a_map(name: str) -> None:
    found = parsed(PUBLISHED[name])
    (pair,) = found.pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ((turn("user", ASK),), GOOD, BAD)
    assert pair.repairs


def test_a_summary_is_asked_for_as_in_its_paper() -> None:
    row = {
        "info": {"id": "t3", "post": "My cat sings.", "title": "Cat", "subreddit": "cats"},
        "summaries": [{"text": " A cat.", "policy": "sup1"}, {"text": " A singing cat.", "policy": "ref"}],
        "choice": 1,
        "worker": "w",
    }
    (pair,) = parsed(row).pairs
    text = "SUBREDDIT: r/cats\n\nTITLE: Cat\n\nPOST: My cat sings.\n\nTL;DR:"
    assert pair.prompt == (turn("user", text),)
    assert (pair.chosen.strip(), pair.rejected.strip()) == ("A singing cat.", "A cat.")


@pytest.mark.parametrize(
    ("name", "tie"),
    [
        ("Chatbot Arena", {"winner": "tie (bothbad)"}),
        ("HelpSteer 3", {"overall_preference": 0}),
        ("WebGPT", {"score_0": 0.0, "score_1": 0.0}),
        ("PandaLM", {"annotator1": 1, "annotator2": 0}),
    ],
)
def test_ties_are_dropped_and_counted(name: str, tie: dict[str, Any]) -> None:
    found = parsed({**PUBLISHED[name], **tie}, PUBLISHED[name])
    assert (len(found.pairs), found.dropped) == (1, {TIE: [1]})


@pytest.mark.parametrize(
    ("first", "second"), [(0, 1), (1, 2), ("0", "1"), ("A", "B"), ("a", "b"), ("model_a", "model_b"), ("kind", "curt")]
)
def test_a_recipe_names_the_columns_and_the_better_one_is_named_in_any_way(first: Any, second: Any) -> None:
    common = {"q": ASK, "left": GOOD, "right": BAD, "model_a": "kind", "model_b": "curt"}
    swapped = {**common, "left": BAD, "right": GOOD, "who": second}
    columns = {"prompt": "q", "a": "left", "b": "right", "winner": "who"}
    found = parsed({**common, "who": first}, swapped, format="compared", columns=columns)
    assert found.format is PreferenceFormat.STRINGS
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [(GOOD, BAD)] * 2


def test_scores_of_mapped_answers_say_which_is_better() -> None:
    columns = {"prompt": "q", "a": "left", "b": "right", "score_a": "s", "score_b": "t"}
    row = {"q": ASK, "left": BAD, "right": GOOD, "s": "1.5", "t": "2"}
    (pair,) = parsed(row, format="compared", columns=columns).pairs
    assert (pair.chosen, pair.rejected) == (GOOD, BAD)


def test_a_number_that_may_mean_either_is_no_verdict() -> None:
    row = {"prompt": ASK, "a": GOOD, "b": BAD, "winner": 1}
    with pytest.raises(DataError, match=r'winner is "1", which names neither a nor b; no other row is a usable pair'):
        parsed(row, format="compared")
    other = {"prompt": "And now?", "a": "Yes, it is.", "b": "No, not now.", "winner": 3}
    found = parsed({**row, "winner": 2}, other)
    assert found.dropped == {"winner is 3, which is the number of no answer": [2]}
    assert found.pairs[0].chosen == BAD


def test_where_nothing_is_compared_the_columns_to_name_are_told() -> None:
    with pytest.raises(DataError) as refused:
        parsed({"q": ASK, "left": GOOD, "right": BAD}, format="compared")
    assert str(refused.value) == (
        'p.jsonl: data.format is "compared", and no row has two answers and a word on the better one; it has the '
        'columns q, left, right; set data.columns = { a = "...", b = "...", winner = "..." }'
    )


def test_rated_answers_in_rows_one_after_another_are_compared(empty_folder: Path) -> None:
    ratings = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
    answers = [
        {"prompt": ASK, "response": BAD, "helpfulness": 0, **ratings},
        {"prompt": ASK, "response": GOOD, "helpfulness": 4, **ratings},
        {"prompt": "And on Monday?", "response": "Yes.", "helpfulness": 2, **ratings},
        {"prompt": "And on Monday?", "response": "Maybe.", "helpfulness": 2, **ratings},
        {"prompt": "At noon?", "response": "Yes, at noon.", "helpfulness": 3, **ratings},
        {"prompt": "At noon?", "response": "No.", "helpfulness": 1, **ratings},
    ]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    found = load_pairs(DataTable(train="./p.jsonl", eval="./q.jsonl"), "train", tiny.tokenizer(), 0)
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [(GOOD, BAD), ("Yes, at noon.", "No.")]
    assert (found.audit.rows, found.audit.used) == (3, 2)
    assert list(found.audit.first_location.values()) == ["p.jsonl:3"]
