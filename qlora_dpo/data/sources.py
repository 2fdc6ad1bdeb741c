"""Reads the rows that a recipe names: local files, the files of a split in a folder, hub data sets, mixtures."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_dpo.data.files import FileRows, Row, data_suffix, display_path, log_once, read_data_file
from qlora_dpo.data.lazy_sequence import concatenate_sequences
from qlora_dpo.data.reading.arrow_tables import saved_dataset_files, saved_splits
from qlora_dpo.errors import DataError, QloraDpoError, RecipeError
from qlora_dpo.files import path_exists, read_error
from qlora_dpo.recipe.data import DataTable, MixTable
from qlora_dpo.recipe.tables import DATA_SUFFIXES, SAVED_DATASET_NAMES, is_glob, is_local_path

DataPart = Literal["train", "eval"]


@dataclass(frozen=True)
class SourceRows:
    """All rows of one part of the data; row numbers count from 1 over all files of the part."""

    name: str
    rows: Sequence[Row]
    location: Callable[[int], str]
    """The location of a row number in messages: `pairs.jsonl:17`, or `OWNER/NAME, split train, row 17`."""
    fingerprint: str = ""
    """Identifies the rows: the SHA-256 of their files, or the commit on the hub; empty if unknown."""
    repeated_keys: Callable[[], Mapping[int, str]] = dict
    """A key that stands twice in one object, by row number, of the rows that were read so far."""


@dataclass(frozen=True)
class DataSource:
    """A file, folder, pattern or hub data set, and the recipe keys that name it and its split."""

    name: str
    split: str
    key: str
    split_key: str
    default_split: str
    revision: str | None = None
    config: str | None = None
    data_dir: str | None = None


def list_sources(table: DataTable, part: DataPart) -> list[DataSource]:
    """The sources of `part`: one, or several if the recipe has a mixture."""
    if part == "eval" and table.effective_eval_share is None:
        default = DataTable.model_fields["eval_split"].default
        name = table.eval or table.train_description
        return [_make_source(table, name, table.eval_split, "data.eval", "data.eval_split", default)]
    if table.train is not None:
        default = DataTable.model_fields["train_split"].default
        return [_make_source(table, table.train, table.train_split, "data.train", "data.train_split", default)]
    return [
        _make_source(mix, mix.source, mix.split, "source in [[data.mix]]", "split in [[data.mix]]", "train")
        for mix in table.mix or ()
    ]


def _make_source(
    table: DataTable | MixTable, name: str, split: str, key: str, split_key: str, default: str
) -> DataSource:
    return DataSource(name, split, key, split_key, default, table.revision, table.config, table.data_dir)


def read_sources(table: DataTable, part: DataPart) -> list[SourceRows]:
    """Read the rows of `part`, source by source.

    A local file is read whole, and so is each file that matches a pattern. In a folder, a file belongs to a split if
    its name contains the split's name as a word (`train.jsonl`, `messages-train.jsonl.gz`,
    `train-00000-of-00002.parquet`); several files make up one split only if their names differ in digits alone.
    Everything else is a hub data set. Raises RecipeError for sources that do not exist or fit together (for example,
    training and held-out pairs from the same rows), SourceError if a hub or a disk fails, and DataError for content
    that cannot be read.
    """
    check_sources(table, part)
    return [_read_source(source) for source in list_sources(table, part)]


def concatenate_rows(parts: Sequence[SourceRows]) -> SourceRows:
    """The rows of several sources, one after another."""
    if len(parts) == 1:
        return parts[0]
    return _concatenate(" + ".join(rows.name for rows in parts), parts)


def _concatenate(name: str, parts: Sequence[FileRows] | Sequence[SourceRows]) -> SourceRows:
    fingerprints = [rows.fingerprint for rows in parts]
    return SourceRows(
        name,
        concatenate_sequences([rows.rows for rows in parts]),
        _row_locator(parts),
        json.dumps(fingerprints) if all(fingerprints) else "",
        lambda: _join_repeated_keys(parts),
    )


def _join_repeated_keys(parts: Sequence[FileRows] | Sequence[SourceRows]) -> dict[int, str]:
    """The repeated keys of several parts, by row number over all of them."""
    start, joined = 0, dict[int, str]()
    for part in parts:
        joined |= {start + row: key for row, key in part.repeated_keys().items()}
        start += len(part.rows)
    return joined


def _read_source(source: DataSource) -> SourceRows:
    name, split = source.name, source.split
    if not is_local_path(name):
        from qlora_dpo.data.hub import (
            read_hub_dataset,  # importing `datasets` takes 2 s, which local files do not need
        )

        title = f"{name}, split {split}"
        with _naming_local_folder(name, source.key):
            rows, commit = read_hub_dataset(name, split, source.revision, source.config, source.data_dir)
        if not rows:
            raise DataError(f"{title}: holds no rows; a preference set has one pair per row")
        fingerprint = json.dumps([name, commit, source.config, source.data_dir, split])
        return SourceRows(title, rows, lambda row: f"{title}, row {row}", fingerprint)
    files = [read_data_file(path, split) for path in _data_files(source)]
    is_folder = _is_folder(Path(name).expanduser())
    if split != source.default_split and not is_folder and not files[0].has_splits:
        raise _no_splits_error(source)
    shown_name = display_path(Path(name).expanduser())
    title = files[0].name if len(files) == 1 else shown_name if is_glob(name) else f"{shown_name}, split {split}"
    return _concatenate(title, files)


@contextmanager
def _naming_local_folder(name: str, key: str) -> Iterator[None]:
    """Say in an error, or after reading, that a folder here is called like the hub data set `name`."""
    is_folder_here = path_exists(Path(name))
    try:
        yield
    except QloraDpoError as error:
        if not is_folder_here:
            raise
        raise type(error)(
            f'{error}; a folder here has that name: write "./{name}" in {key} if it is meant (in a recipe, relative to '
            "the recipe's own folder)"
        ) from error
    if is_folder_here:
        log_once(f'{name}: was read from the hub, not from the folder of that name here, which is "./{name}"')


def check_sources(table: DataTable, part: DataPart) -> None:
    """Raise RecipeError if the data keys of `part` do not fit together; only JSON that may hold splits is opened."""
    for source in list_sources(table, part):
        path = Path(source.name).expanduser()
        is_file = is_local_path(source.name) and (is_glob(source.name) or not _is_folder(path))
        if is_file and source.split != source.default_split and not _may_hold_splits(path):
            raise _no_splits_error(source)
    if part == "eval" and table.effective_eval_share is None:
        (eval_source,) = list_sources(table, "eval")
        for train_source in list_sources(table, "train"):
            _check_disjoint(train_source, eval_source)


def _check_disjoint(train: DataSource, evaluation: DataSource) -> None:
    """Raise RecipeError if the held-out pairs come from the same rows as the training pairs."""
    if is_local_path(train.name) and is_local_path(evaluation.name):
        files = {file.resolve() for file in _data_files(train)}
        shared_files = [file for file in _data_files(evaluation) if file.resolve() in files]
        are_splits = len(shared_files) == 1 and train.split != evaluation.split and _may_hold_splits(shared_files[0])
        if shared_files and not (are_splits and read_data_file(shared_files[0], evaluation.split).has_splits):
            raise RecipeError(
                f"{display_path(shared_files[0])}: would give both the training and the held-out pairs; name two files "
                "that share no rows, in data.train and data.eval or by data.train_split and data.eval_split"
            )
    elif _dataset_key(train) == _dataset_key(evaluation) and _splits_overlap(train.split, evaluation.split):
        raise RecipeError(
            f'{train.name}: {train.split_key} is "{train.split}" and {evaluation.split_key} is "{evaluation.split}", '
            "so held-out pairs would be training pairs; name two splits that share no rows"
        )


def _may_hold_splits(path: Path) -> bool:
    """True for a file of JSON, which may be a dictionary of splits."""
    return path.name.lower().endswith((".json", ".json.gz")) and path_exists(path) and path.is_file()


def _no_splits_error(source: DataSource) -> RecipeError:
    return RecipeError(
        f'{source.split_key} is "{source.split}", but {display_path(Path(source.name))} is one file and has no '
        "splits; remove the key, or name a folder with one file per split"
    )


def _dataset_key(source: DataSource) -> tuple[str | None, ...]:
    return source.name, source.config, source.data_dir


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise read_error(error, display_path(path)) from error


def _data_files(source: DataSource) -> list[Path]:
    path = Path(source.name).expanduser()
    if is_glob(source.name) and not path.exists():
        # Path.glob takes relative patterns only, so the fixed folder in front is split off
        folder = next(parent for parent in path.parents if not is_glob(f"{parent}/"))
        files = sorted(
            file for file in folder.glob(str(path.relative_to(folder))) if file.is_file() and data_suffix(file)
        )
        if not files:
            endings = ", ".join(DATA_SUFFIXES)
            raise RecipeError(
                f"{display_path(path)}: no data file matches that; they end in {endings}; correct {source.key}"
            )
        return files
    return _split_files(path, source) if _is_folder(path) else [path]


def _splits_overlap(split: str, other: str) -> bool:
    """True if two splits certainly share rows: they are equal, or one is a slice (`train[:100]`) of the other."""
    return split == other or (
        split.partition("[")[0] == other.partition("[")[0] and not ("[" in split and "[" in other)
    )


def _split_files(folder: Path, source: DataSource) -> list[Path]:
    split = source.split
    try:
        files = sorted(
            file for file in folder.iterdir() if file.is_file() and data_suffix(file) and file.name[0] != "."
        )
    except OSError as error:
        raise read_error(error, display_path(folder)) from error
    if any(all((folder / name).is_file() for name in names) for names in SAVED_DATASET_NAMES):
        return _saved_dataset_files(folder, source)
    names = ", ".join(file.name for file in files[:8]) + (", ..." if len(files) > 8 else "")
    if not files:
        raise RecipeError(
            f"{display_path(folder)}: is a folder without data files; they end in {', '.join(DATA_SUFFIXES)}"
        )
    word = re.compile(rf"(?<![^\W_]){re.escape(split)}(?![^\W_])", re.IGNORECASE)
    split_files = [file for file in files if word.search(file.name.removesuffix(str(data_suffix(file))))]
    if not split_files:
        raise RecipeError(
            f'{display_path(folder)}: no file has the split\'s name "{split}" in its own; it has {names}; '
            f"set {source.split_key}, or name the file itself in {source.key}"
        )
    if len({re.sub(r"\d+", "#", file.name) for file in split_files}) > 1:
        candidates = ", ".join(file.name for file in split_files)
        raise RecipeError(
            f'{display_path(folder)}: it is not clear which files are the split "{split}": {candidates}; '
            f"leave one of them, or name the file itself in {source.key}"
        )
    return split_files


def _saved_dataset_files(folder: Path, source: DataSource) -> list[Path]:
    """The files of what `datasets` saved: of one data set, or of the split of several."""
    splits = saved_splits(folder)
    if splits is None:
        if source.split != source.default_split:
            raise RecipeError(
                f'{source.split_key} is "{source.split}", but {display_path(folder)} is one saved data set and has no '
                "splits; remove the key"
            )
        return saved_dataset_files(folder)
    if source.split not in splits:
        raise RecipeError(
            f'{display_path(folder)}: has no split "{source.split}"; it has {", ".join(splits)}; set {source.split_key}'
        )
    return saved_dataset_files(folder / source.split)


def _row_locator(parts: Sequence[FileRows] | Sequence[SourceRows]) -> Callable[[int], str]:
    """A function from a row number, counted from 1 over all parts, to its location."""

    def location(row: int) -> str:
        for part in parts:
            if row <= len(part.rows):
                return part.location(row)
            row -= len(part.rows)
        raise IndexError(row)

    return location
