"""Everything that decides a run: the tables of a recipe, its reader, and the error messages for a wrong recipe."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_dpo.recipe.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]


def __getattr__(name: str) -> Any:
    """Import the tables when they are first used: `--help` names the shipped recipes and needs no pydantic (0.2 s)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qlora_dpo.recipe import recipe

    return getattr(recipe, name)
