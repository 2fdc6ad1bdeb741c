"""What every table of a recipe is, and the kinds of its values."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

DATA_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]


class Table(BaseModel):
    """A recipe table: frozen, strictly typed, and without room for keys that nothing reads."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def is_local(name: str) -> bool:
    """True if `name` is a path rather than a hub name: it starts with /, ./, ../ or ~, or has a data file's ending."""
    return name in (".", "..") or name.startswith(("/", "./", "../", "~")) or name.endswith(DATA_ENDINGS)


def is_pattern(name: str) -> bool:
    """True if `name` is a local path with `*`, `?` or `[...]`, which stands for all files that match."""
    return is_local(name) and any(letter in name for letter in "*?[")
