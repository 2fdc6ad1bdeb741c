"""Collects the prompts that a model is to answer, from any data that this project trains on, or from a plain list."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.data.dialogue import InvalidRow, Message, check_roles
from qlora_dpo.data.files import Row, data_suffix
from qlora_dpo.data.mixture import parse_sources
from qlora_dpo.data.rows.messages import parse_messages
from qlora_dpo.data.rows.prompts import answer_text, parse_prompt, single_answer
from qlora_dpo.data.sources import SourceRows, read_sources
from qlora_dpo.data.text_prompts import read_prompt_lines
from qlora_dpo.errors import DataError, RecipeError
from qlora_dpo.recipe.data import DataTable


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt to be answered, and the data's own good answer if it is to be the chosen one."""

    messages: tuple[Message, ...]
    chosen: str = ""

    @property
    def digest(self) -> str:
        """Identifies the prompt: SHA-256 of its messages, the first 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.messages, ensure_ascii=False).encode()).hexdigest()[:16]


def collect_prompts(
    source: str, split: str, chosen_column: str | None, max_prompts: int | None, seed: int
) -> list[AskedPrompt]:
    """The distinct prompts of `source` in the order of its rows, or `max_prompts` of them, drawn with `seed`.

    `source` is a data set, folder or file of rows that a recipe can name, of rows with a prompt alone, or a file of
    plain text with a prompt a line. Raises RecipeError, DataError or SourceError, each one sentence.
    """
    path = Path(source).expanduser()
    if path.is_file() and not data_suffix(path):
        if chosen_column is not None:
            raise RecipeError(f"--chosen {chosen_column}: {source} is plain text, which has no columns; leave it out")
        lines = read_prompt_lines(Path(source))
        asked = [AskedPrompt(({"role": "user", "content": line.strip()},)) for line in lines]
    else:
        asked = list(_from_rows(str(path) if path.exists() else source, split, chosen_column))
    distinct = list({prompt.digest: prompt for prompt in reversed(asked)}.values())[::-1]
    if not distinct:
        raise DataError(f"{source}: holds no usable prompts; `qlora-dpo data lint` says what is wrong with its rows")
    if max_prompts is None or max_prompts >= len(distinct):
        return distinct
    drawn = sorted(random.Random(seed).sample(range(len(distinct)), max_prompts))  # noqa: S311 - nothing secret
    return [distinct[index] for index in drawn]


def _from_rows(source: str, split: str, chosen_column: str | None) -> Iterator[AskedPrompt]:
    """The prompts of rows of pairs, of questions with answers, or with a prompt alone."""
    table = DataTable(train=source, train_split=split, eval=f"{source}/")  # of another name: nothing is held out
    rows = read_sources(table, "train")[0]
    if not rows.rows:
        raise DataError(f"{rows.name}: is empty; name rows with a column prompt")
    if _is_prompt_alone(rows.rows[0], chosen_column):
        yield from (_prompt_of(rows, number, chosen_column) for number in range(1, len(rows.rows) + 1))
        return
    mixture = parse_sources(table, "train", {}, supervised=True)
    for pair in mixture.parsed.pairs:
        chosen = _chosen_answer(mixture.rows, pair.row, chosen_column) if chosen_column else ""
        yield AskedPrompt(pair.prompt, chosen)


def _is_prompt_alone(row: Row, chosen_column: str | None) -> bool:
    """True for a row whose only column that is read is its prompt, or the prompt and the column of `--chosen`."""
    answers = {"chosen", "rejected", "completion", "completions", "responses", "messages", "response", "answer"}
    return isinstance(row.get("prompt"), str | list) and not answers - {chosen_column} & row.keys()


def _prompt_of(rows: SourceRows, number: int, chosen_column: str | None) -> AskedPrompt:
    row = rows.rows[number - 1]
    try:
        prompt = parse_prompt(row.get("prompt"), row, [])
        check_roles(prompt)
    except InvalidRow as error:
        raise DataError(
            f'{rows.location(number)}: is no prompt: {error}; write {{"prompt": "TEXT"}} or a list of messages'
        ) from error
    return AskedPrompt(prompt, _chosen_answer(rows, number, chosen_column) if chosen_column else "")


def _chosen_answer(rows: SourceRows, number: int, column: str) -> str:
    """The text in `column` of a row: a string, an object, or messages of which the last is the assistant's."""
    row = rows.rows[number - 1]
    if column not in row:
        raise RecipeError(f"--chosen {column}: {rows.location(number)} has no such column, but {', '.join(row)}")
    value: Any = row[column]
    try:
        answer = (
            single_answer(parse_messages(value, column, [])[-1:]) if isinstance(value, list) else answer_text(value)
        )
    except InvalidRow as error:
        raise DataError(f"{rows.location(number)}: {column} holds no answer: {error}") from error
    if not answer.strip():
        raise DataError(f"{rows.location(number)}: {column} is empty; --chosen names the column of good answers")
    return answer


def prompts_digest(prompts: Sequence[AskedPrompt]) -> str:
    """SHA-256 over the prompts in their order, as hexadecimal digits."""
    return hashlib.sha256("".join(prompt.digest for prompt in prompts).encode()).hexdigest()
