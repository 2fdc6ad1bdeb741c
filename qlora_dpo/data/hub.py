"""Data sets of the Hugging Face hub: downloaded once, then read from the cache, with or without the hub."""

import errno
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from qlora_dpo.data.files import Row, arrow_rows, log_once
from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.data.reading.arrow_tables import checked_table
from qlora_dpo.errors import DataError, QloraDpoError, RecipeError, SourceError
from qlora_dpo.files import atomic_write, cache_home

DATASET_INFO_TIMEOUT = 10.0
"""Seconds to wait for the hub to name the commit of a revision."""


def read_hub_dataset(
    name: str, split: str, revision: str | None, config: str | None = None, data_dir: str | None = None
) -> tuple[LazySequence[Row], str]:
    """Return every row of one split of a hub data set, and its commit; `split` may be a slice (`train[:5000]`).

    The hub resolves `revision` to a commit in one request without retries. Nothing is downloaded if that commit is in
    the cache, or if the hub does not answer and the cache knows the commit; a full commit hash needs no request. No
    code of the repository is run. Raises RecipeError for a name, revision or split that does not exist, SourceError if
    the hub or the disk fails, and DataError for content that cannot be read.
    """
    commit = revision if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else None
    if commit is None or _cached_folder(name, commit, config, data_dir) is None:
        commit = _resolve_commit(name, revision, config, data_dir)
    with _explain_errors(name, split):
        folder = _cached_folder(name, commit, config, data_dir)
        if folder is not None:
            table: Any = _open_cached(name, folder).as_dataset(split=split)
        else:
            if not sys.stderr.isatty():
                datasets.disable_progress_bars()
            path = f"hf://datasets/{name}"
            table = datasets.load_dataset(path, config, data_dir=data_dir, split=split, revision=revision or "main")
            if table.cache_files:
                cached_folder = Path(table.cache_files[0]["filename"]).parent
                with suppress(SourceError):  # without the note, the next run asks the hub again
                    atomic_write(_cache_note_path(name, commit, config, data_dir), str(cached_folder))
        checked, notes = checked_table(f"{name}, split {split}", table.data.table)
    for note in notes:
        log_once(note)
    return arrow_rows(checked), commit


def _resolve_commit(name: str, revision: str | None, config: str | None, data_dir: str | None) -> str:
    """The commit of `revision` (default: the main branch), or the last known one if the hub cannot be reached."""
    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=DATASET_INFO_TIMEOUT).sha)
    except HFValidationError as error:
        raise RecipeError(
            f"{name}: is no name of a hub data set (OWNER/NAME); a local path starts with ./ or ends in .jsonl, "
            ".json, .csv or .parquet"
        ) from error
    except GatedRepoError as error:
        raise RecipeError(
            f"{name}: is a gated data set; accept its terms on its hub page and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise RecipeError(f'{name}: has no revision "{revision}"; correct or remove data.revision') from error
    except RepositoryNotFoundError as error:
        raise RecipeError(
            f"{name}: there is no such data set on the hub, or it is private; correct the name, log in with "
            "`hf auth login`, or write ./ before a local path"
        ) from error
    except Exception as error:  # offline, refused, timed out, hub or proxy errors: each has its own class
        commit = _last_known_commit(name, revision)
        if commit is not None and _cached_folder(name, commit, config, data_dir) is not None:
            return commit
        if isinstance(error, HfHubHTTPError):
            raise SourceError(
                f"{name}: the hub answered with an error ({error.response.status_code}); try later"
            ) from error
        which = f'revision "{revision}"' if revision else "it"
        raise SourceError(
            f"{name}: the hub cannot be reached, and {which} is not in the cache; connect this machine to the "
            "network once, or name a local file in the recipe"
        ) from error


def _last_known_commit(name: str, revision: str | None) -> str | None:
    """The commit of a branch or tag at its last download; a commit hash is returned unchanged."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset")
    reference = home / "refs" / (revision or "main")
    return reference.read_text().strip() if reference.is_file() else None


def _cached_folder(name: str, commit: str, config: str | None, data_dir: str | None) -> Path | None:
    """The folder in which `datasets` has cached that commit, if any.

    A note in our own cache names the folder, since the folder's name contains neither `data_dir` nor the configuration
    that is read when none is named. Without a note it is the folder of `config`, or of the default configuration.
    """
    note = _cache_note_path(name, commit, config, data_dir)
    if note.is_file():
        folder = Path(note.read_text(encoding="utf-8"))
        return folder if (folder / "dataset_info.json").is_file() else None
    if data_dir is not None:
        return None
    owner, _, short = name.rpartition("/")
    home = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    stem = "___".join(filter(None, (owner, datasets.naming.camelcase_to_snakecase(short))))
    folders = [info.parent for info in home.glob(f"{stem}/{config or 'default'}/*/{commit}/dataset_info.json")]
    return folders[0] if len(folders) == 1 else None


def _cache_note_path(name: str, commit: str, config: str | None, data_dir: str | None) -> Path:
    key = sha256(json.dumps([name, commit, config, data_dir]).encode()).hexdigest()[:32]
    return cache_home() / "hub" / key


def _open_cached(name: str, folder: Path) -> Any:
    configuration, version, commit = folder.parts[-3:]
    return Cache(
        repo_id=name, dataset_name=name.rpartition("/")[2], config_name=configuration, version=version, hash=commit
    )


@contextmanager
def _explain_errors(name: str, split: str) -> Iterator[None]:
    """Turn errors of `datasets` into errors of this project, each one sentence."""
    try:
        yield
    except QloraDpoError:
        raise
    except Exception as error:
        raise explain_dataset_error(error, name, split) from error


def explain_dataset_error(error: Exception, name: str, split: str) -> QloraDpoError:
    """The error of this project for an error of `datasets`."""
    causes = list(_exception_chain(error))
    text = " ".join(str(error).split())
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return SourceError(
            f"{name}: the disk is full; free space in {datasets.config.HF_DATASETS_CACHE}, "
            "or set HF_HOME to a folder on a larger disk"
        )
    if text.startswith("Unknown split"):
        splits = ", ".join(re.findall(r"'([^']+)'", text.partition("Should be one of")[2]))
        return RecipeError(f'{name}: has no split "{split}"; it has {splits}; set data.train_split or data.eval_split')
    if text.startswith("BuilderConfig") and "not found" in text:
        return RecipeError(f"{name}: has no such configuration; it has {_configurations(text)}; correct data.config")
    if text.startswith("Config name is missing"):
        return RecipeError(
            f"{name}: holds several configurations; name one of them in data.config: {_configurations(text)}"
        )
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in text:
        return DataError(f"{name}: needs Python code of its own to be read, and code from a data set is never run")
    if isinstance(error, DataFilesNotFoundError | EmptyDatasetError | EntryNotFoundError):
        return DataError(f"{name}: holds no data files that can be read")
    if isinstance(error, DatasetGenerationError):
        return DataError(f"{name}: its files cannot be read: {' '.join(str(causes[-1]).split())[:200]}")
    if isinstance(error, OSError) or any(isinstance(cause, OSError) for cause in causes):
        return SourceError(f"{name}: the download failed; try again, and check the network and the disk: {text[:200]}")
    return DataError(f"{name}: cannot be read: {text[:200]}")


def _configurations(text: str) -> str:
    """The configurations that an error of `datasets` lists."""
    names = re.findall(r"'([^']+)'", text.partition("[")[2].partition("]")[0])
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "its hub page lists them"


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
