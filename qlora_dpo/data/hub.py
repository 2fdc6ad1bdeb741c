"""Data sets of the Hugging Face hub: downloaded once, read from the cache afterwards, also when the hub is away."""

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

from qlora_dpo.data.files import Row, arrow_rows
from qlora_dpo.data.lazy_sequence import LazySequence
from qlora_dpo.errors import DataError, QloraDpoError, RecipeError, SourceError
from qlora_dpo.files import atomic_write, cache_home

DATASET_INFO_TIMEOUT = 10.0


def read_hub_dataset(
    name: str, split: str, revision: str | None, config: str | None = None, data_dir: str | None = None
) -> tuple[LazySequence[Row], str]:
    """Return every row of one split of a hub data set, and its commit; `split` may be a slice (`train[:5000]`).

    The hub is asked once, without retries, which commit `revision` is. If that commit is in the cache, or the hub
    does not answer and the cache knows the commit, nothing is downloaded; a full commit hash is not even asked for.
    No code of the repository is run. Raises RecipeError for a name, revision or split that does not exist,
    SourceError for a hub or disk that does not do its part, DataError for content that cannot be read.
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
            where = f"hf://datasets/{name}"
            table = datasets.load_dataset(where, config, data_dir=data_dir, split=split, revision=revision or "main")
            if table.cache_files:
                kept = Path(table.cache_files[0]["filename"]).parent
                with suppress(SourceError):  # a note that cannot be written costs the next run a question to the hub
                    atomic_write(_cache_note_path(name, commit, config, data_dir), str(kept))
        return arrow_rows(table.data.table), commit


def _resolve_commit(name: str, revision: str | None, config: str | None, data_dir: str | None) -> str:
    """The commit that `revision` (the main branch if None) is now, or was when the hub was last reached."""
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
    except Exception as error:  # offline mode, refused, timeout, a hub or proxy in trouble: each has its own class
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
    """The commit that a branch or tag was when it was last downloaded; a commit hash is itself."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset")
    reference = home / "refs" / (revision or "main")
    return reference.read_text().strip() if reference.is_file() else None


def _cached_folder(name: str, commit: str, config: str | None, data_dir: str | None) -> Path | None:
    """The folder in which `datasets` keeps that commit, if it is there.

    A note of ours remembers where what was read lies, since a folder's name tells neither a `data_dir` nor which
    configuration is read where none is named. Without a note it is the folder of `config`, or of the default one.
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
    found = [each.parent for each in home.glob(f"{stem}/{config or 'default'}/*/{commit}/dataset_info.json")]
    return found[0] if len(found) == 1 else None


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
    """Turn what `datasets` raises while it downloads and reads into one sentence of the right class."""
    try:
        yield
    except QloraDpoError:
        raise
    except Exception as error:
        raise explain_dataset_error(error, name, split) from error


def explain_dataset_error(error: Exception, name: str, split: str) -> QloraDpoError:
    """The error of this project that says what an error of `datasets` means to the user."""
    causes = list(_exception_chain(error))
    text = " ".join(str(error).split())
    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in causes):
        return SourceError(
            f"{name}: the disk is full; free space in {datasets.config.HF_DATASETS_CACHE}, "
            "or set HF_HOME to a folder on a larger disk"
        )
    if text.startswith("Unknown split"):
        found = ", ".join(re.findall(r"'([^']+)'", text.partition("Should be one of")[2]))
        return RecipeError(f'{name}: has no split "{split}"; it has {found}; set data.train_split or data.eval_split')
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
    if isinstance(error, OSError) or any(isinstance(each, OSError) for each in causes):
        return SourceError(f"{name}: the download failed; try again, and check the network and the disk: {text[:200]}")
    return DataError(f"{name}: cannot be read: {text[:200]}")


def _configurations(text: str) -> str:
    """The configurations that an error of `datasets` lists."""
    found = re.findall(r"'([^']+)'", text.partition("[")[2].partition("]")[0])
    return ", ".join(found[:12]) + (", ..." if len(found) > 12 else "") if found else "its hub page lists them"


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
