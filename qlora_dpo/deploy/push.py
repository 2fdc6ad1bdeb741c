"""Sends files to a repository on a hub in one commit; what a broken attempt has sent is not sent again."""

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

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
AGAIN = "run the same command again: files that have arrived are not sent twice"


def check_repo_id(repository: str) -> None:
    """Raise RecipeError if `repository` is no name on a hub."""
    if not REPOSITORY.fullmatch(repository):
        raise RecipeError(f"{repository}: is no name of a repository; write OWNER/NAME, such as me/hh-adapter")


def push_files(pieces: Sequence[HubFile], repository: str, message: str, *, private: bool) -> str:
    """Create `repository` if it is missing, commit `pieces` to it, and return the commit's address.

    All files appear at once or none does. Raises RecipeError if the repository is there and public, and that was not
    asked for; SourceError if the hub refuses or cannot be reached.
    """
    api = HfApi()
    with _hub_errors(repository):
        if not _exists(api, repository, private=private):
            api.create_repo(repository, private=private)
        operations = [
            CommitOperationAdd(piece.name, piece.content if isinstance(piece.content, bytes) else str(piece.content))
            for piece in pieces
        ]
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)


def _exists(api: HfApi, repository: str, *, private: bool) -> bool:
    try:
        found = api.model_info(repository)
    except RepositoryNotFoundError:
        return False
    if private and not found.private:
        raise RecipeError(f"{repository}: is there already and everybody can read it; say --public if that is meant")
    return True


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn what a hub or the way to it can do into a sentence."""
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
        remedy = "log in with `hf auth login`, with a token that may write there" if status in (401, 403) else AGAIN
        raise SourceError(f"{repository}: the hub answered with an error ({status}); {remedy}") from error
    except RecipeError:
        raise
    except Exception as error:  # connections end in many ways, and each client library has its own class for them
        if isinstance(error, OSError) and isinstance(error.filename, str) and Path(error.filename).exists():
            raise
        uploading = isinstance(error, RuntimeError) and str(error).startswith("Error while uploading")
        if not uploading and not isinstance(error, OSError) and "http" not in type(error).__module__:
            raise
        raise SourceError(f"{repository}: the hub cannot be reached or the connection ended; {AGAIN}") from error
