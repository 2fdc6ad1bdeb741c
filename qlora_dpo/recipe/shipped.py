"""The shipped recipes: their folders, their names, and what each is for."""

from collections.abc import Iterator
from pathlib import Path


def recipe_folders() -> Iterator[Path]:
    """Where shipped recipes can be: beside the package in a checkout, inside it when installed from a wheel."""
    package = Path(__file__).parents[1]
    yield package.parent / "recipes"
    yield package / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """The file of every shipped recipe, sorted by name."""
    files = {file.stem: file for home in reversed(list(recipe_folders())) for file in home.glob("*.toml")}
    return dict(sorted(files.items()))


def accelerate_configs() -> list[Path]:
    """The config files for `accelerate launch`, as docs/many-gpus.md shows them."""
    return sorted(file for home in recipe_folders() for file in home.glob("accelerate/*.yaml"))


def recipe_purpose(file: Path) -> str:
    """What a shipped recipe is for: its first comment line."""
    with file.open(encoding="utf-8") as lines:
        return lines.readline().removeprefix("#").strip()
