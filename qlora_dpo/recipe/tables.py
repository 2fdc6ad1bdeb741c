"""The base class of every table of a recipe, and the types of its values."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")

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


def is_local_path(name: str) -> bool:
    """True if `name` is a path and not a hub name: it starts with /, ./, ../ or ~, or has a data file's suffix."""
    return name in (".", "..") or name.startswith(("/", "./", "../", "~")) or name.endswith(DATA_SUFFIXES)


def is_glob(name: str) -> bool:
    """True if `name` is a local path with `*`, `?` or `[...]`: a pattern for several files."""
    return is_local_path(name) and any(letter in name for letter in "*?[")
