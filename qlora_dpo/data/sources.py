"""Finds the rows a recipe names: local files, the files of a folder that serve a split, hub data sets, mixtures."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_dpo.data import lazy_sequence
from qlora_dpo.data.files import FileRows, Row, data_suffix, display_path, read_data_file
from qlora_dpo.errors import DataError, RecipeError, SourceError
from qlora_dpo.recipe.data import DataTable, MixTable
from qlora_dpo.recipe.tables import DATA_SUFFIXES, is_glob, is_local_path

DataPart = Literal["train", "eval"]


@dataclass(frozen=True)
class SourceRows:
    """All rows of one part of the data, as they were read; row numbers count from 1 over all files of the part."""

    name: str
    rows: Sequence[Row]
    location: Callable[[int], str]
    """Where row number N stands, as messages name it: `pairs.jsonl:17`, or `OWNER/NAME, split train, row 17`."""
    fingerprint: str = ""
    """What tells these rows from all others: their files' SHA-256, or the commit on a hub; empty if not known."""


@dataclass(frozen=True)
class DataSource:
    """One place where rows are, and the recipe's keys that name it and its split."""

    name: str
    split: str
    key: str
    split_key: str
    default_split: str
    revision: str | None = None
    config: str | None = None
    data_dir: str | None = None


def list_sources(table: DataTable, part: DataPart) -> list[DataSource]:
    """Where the rows of `part` are: one place, or several where the recipe has a mixture."""
    if part == "eval" and table.effective_eval_share is None:
        own = DataTable.model_fields["eval_split"].default
        name = table.eval or table.train_description
        return [_make_source(table, name, table.eval_split, "data.eval", "data.eval_split", own)]
    if table.train is not None:
        own = DataTable.model_fields["train_split"].default
        return [_make_source(table, table.train, table.train_split, "data.train", "data.train_split", own)]
    return [
        _make_source(each, each.source, each.split, "source in [[data.mix]]", "split in [[data.mix]]", "train")
        for each in table.mix or ()
    ]


def _make_source(
    table: DataTable | MixTable, name: str, split: str, key: str, split_key: str, default: str
) -> DataSource:
    return DataSource(name, split, key, split_key, default, table.revision, table.config, table.data_dir)


def read_rows(table: DataTable, part: DataPart) -> SourceRows:
    """Read the rows of `part`.

    A local path that is a file is read whole, and so is each file that matches a pattern. In a folder, a file serves a
    split if its name holds the split's name as a word (`train.jsonl`, `messages-train.jsonl.gz`,
    `train-00000-of-00002.parquet`); several files serve one split only if their names differ in digits alone.
    Everything else is a hub data set. Rows of a mixture are those of its sources, one after another. Raises RecipeError
    for what does not exist or fit together (training and held-out pairs from the same rows included), SourceError for a
    hub or disk that does not answer, DataError for content that cannot be read.
    """
    return concatenate_rows(read_sources(table, part))


def read_sources(table: DataTable, part: DataPart) -> list[SourceRows]:
    """Read the rows of `part`, source by source; raises as `read_rows` does."""
    check_sources(table, part)
    return [_read_source(each) for each in list_sources(table, part)]


def concatenate_rows(parts: Sequence[SourceRows]) -> SourceRows:
    """Rows of several sources one after another, each in its place."""
    if len(parts) == 1:
        return parts[0]
    name = " + ".join(each.name for each in parts)
    told = "" if any(not each.fingerprint for each in parts) else json.dumps([each.fingerprint for each in parts])
    return SourceRows(
        name, lazy_sequence.concatenate_sequences([each.rows for each in parts]), _row_locator(parts), told
    )


def _read_source(source: DataSource) -> SourceRows:
    name, split = source.name, source.split
    if not is_local_path(name):
        from qlora_dpo.data.hub import (
            read_hub_dataset,  # `datasets` takes 2 s to import, which local files need not wait for
        )

        title = f"{name}, split {split}"
        rows, commit = read_hub_dataset(name, split, source.revision, source.config, source.data_dir)
        if not rows:
            raise DataError(f"{title}: holds no rows; a preference set has one pair per row")
        told = json.dumps([name, commit, source.config, source.data_dir, split])
        return SourceRows(title, rows, lambda row: f"{title}, row {row}", told)
    read = [read_data_file(each) for each in _data_files(source)]
    shown_name = display_path(Path(name).expanduser())
    title = read[0].name if len(read) == 1 else shown_name if is_glob(name) else f"{shown_name}, split {split}"
    told = "" if any(not each.fingerprint for each in read) else json.dumps([each.fingerprint for each in read])
    return SourceRows(
        title, lazy_sequence.concatenate_sequences([each.rows for each in read]), _row_locator(read), told
    )


def check_sources(table: DataTable, part: DataPart) -> None:
    """Raise RecipeError if the data keys of `part` do not fit together; nothing is read but whether folders exist."""
    for each in list_sources(table, part):
        file = is_local_path(each.name) and (is_glob(each.name) or not _is_folder(Path(each.name).expanduser()))
        if file and each.split != each.default_split:
            raise RecipeError(
                f'{each.split_key} is "{each.split}", but {display_path(Path(each.name))} is one file and has no '
                "splits; remove the key, or name a folder with one file per split"
            )
    if part == "eval" and table.effective_eval_share is None:
        (held,) = list_sources(table, "eval")
        for train in list_sources(table, "train"):
            _check_disjoint(train, held)


def _check_disjoint(train: DataSource, held: DataSource) -> None:
    """Raise RecipeError if the held-out pairs are read from where the training pairs are read."""
    if is_local_path(train.name) and is_local_path(held.name):
        files = {each.resolve() for each in _data_files(train)}
        both = [each for each in _data_files(held) if each.resolve() in files]
        if both:
            raise RecipeError(
                f"{display_path(both[0])}: would give both the training and the held-out pairs; name two files that "
                "share no rows, in data.train and data.eval or by data.train_split and data.eval_split"
            )
    elif _dataset_key(train) == _dataset_key(held) and _splits_overlap(train.split, held.split):
        raise RecipeError(
            f'{train.name}: {train.split_key} is "{train.split}" and {held.split_key} is "{held.split}", so held-out '
            "pairs would be training pairs; name two splits that share no rows"
        )


def _dataset_key(source: DataSource) -> tuple[str | None, ...]:
    return source.name, source.config, source.data_dir


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise SourceError(f"{display_path(path)}: cannot be read: {error.strerror}") from error


def _data_files(source: DataSource) -> list[Path]:
    path = Path(source.name).expanduser()
    if is_glob(source.name) and not path.exists():
        # Path.glob takes no pattern that begins with a folder, so the fixed part in front is split off
        fixed = next(parent for parent in path.parents if not is_glob(f"{parent}/"))
        found = sorted(
            each for each in fixed.glob(str(path.relative_to(fixed))) if each.is_file() and data_suffix(each)
        )
        if not found:
            endings = ", ".join(DATA_SUFFIXES)
            raise RecipeError(
                f"{display_path(path)}: no data file matches that; they end in {endings}; correct {source.key}"
            )
        return found
    return _split_files(path, source) if _is_folder(path) else [path]


def _splits_overlap(one: str, other: str) -> bool:
    """True if two splits surely share rows: they are equal, or one is a slice (`train[:100]`) of the other."""
    return one == other or (one.partition("[")[0] == other.partition("[")[0] and not ("[" in one and "[" in other))


def _split_files(folder: Path, source: DataSource) -> list[Path]:
    split = source.split
    try:
        files = sorted(
            each for each in folder.iterdir() if each.is_file() and data_suffix(each) and each.name[0] != "."
        )
    except OSError as error:
        raise SourceError(f"{display_path(folder)}: cannot be read: {error.strerror}") from error
    names = ", ".join(each.name for each in files[:8]) + (", ..." if len(files) > 8 else "")
    if not files:
        raise RecipeError(
            f"{display_path(folder)}: is a folder without data files; they end in {', '.join(DATA_SUFFIXES)}"
        )
    word = re.compile(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])", re.IGNORECASE)
    serving = [each for each in files if word.search(each.name.removesuffix(str(data_suffix(each))))]
    if not serving:
        raise RecipeError(
            f'{display_path(folder)}: no file has the split\'s name "{split}" in its own; it has {names}; '
            f"set {source.split_key}, or name the file itself in {source.key}"
        )
    if len({re.sub(r"\d+", "#", each.name) for each in serving}) > 1:
        found = ", ".join(each.name for each in serving)
        raise RecipeError(
            f'{display_path(folder)}: it is not clear which files are the split "{split}": {found}; '
            f"leave one of them, or name the file itself in {source.key}"
        )
    return serving


def _row_locator(parts: Sequence[FileRows] | Sequence[SourceRows]) -> Callable[[int], str]:
    """Where a row stands, counted from 1 over all parts."""

    def place(row: int) -> str:
        for each in parts:
            if row <= len(each.rows):
                return each.location(row)
            row -= len(each.rows)
        raise IndexError(row)

    return place
