"""Rows of public preference sets whose columns are their own, brought into the columns that others have too."""

from collections.abc import Callable, Mapping
from typing import Any

from qlora_dpo.data.dialogue import InvalidRow
from qlora_dpo.data.files import Row
from qlora_dpo.data.rows.compared import TIE

Columns = Mapping[str, Any]
"""What a row gets; a column that is None in it is taken out."""


def read_published(row: Row, repairs: list[str]) -> Row:
    """`row` in common columns if it is one of SHP, UltraFeedback (raw), summarize-from-feedback or WebGPT.

    Raises InvalidRow for a row of theirs that says of no answer that it is better.
    """
    for needed, read, name in _SETS:
        if needed <= row.keys() and (found := read(row)) is not None:
            repairs.append(name)
            changed = {**row, **found}
            return {column: value for column, value in changed.items() if found.get(column, "") is not None}
    return row


def _shp(row: Row) -> Columns | None:
    """Stanford Human Preferences: a post and two comments; `labels` is 1 if A is the better one."""
    if row["labels"] not in (0, 1):
        raise InvalidRow("labels is neither 0 nor 1")
    answers = row["human_ref_B"], row["human_ref_A"]
    better = int(row["labels"])
    return {"prompt": row["history"], "chosen": answers[better], "rejected": answers[1 - better], "history": None}


def _ultrafeedback(row: Row) -> Columns | None:
    """UltraFeedback before it became pairs: four completions, each with its scores."""
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(each, dict) for each in completions):
        return None
    score = next((name for name in _SCORES if all(name in each for each in completions)), None)
    if score is None or not all("response" in each for each in completions):
        return None
    responses, scores = ([each[name] for each in completions] for name in ("response", score))
    return {"prompt": row["instruction"], "responses": responses, "scores": scores} | dict.fromkeys(
        ("instruction", "completions")
    )


def _summaries(row: Row) -> Columns | None:
    """Summaries from human feedback (Stiennon et al. 2020, app. B): a post, two summaries and the choice."""
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        return None
    if choice not in (0, 1):
        raise InvalidRow("choice is neither 0 nor 1")
    texts = [each.get("text") if isinstance(each, dict) else None for each in summaries]
    if info.get("post"):
        parts = {"SUBREDDIT": f"r/{info.get('subreddit')}", "TITLE": info.get("title"), "POST": info["post"]}
    else:
        parts = {"TITLE": info.get("title"), "ARTICLE": info.get("article")}
    prompt = "\n\n".join(f"{name}: {text}" for name, text in parts.items() if text) + "\n\nTL;DR:"
    return {"prompt": prompt, "chosen": texts[choice], "rejected": texts[1 - choice]}


def _webgpt(row: Row) -> Columns | None:
    """WebGPT's comparisons: `question` is an object, and the answer of the higher score is the better one."""
    question = row["question"]
    if not isinstance(question, dict) or not isinstance(question.get("full_text"), str):
        return None
    if row["score_0"] == row["score_1"]:
        raise InvalidRow(TIE)
    return {"question": question["full_text"]}


_SCORES = ("overall_score", "fine-grained_score", "score")
_SETS: tuple[tuple[set[str], Callable[[Row], Columns | None], str], ...] = (
    ({"history", "human_ref_A", "human_ref_B", "labels"}, _shp, "history, human_ref_A and human_ref_B read by labels"),
    ({"instruction", "completions"}, _ultrafeedback, "completions read as responses and their scores"),
    ({"info", "summaries", "choice"}, _summaries, "info and summaries read as prompt and answers, by choice"),
    ({"question", "answer_0", "answer_1", "score_0", "score_1"}, _webgpt, "question read as its full_text"),
)
