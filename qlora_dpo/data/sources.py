"""Finds the rows a recipe names: local files, the files of a folder that serve a split, hub data sets, mixtures."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_dpo.data import lazy_sequence
from qlora_dpo.data.files import FileRows, Row, ending, read_file, shown
from qlora_dpo.errors import DataError, RecipeError, SourceError
from qlora_dpo.recipe.data import DataTable, MixTable
from qlora_dpo.recipe.tables import DATA_ENDINGS, is_local, is_pattern

Part = Literal["train", "eval"]


@dataclass(frozen=True)
class Rows:
    """All rows of one part of the data, as they were read; row numbers count from 1 over all files of the part."""

    name: str
    rows: Sequence[Row]
    place: Callable[[int], str]
    """Where row number N stands, as messages name it: `pairs.jsonl:17`, or `OWNER/NAME, split train, row 17`."""
    fingerprint: str = ""
    """What tells these rows from all others: their files' SHA-256, or the commit on a hub; empty if not known."""


@dataclass(frozen=True)
class Source:
    """One place where rows are, and the recipe's keys that name it and its split."""

    name: str
    split: str
    key: str
    split_key: str
    default_split: str
    revision: str | None = None
    config: str | None = None
    data_dir: str | None = None


def sources(table: DataTable, part: Part) -> list[Source]:
    """Where the rows of `part` are: one place, or several where the recipe has a mixture."""
    if part == "eval" and table.held_out_share is None:
        own = DataTable.model_fields["eval_split"].default
        name = table.eval or table.train_name
        return [_source(table, name, table.eval_split, "data.eval", "data.eval_split", own)]
    if table.train is not None:
        own = DataTable.model_fields["train_split"].default
        return [_source(table, table.train, table.train_split, "data.train", "data.train_split", own)]
    return [
        _source(each, each.source, each.split, "source in [[data.mix]]", "split in [[data.mix]]", "train")
        for each in table.mix or ()
    ]


def _source(table: DataTable | MixTable, name: str, split: str, key: str, split_key: str, default: str) -> Source:
    return Source(name, split, key, split_key, default, table.revision, table.config, table.data_dir)


def read_rows(table: DataTable, part: Part) -> Rows:
    """Read the rows of `part`.

    A local path that is a file is read whole, and so is each file that matches a pattern. In a folder, a file serves a
    split if its name holds the split's name as a word (`train.jsonl`, `messages-train.jsonl.gz`,
    `train-00000-of-00002.parquet`); several files serve one split only if their names differ in digits alone.
    Everything else is a hub data set. Rows of a mixture are those of its sources, one after another. Raises RecipeError
    for what does not exist or fit together (training and held-out pairs from the same rows included), SourceError for a
    hub or disk that does not answer, DataError for content that cannot be read.
    """
    return together(read_parts(table, part))


def read_parts(table: DataTable, part: Part) -> list[Rows]:
    """Read the rows of `part`, source by source; raises as `read_rows` does."""
    check(table, part)
    return [_read(each) for each in sources(table, part)]


def together(parts: Sequence[Rows]) -> Rows:
    """Rows of several sources one after another, each in its place."""
    if len(parts) == 1:
        return parts[0]
    name = " + ".join(each.name for each in parts)
    told = "" if any(not each.fingerprint for each in parts) else json.dumps([each.fingerprint for each in parts])
    return Rows(name, lazy_sequence.joined([each.rows for each in parts]), _place(parts), told)


def _read(source: Source) -> Rows:
    name, split = source.name, source.split
    if not is_local(name):
        from qlora_dpo.data.hub import read_hub  # `datasets` takes 2 s to import, which local files need not wait for

        title = f"{name}, split {split}"
        rows, commit = read_hub(name, split, source.revision, source.config, source.data_dir)
        if not rows:
            raise DataError(f"{title}: holds no rows; a preference set has one pair per row")
        told = json.dumps([name, commit, source.config, source.data_dir, split])
        return Rows(title, rows, lambda row: f"{title}, row {row}", told)
    read = [read_file(each) for each in _files(source)]
    shown_name = shown(Path(name).expanduser())
    title = read[0].name if len(read) == 1 else shown_name if is_pattern(name) else f"{shown_name}, split {split}"
    told = "" if any(not each.fingerprint for each in read) else json.dumps([each.fingerprint for each in read])
    return Rows(title, lazy_sequence.joined([each.rows for each in read]), _place(read), told)


def check(table: DataTable, part: Part) -> None:
    """Raise RecipeError if the data keys of `part` do not fit together; nothing is read but whether folders exist."""
    for each in sources(table, part):
        file = is_local(each.name) and (is_pattern(each.name) or not _is_folder(Path(each.name).expanduser()))
        if file and each.split != each.default_split:
            raise RecipeError(
                f'{each.split_key} is "{each.split}", but {shown(Path(each.name))} is one file and has no splits; '
                "remove the key, or name a folder with one file per split"
            )
    if part == "eval" and table.held_out_share is None:
        (held,) = sources(table, "eval")
        for train in sources(table, "train"):
            _check_apart(train, held)


def _check_apart(train: Source, held: Source) -> None:
    """Raise RecipeError if the held-out pairs are read from where the training pairs are read."""
    if is_local(train.name) and is_local(held.name):
        files = {each.resolve() for each in _files(train)}
        both = [each for each in _files(held) if each.resolve() in files]
        if both:
            raise RecipeError(
                f"{shown(both[0])}: would give both the training and the held-out pairs; name two files that share "
                "no rows, in data.train and data.eval or by data.train_split and data.eval_split"
            )
    elif _rows_of(train) == _rows_of(held) and _overlap(train.split, held.split):
        raise RecipeError(
            f'{train.name}: {train.split_key} is "{train.split}" and {held.split_key} is "{held.split}", so held-out '
            "pairs would be training pairs; name two splits that share no rows"
        )


def _rows_of(source: Source) -> tuple[str | None, ...]:
    return source.name, source.config, source.data_dir


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise SourceError(f"{shown(path)}: cannot be read: {error.strerror}") from error


def _files(source: Source) -> list[Path]:
    path = Path(source.name).expanduser()
    if is_pattern(source.name) and not path.exists():
        # Path.glob takes no pattern that begins with a folder, so the fixed part in front is split off
        fixed = next(parent for parent in path.parents if not is_pattern(f"{parent}/"))
        found = sorted(each for each in fixed.glob(str(path.relative_to(fixed))) if each.is_file() and ending(each))
        if not found:
            endings = ", ".join(DATA_ENDINGS)
            raise RecipeError(f"{shown(path)}: no data file matches that; they end in {endings}; correct {source.key}")
        return found
    return _serving(path, source) if _is_folder(path) else [path]


def _overlap(one: str, other: str) -> bool:
    """True if two splits surely share rows: they are equal, or one is a slice (`train[:100]`) of the other."""
    return one == other or (one.partition("[")[0] == other.partition("[")[0] and not ("[" in one and "[" in other))


def _serving(folder: Path, source: Source) -> list[Path]:
    split = source.split
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
            f"set {source.split_key}, or name the file itself in {source.key}"
        )
    if len({re.sub(r"\d+", "#", each.name) for each in serving}) > 1:
        found = ", ".join(each.name for each in serving)
        raise RecipeError(
            f'{shown(folder)}: it is not clear which files are the split "{split}": {found}; '
            f"leave one of them, or name the file itself in {source.key}"
        )
    return serving


def _place(parts: Sequence[FileRows] | Sequence[Rows]) -> Callable[[int], str]:
    """Where a row stands, counted from 1 over all parts."""

    def place(row: int) -> str:
        for each in parts:
            if row <= len(each.rows):
                return each.place(row)
            row -= len(each.rows)
        raise IndexError(row)

    return place
