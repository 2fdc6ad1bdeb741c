"""The recipe's table of the signs of trouble that a run looks for."""

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
    """Signs of trouble. A run looks for all of them at every evaluation, tells each once and keeps it in its report."""

    stop: list[WarningName] = Field(default=[])
    """Signs that end the run: `eval_loss_rises` (while the training loss falls), `likelihood_displacement`, `kl`,
    `accuracy_in_noise` (of a coin or of the answers' length, in the second half of the run), `length_correlation`,
    `vanishing_gradient`, `stuck` (at the first loss), `skipped_steps` (fp16). The adapter is written as it is then, and
    the command ends with exit code 3."""
