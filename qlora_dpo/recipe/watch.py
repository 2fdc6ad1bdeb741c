"""The table [watch]: the signs of trouble that end a run."""

from typing import Literal

from pydantic import Field

from qlora_dpo.recipe.tables import RecipeTable

WarningName = Literal[
    "eval_loss_rises",
    "likelihood_displacement",
    "kl",
    "accuracy_in_noise",
    "length_correlation",
    "vanishing_gradient",
    "stuck",
    "skipped_steps",
]


class WatchTable(RecipeTable):
    """Signs of trouble. A run checks all of them at every evaluation, reports each once and lists it in its report."""

    stop: list[WarningName] = Field(default=[])
    """The signs that end the run: `eval_loss_rises` (while the training loss falls), `likelihood_displacement`, `kl`,
    `accuracy_in_noise` (no better than a coin or the completions' length, in the second half of the run),
    `length_correlation`, `vanishing_gradient`, `stuck` (at the initial loss), `skipped_steps` (fp16). The adapter is
    then written as it is, and the command exits with code 3."""
