"""The base class of every table of a recipe, and the types of its values."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

DATA_SUFFIXES = (
    *(".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz"),
    *(".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".arrow"),
)
SAVED_DATASET_NAMES = (("state.json", "dataset_info.json"), ("dataset_dict.json",))
"""What `save_to_disk` of `datasets` leaves beside the files of one data set, and beside folders of splits."""

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
NonEmptyStr = Annotated[str, Field(min_length=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


class RecipeTable(BaseModel):
    """A table of a recipe: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def has_data_suffix(name: str) -> bool:
    """True if `name` ends as a data file does, in small or capital letters."""
    return name.lower().endswith(DATA_SUFFIXES)


def is_local_path(name: str) -> bool:
    """True if `name` is a path and not a hub name: it starts with /, ./, ../ or ~, or has a data file's suffix."""
    return name in (".", "..") or name.startswith(("/", "./", "../", "~")) or has_data_suffix(name)


def is_glob(name: str) -> bool:
    """True if `name` is a local path with `*`, `?` or `[...]`, a pattern for several files.

    These letters in the name of a file or folder that exists are letters.
    """
    if not is_local_path(name) or not any(letter in name for letter in "*?["):
        return False
    path = Path(name)
    with suppress(RuntimeError):  # the home folder of nobody
        path = path.expanduser()
    existing = next((place for place in (path, *path.parents) if _exists(place)), Path())
    return any(letter in part for part in path.parts[len(existing.parts) :] for letter in "*?[")


def _exists(path: Path) -> bool:
    """`qlora_dpo.files.path_exists`, which the tables of a recipe may not import."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_saved_dataset(name: str) -> bool:
    """True if `name` is a local folder that `datasets` wrote with `save_to_disk`, of one data set without splits."""
    path = Path(name)
    with suppress(RuntimeError):
        path = path.expanduser()
    return is_local_path(name) and all(_exists(path / file) for file in SAVED_DATASET_NAMES[0])
