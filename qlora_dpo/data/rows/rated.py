"""Rows that hold one answer each, with ratings, several in a row to a prompt: HelpSteer's and HelpSteer2's."""

from dataclasses import replace
from itertools import islice

import numpy as np

from qlora_dpo.data.files import Row, log_once
from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.sources import SourceRows

_RATED_COLUMNS = {"prompt", "response", "helpfulness", "correctness", "coherence"}
_RATING = "helpfulness"
"""What answers are compared by."""


def join_rated_rows(rows: SourceRows) -> SourceRows:
    """`rows` with the answers to one prompt, in rows one after another, joined in one row of ranked answers.

    Rows of another kind are returned as they are. A row number is then that of a prompt; its location is that of the
    prompt's first row.
    """
    first = next(iter(islice(rows.rows, 1)), None)
    if first is None or not first.keys() >= _RATED_COLUMNS or {"chosen", "rejected"} & first.keys():
        return rows
    prompts = [row.get("prompt") for row in rows.rows]
    starts = np.array([i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]])
    ends = np.append(starts[1:], len(prompts))

    def make(index: int) -> Row:
        answers = [rows.rows[number] for number in range(starts[index], ends[index])]
        responses, scores = ([answer.get(column) for answer in answers] for column in ("response", _RATING))
        return {**answers[0], "responses": responses, "scores": scores}

    log_once(f"{rows.name}: {len(prompts):,} rated answers read as {len(starts):,} prompts, compared by {_RATING}")
    return replace(
        rows,
        rows=LazySequence(len(starts), make),
        location=lambda number: rows.location(int(starts[number - 1]) + 1),
        repeated_keys=lambda: {
            int(np.searchsorted(starts, number - 1, side="right")): key for number, key in rows.repeated_keys().items()
        },
    )
