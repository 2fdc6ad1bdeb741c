"""Everything that decides a run: the tables of a recipe, its reader, and the error messages for a wrong recipe."""

from qlora_dpo.recipe.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
