"""Finds the rows a recipe names: one local file, the files of a folder that serve a split, or a hub data set."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_dpo.data import lazily
from qlora_dpo.data.files import FileRows, Row, ending, read_file, shown
from qlora_dpo.errors import DataError, RecipeError, SourceError
from qlora_dpo.recipe_data import DataTable
from qlora_dpo.recipe_tables import DATA_ENDINGS, is_local

Part = Literal["train", "eval"]


@dataclass(frozen=True)
class Rows:
    """All rows of one part of the data, as they were read; row numbers count from 1 over all files of the part."""

    name: str
    rows: Sequence[Row]
    place: Callable[[int], str]
    """Where row number N stands, as messages name it: `pairs.jsonl:17`, or `OWNER/NAME, split train, row 17`."""


def read_rows(table: DataTable, part: Part) -> Rows:
    """Read the rows of `part`.

    A local path that is a file is read whole. In a folder, a file serves a split if its name holds the split's name
    as a word (`train.jsonl`, `messages-train.jsonl.gz`, `train-00000-of-00002.parquet`); several files serve one
    split only if their names differ in digits alone. Everything else is a hub data set. Raises RecipeError for what
    does not exist or fit together (training and held-out pairs from the same rows included), SourceError for a hub
    or disk that does not answer, DataError for content that cannot be read.
    """
    if table.held_out_share is not None:
        part = "train"  # both parts are read from there, and told apart by their prompts
    check(table, part)
    name, split = _named(table, part)
    if not is_local(name):
        from qlora_dpo.data.hub import read_hub  # `datasets` takes 2 s to import, which local files need not wait for

        title = f"{name}, split {split}"
        rows = read_hub(name, split, table.revision)
        if not rows:
            raise DataError(f"{title}: holds no rows; a preference set has one pair per row")
        return Rows(title, rows, lambda row: f"{title}, row {row}")
    read = [read_file(each) for each in _files(name, split, part)]
    title = read[0].name if len(read) == 1 else f"{shown(Path(name).expanduser())}, split {split}"
    return _joined(title, read)


def check(table: DataTable, part: Part) -> None:
    """Raise RecipeError if the data keys of `part` do not fit together; nothing is read but whether folders exist."""
    name, split = _named(table, part)
    file = is_local(name) and not _is_folder(Path(name).expanduser())
    default = DataTable.model_fields[f"{part}_split"].default
    if file and split != default:
        raise RecipeError(
            f'data.{part}_split is "{split}", but {shown(Path(name))} is one file and has no splits; '
            "remove the key, or name a folder with one file per split"
        )
    if part == "eval":
        _check_apart(table)


def _check_apart(table: DataTable) -> None:
    """Raise RecipeError if the held-out pairs are read from where the training pairs are read."""
    (train, train_split), (held, held_split) = _named(table, "train"), _named(table, "eval")
    if is_local(train) and is_local(held):
        files = {each.resolve() for each in _files(train, train_split, "train")}
        both = [each for each in _files(held, held_split, "eval") if each.resolve() in files]
        if both:
            raise RecipeError(
                f"{shown(both[0])}: would give both the training and the held-out pairs; name two files that share "
                "no rows, in data.train and data.eval or by data.train_split and data.eval_split"
            )
    elif train == held and _overlap(train_split, held_split):
        raise RecipeError(
            f'{train}: data.train_split is "{train_split}" and data.eval_split is "{held_split}", so held-out pairs '
            "would be training pairs; name two splits that share no rows"
        )


def _named(table: DataTable, part: Part) -> tuple[str, str]:
    if part == "train":
        return table.train, table.train_split
    return table.eval or table.train, table.eval_split


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise SourceError(f"{shown(path)}: cannot be read: {error.strerror}") from error


def _files(name: str, split: str, part: Part) -> list[Path]:
    path = Path(name).expanduser()
    return _serving(path, split, part) if _is_folder(path) else [path]


def _overlap(one: str, other: str) -> bool:
    """True if two splits surely share rows: they are equal, or one is a slice (`train[:100]`) of the other."""
    return one == other or (one.partition("[")[0] == other.partition("[")[0] and not ("[" in one and "[" in other))


def _serving(folder: Path, split: str, part: Part) -> list[Path]:
    try:
        files = sorted(each for each in folder.iterdir() if each.is_file() and ending(each) and each.name[0] != ".")
    except OSError as error:
        raise SourceError(f"{shown(folder)}: cannot be read: {error.strerror}") from error
    names = ", ".join(each.name for each in files[:8]) + (", ..." if len(files) > 8 else "")
    if not files:
        raise RecipeError(f"{shown(folder)}: is a folder without data files; they end in {', '.join(DATA_ENDINGS)}")
    word = re.compile(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])", re.IGNORECASE)
    serving = [each for each in files if word.search(each.name.removesuffix(str(ending(each))))]
    if not serving:
        raise RecipeError(
            f'{shown(folder)}: no file has the split\'s name "{split}" in its own; it has {names}; '
            f"set data.{part}_split, or name the file itself in data.{part}"
        )
    if len({re.sub(r"\d+", "#", each.name) for each in serving}) > 1:
        found = ", ".join(each.name for each in serving)
        raise RecipeError(
            f'{shown(folder)}: it is not clear which files are the split "{split}": {found}; '
            f"leave one of them, or name the file itself in data.{part}"
        )
    return serving


def _joined(name: str, files: Sequence[FileRows]) -> Rows:
    def place(row: int) -> str:
        for each in files:
            if row <= len(each.rows):
                return each.place(row)
            row -= len(each.rows)
        raise IndexError(row)

    return Rows(name, lazily.joined([each.rows for each in files]), place)
