"""Which engine trains a recipe: this project's own loop, or stock TRL. It is decided here and nowhere else."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe import Recipe

if TYPE_CHECKING:  # so that a plan is printed before torch is imported
    from peft import PeftModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from qlora_dpo.tracking.run_log import RunLog
    from qlora_dpo.training.checkpoint.state import TrainState
    from qlora_dpo.training.context import TrainContext


TrainFn = Callable[["PeftModel", "TrainContext", "TrainState", "RunLog", "Path | None"], "TrainState"]
"""Trains a model in place, from a checkpoint if one is given, and returns the final state."""


@dataclass(frozen=True)
class TrainEngine:
    """What the parts of a run before its first step need to know about the engine, and the engine itself."""

    is_trl: bool
    """TRL computes with PEFT's own layers, its own batches and a reference of its own in every step. So nothing is
    fused, no rows or dense weights are planned, no reference is kept for it, and it trains in one process."""

    def check_objective(self, recipe: Recipe) -> None:
        """Raise RecipeError for an objective that the engine does not have."""
        if self.is_trl:
            from qlora_dpo.training.trl_engine import check_trl_supports  # TRL takes seconds to import

            check_trl_supports(recipe.objective)

    def check_world_size(self, world_size: int) -> None:
        """Raise RecipeError for more processes than the engine trains in."""
        if self.is_trl and world_size > 1:
            raise RecipeError('several processes need train.engine = "qlora_dpo"; run TRL in one')

    def train_fn(self, tokenizer: "PreTrainedTokenizerBase") -> TrainFn:
        """The function that trains; TRL wants the tokenizer."""
        if self.is_trl:
            from qlora_dpo.training.trl_engine import train_with_trl

            return partial(train_with_trl, tokenizer=tokenizer)
        from qlora_dpo.training.loop import train_loop

        return train_loop


def engine_of(recipe: Recipe) -> TrainEngine:
    """The engine that `train.engine` names."""
    match recipe.train.engine:
        case "qlora_dpo":
            return TrainEngine(is_trl=False)
        case "trl":
            return TrainEngine(is_trl=True)
        case never:
            assert_never(never)
