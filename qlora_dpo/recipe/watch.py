"""The recipe's table of the signs of trouble that a run looks for."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_dpo.recipe.tables import PositiveFloat, RecipeTable

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
Fraction = Annotated[float, Field(gt=0, le=1)]


class WatchTable(RecipeTable):
    """Signs of trouble. A run looks for all of them at every evaluation, tells each once and keeps it in its report."""

    stop: list[WarningName] = Field(default=[])
    """Signs that end the run: `eval_loss_rises` (while the training loss falls), `likelihood_displacement`, `kl`,
    `accuracy_in_noise` (of a coin or of the answers' length, in the second half of the run), `length_correlation`,
    `vanishing_gradient`, `stuck` (at the first loss), `skipped_steps` (fp16). The adapter is written as it is then, and
    the command ends with exit code 3."""
    displacement_nats: PositiveFloat = 0.25
    """Nats per token that the chosen answers may lose since step 0 while the margin grows."""
    kl_nats: PositiveFloat = 0.5
    """Nats per token that the policy may be away from the base on chosen answers (KL divergence)."""
    length_correlation: Fraction = 0.8
    """Correlation, positive or negative, that margins may have with how much longer the chosen answers are."""
    vanishing_share: Fraction = 0.5
    """Share of the pairs since the last evaluation whose gradient may be less than a twentieth of the first step's."""
    skipped_share: Fraction = 0.1
    """Share of the steps whose scaled gradients may overflow in fp16."""
