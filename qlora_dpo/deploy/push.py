"""Pushes files to a repository on a hub in one commit; a repeated push does not send files again that have arrived."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from qlora_dpo.deploy.hub_files import HubFile
from qlora_dpo.errors import RecipeError, SourceError

REPO_ID_PATTERN = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
RETRY_HINT = "run the same command again: files that have arrived are not sent twice"


def check_repo_id(repository: str) -> None:
    """Raise RecipeError if `repository` is not of the form OWNER/NAME."""
    if not REPO_ID_PATTERN.fullmatch(repository):
        raise RecipeError(f"{repository}: is no name of a repository; write OWNER/NAME, such as me/hh-adapter")


def push_files(files: Sequence[HubFile], repository: str, message: str, *, private: bool) -> str:
    """Create `repository` if it is missing, commit `files` to it, and return the commit's address.

    All files appear at once or none does. Raises RecipeError if the repository exists and is public although `private`
    is set, SourceError if the hub refuses or cannot be reached.
    """
    api = HfApi()
    with _hub_errors(repository):
        if not _exists(api, repository, private=private):
            api.create_repo(repository, private=private)
        operations = [
            CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
            for file in files
        ]
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)


def _exists(api: HfApi, repository: str, *, private: bool) -> bool:
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return False
    if private and not info.private:
        raise RecipeError(f"{repository}: is there already and everybody can read it; say --public if that is meant")
    return True


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn errors of the hub or the connection into RecipeError or SourceError with a sentence."""
    try:
        yield
    except HFValidationError as error:
        raise RecipeError(f"{repository}: is no name of a repository; write OWNER/NAME") from error
    except LocalTokenNotFoundError as error:
        raise SourceError(f"{repository}: nobody is logged in; log in with `hf auth login`") from error
    except OfflineModeIsEnabled as error:
        raise SourceError(f"{repository}: HF_HUB_OFFLINE is set, so nothing is sent; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        remedy = (
            "log in with `hf auth login`, with a token that may write there" if status in (401, 403) else RETRY_HINT
        )
        raise SourceError(f"{repository}: the hub answered with an error ({status}); {remedy}") from error
    except RecipeError:
        raise
    except Exception as error:  # connections end in many ways, and each client library has its own class for them
        if isinstance(error, OSError) and isinstance(error.filename, str) and Path(error.filename).exists():
            raise
        uploading = isinstance(error, RuntimeError) and str(error).startswith("Error while uploading")
        if not uploading and not isinstance(error, OSError) and "http" not in type(error).__module__:
            raise
        raise SourceError(f"{repository}: the hub cannot be reached or the connection ended; {RETRY_HINT}") from error
