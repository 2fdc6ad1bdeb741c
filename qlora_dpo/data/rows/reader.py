"""Reads the rows of one source: finds their format, brings each row into its columns, and parses it."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from qlora_dpo.data.dialogue import InvalidRow, sanitize_text
from qlora_dpo.data.files import Row, json_type
from qlora_dpo.data.formats import (
    FORMATS_BY_NAME,
    ONE_ANSWER,
    SUPPORTED_FORMATS,
    PreferenceFormat,
    detect_row_format,
    parse_row,
    parse_tools,
)
from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.rows.compared import find_answer_columns
from qlora_dpo.data.rows.layouts import SourceTraits, find_traits, normalize_row
from qlora_dpo.data.rows.rendered import END_MARKS, FAMILIES, MarkFamily, find_end_marks, strip_end_marks
from qlora_dpo.data.rows.supervised import PromptAndAnswers, is_supervised
from qlora_dpo.data.sources import SourceRows
from qlora_dpo.errors import DataError

COMPARED = "compared"
"""The name in `data.format` of two answers and a word on which is the better one."""
TEXT = "text"
"""The name in `data.format` of a column `text` that holds whole chats in the marks of a template."""
SAMPLE_ROWS = 100
"""The first rows of a source, which say what its rows have in common."""
SUPERVISED_ROWS = (
    'understood for loss_type = "sft" are "messages" or "conversations", "prompt" and "completion", "question" and '
    '"answer", "instruction" and "output", pairs, and "text" with data.format = "text"; data.columns = '
    '{ prompt = "...", completion = "..." } renames'
)
MAX_ROW_CHARACTERS = 200
"""How much of a row an error shows."""

OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "user", "post", "problem", "context", "text"),
    "chosen": ("preferred", "better", "good", "positive", "accepted", "win", "best", "correct", "response_j", "human"),
    "rejected": ("dispreferred", "worse", "bad", "negative", "lose", "loser", "worst", "incorrect", "response_k"),
}
"""Names that other data sets have for a column, for the advice of an error."""


@dataclass(frozen=True)
class ParseOptions:
    """How the recipe says that rows are parsed."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    every_pair: bool = True
    answer: str = "last"
    """Which answer of two chats is compared: the last one, or the first in which they differ (`from_difference`)."""
    supervised: bool = False
    """True if rows of questions and answers are read too, for supervised tuning."""
    train_on: str = "all"
    """Which answers of a supervised chat are trained on: all, or the last one."""
    own_marks: MarkFamily | None = None
    """The marks of the model's own chat template; None if no model is known."""

    @property
    def known_ends(self) -> tuple[str, ...]:
        """Marks that may end an answer."""
        return self.own_marks.ends if self.own_marks is not None else END_MARKS

    def key_parts(self) -> list[object]:
        """All of it as values that JSON can express."""
        marks = [self.own_marks.turn.pattern, self.own_marks.start.pattern] if self.own_marks is not None else []
        return [{**vars(self), "own_marks": marks}, list(self.known_ends)]


@dataclass(frozen=True)
class ReadRow:
    """What a row holds: its pairs, its label if it is rated, its tools as JSON, and what was read otherwise."""

    pairs: Sequence[PromptAndAnswers]
    label: bool | None
    tools: str
    repairs: tuple[str, ...]


@dataclass(frozen=True)
class RowReader:
    """How the rows of one source are read."""

    format: PreferenceFormat
    options: ParseOptions
    traits: SourceTraits
    end_marks: frozenset[str] = frozenset()
    """Marks that a template wrote at the end of the answers."""

    def read(self, row: Row) -> ReadRow:
        """Parse a row; raises InvalidRow with the reason if it is no pair."""
        repairs = list[str]()
        row = normalize_row(row, self.traits, repairs)
        pairs = parse_row(
            self.format,
            row,
            repairs,
            every_pair=self.options.every_pair,
            from_difference=self.options.answer == "from_difference",
            last_only=self.options.train_on == "last",
            is_forced=self.options.format not in ("auto", COMPARED, TEXT),
        )
        if not self.traits.is_literal:
            pairs = [self._without_end_marks(pair, repairs) for pair in pairs]
        label = row["label"] if self.format is PreferenceFormat.UNPAIRED else None
        return ReadRow(pairs, label, parse_tools(row), tuple(dict.fromkeys(repairs)))

    def _without_end_marks(self, pair: PromptAndAnswers, repairs: list[str]) -> PromptAndAnswers:
        prompt, *answers = pair
        if not any(answer.rstrip().endswith((">", "]")) for answer in answers):
            return pair
        has_one = self.format in ONE_ANSWER
        stripped, removed = strip_end_marks(
            answers[:1] if has_one else answers, self.end_marks, self.options.known_ends
        )
        repairs += [f"{mark} at the end of an answer left out" for mark in removed]
        return prompt, stripped[0], answers[1] if has_one else stripped[1]


def make_reader(rows: SourceRows, options: ParseOptions, format: PreferenceFormat | None = None) -> RowReader:
    """The reader of a source, found from its first rows; `format` is its format if that is known.

    Raises DataError if no row has a supported format.
    """
    sample = list(islice(rows.rows, SAMPLE_ROWS))
    is_text = options.format == TEXT
    supervised = is_text or options.supervised or options.format == PreferenceFormat.SUPERVISED.name.lower()
    families = (*FAMILIES, options.own_marks) if options.own_marks is not None else FAMILIES
    if options.format == PreferenceFormat.STRINGS.name.lower():
        traits = SourceTraits(is_literal=True, is_supervised=supervised)
    else:
        has_known = any(detect_row_format(row) or (supervised and is_supervised(row)) for row in sample)
        traits = replace(find_traits(sample, not has_known, families), is_supervised=supervised, is_text=is_text)
    if format is None:
        if options.format == COMPARED and not any(map(find_answer_columns, sample)):
            columns = list_columns(sample[0]) if sample else "none"
            raise DataError(
                f'{rows.name}: data.format is "compared", and no row has two answers and a word on the better one; it '
                f'has the columns {columns}; set data.columns = {{ a = "...", b = "...", winner = "..." }}'
            )
        is_detected = options.format in ("auto", COMPARED, TEXT)
        format = detect_format(rows, traits) if is_detected else FORMATS_BY_NAME[options.format]
    reader = RowReader(format, options, traits)
    return RowReader(format, options, traits, _common_end_marks(reader, sample)) if not traits.is_literal else reader


def _common_end_marks(reader: RowReader, sample: Sequence[Row]) -> frozenset[str]:
    """The marks at the end of most answers of the sample."""
    answers = list[str]()
    for row in sample:
        try:
            pairs = reader.read(row).pairs
        except InvalidRow:
            continue
        answers += [answer for _, *both in pairs[:1] for answer in both if answer]
    return find_end_marks(answers, reader.options.known_ends)


def detect_format(rows: SourceRows, traits: SourceTraits) -> PreferenceFormat:
    """The format of the first row that has one; raises DataError, about the first row with answers, if none has."""
    reason: tuple[int, str] | None = None
    for number, row in enumerate(rows.rows, 1):
        try:
            normalized = normalize_row(row, traits, [])
            format = detect_row_format(normalized)
            if format is None and traits.is_supervised and is_supervised(normalized):
                format = PreferenceFormat.SUPERVISED
        except InvalidRow as unusable:
            reason = reason or (number, str(unusable))
            continue
        if format is not None:
            return format
    if reason is not None:
        raise DataError(f"{rows.location(reason[0])}: {reason[1]}; no other row is a usable pair either")
    first = next((row for row in rows.rows if not {"chosen", "rejected"} <= row.keys() or _has_answers(row)), None)
    if first is None:
        raise DataError(f'{rows.name}: "chosen" or "rejected" is null in every row')
    if traits.is_supervised:
        raise DataError(
            f"{rows.name}: has neither pairs nor questions and answers; it has {list_columns(first)}; {SUPERVISED_ROWS}"
            f"{_shown(first)}"
        )
    raise DataError(_no_format_message(rows, first))


def _no_format_message(rows: SourceRows, row: Row) -> str:
    """What a row without a supported format holds, and which columns might be meant."""
    if "chosen" not in row and "label" in row and {"completion", "messages", "conversations"} & row.keys():
        return (
            f"{rows.location(rows.rows.index(row) + 1)}: label is {json_type(row['label'])}, not true or false; write "
            f"true or 1 for a good answer and false or 0 for a bad one{_shown(row)}"
        )
    for column in ("chosen", "rejected"):
        if column not in row:
            advice = _renaming_advice(row) or SUPPORTED_FORMATS
            return f'{rows.name}: has no column "{column}"; it has {list_columns(row)}; {advice}{_shown(row)}'
    kinds = json_type(row.get("prompt")), json_type(row["chosen"]), json_type(row["rejected"])
    if kinds == ("null", "a string", "a string"):
        advice = _renaming_advice(row) or SUPPORTED_FORMATS
        return (
            f'{rows.name}: "chosen" and "rejected" are strings without "\\n\\nHuman:" and "\\n\\nAssistant:" '
            f'turns, and there is no "prompt"; it has the columns {list_columns(row)}; {advice}{_shown(row)}'
        )
    prompt = f'"prompt" is {kinds[0]}' if "prompt" in row else 'there is no "prompt"'
    return (
        f'{rows.location(rows.rows.index(row) + 1)}: {prompt}, "chosen" is {kinds[1]} and "rejected" is {kinds[2]}; '
        f"it has the columns {list_columns(row)}; {SUPPORTED_FORMATS}{_shown(row)}"
    )


def _renaming_advice(row: Row) -> str:
    """The line of `data.columns` that gives a row the columns that it lacks; empty if none would."""
    meant = dict[str, str]()
    for column, names in OTHER_NAMES.items():
        if row.get(column) is not None:
            continue
        others = [str(other) for other in row if other not in (*OTHER_NAMES, *meant.values())]
        close = difflib.get_close_matches(column, others, n=1)
        close = close or [other for other in others if other.casefold().startswith(f"{column}_")][:1]
        found = [other for name in names for other in others if other.casefold() == name]
        begun = [other for name in names[:9] for other in others if other.casefold().startswith(f"{name}_")]
        if candidates := [*close, *found, *begun]:
            meant[column] = sanitize_text(candidates[0])
    lacking = {column for column in ("chosen", "rejected") if row.get(column) is None}
    if not meant or not lacking <= meant.keys():
        return ""
    renamed = ", ".join(f'{column} = "{name}"' for column, name in meant.items())
    quoted = " and ".join(f'"{name}"' for name in meant.values())
    return f"set data.columns = {{ {renamed} }} if {quoted} {'is' if len(meant) == 1 else 'are'} meant"


def _shown(row: Row) -> str:
    """The end of an error: the row, shortened."""
    shortened = {
        sanitize_text(str(column))[:40]: value[:60] + "..." if isinstance(value, str) and len(value) > 60 else value
        for column, value in list(row.items())[:12]
    }
    text = sanitize_text(json.dumps(shortened, ensure_ascii=False, default=str)).replace("\n", " ")
    return f"; the row: {text if len(text) <= MAX_ROW_CHARACTERS else text[:MAX_ROW_CHARACTERS] + ' ...'}"


def rename_columns(rows: SourceRows, columns: Mapping[str, str]) -> Sequence[Row]:
    """The rows with their columns renamed as `data.columns` says."""

    def make(index: int) -> Row:
        row = rows.rows[index]
        return {**row, **{name: row[column] for name, column in columns.items() if column in row}}

    return LazySequence(len(rows.rows), make)


def list_columns(row: Row) -> str:
    """The columns of a row for messages: the first twelve, up to 40 characters of each."""
    names = [sanitize_text(str(column))[:40] for column in row]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def _has_answers(row: Row) -> bool:
    return row["chosen"] is not None and row["rejected"] is not None
