"""The optional packages that a recipe needs, looked up before anything heavy is loaded."""

from collections.abc import Iterator
from importlib.util import find_spec

from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe import Recipe


def check_extras(recipe: Recipe) -> None:
    """Raise RecipeError, with the command to install it, if an optional package is missing."""
    for key, package, extra in _required_extras(recipe):
        if find_spec(package) is None:
            raise RecipeError(
                f"{key} needs the package {package}, which is not installed; install it with: pip install "
                f"'qlora_dpo[{extra}]'"
            )


def _required_extras(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """The recipe's key, the package that it needs, and the extra of this project that installs it."""
    track = recipe.track
    if recipe.train.optim == "schedule_free_adamw":
        yield 'train.optim = "schedule_free_adamw"', "schedulefree", "schedule-free"
    if track is not None and track.tensorboard:
        yield "track.tensorboard", "tensorboard", "tensorboard"
    if track is not None and track.trackio is not None:
        yield "track.trackio", "trackio", "trackio"
