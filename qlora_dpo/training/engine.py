"""Which engine trains a recipe: this project's own loop, or stock TRL. It is decided here and nowhere else."""

import math
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class EngineInputs:
    """What an engine trains with."""

    model: "PeftModel"
    """Trained in place."""
    context: "TrainContext"
    state: "TrainState"
    run_log: "RunLog"
    tokenizer: "PreTrainedTokenizerBase"
    resume_from: Path | None


@dataclass(frozen=True)
class TrainEngine:
    """An engine, and what the parts of a run before its first step need to know about it."""

    train: Callable[[EngineInputs], "TrainState"]
    """Returns the final state."""
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


def engine_of(recipe: Recipe) -> TrainEngine:
    """The engine that `train.engine` names."""
    match recipe.train.engine:
        case "qlora_dpo":
            return TrainEngine(_train_with_own_loop, is_trl=False)
        case "trl":
            return TrainEngine(_train_with_trl, is_trl=True)
        case never:
            assert_never(never)


def _train_with_own_loop(inputs: EngineInputs) -> "TrainState":
    from qlora_dpo.training.loop import train_loop

    return train_loop(inputs.model, inputs.context, inputs.state, inputs.run_log, inputs.resume_from)


def _train_with_trl(inputs: EngineInputs) -> "TrainState":
    from qlora_dpo.training.trl_engine import train_with_trl

    if inputs.resume_from is not None or inputs.context.deadline < math.inf:
        option = "--max-hours" if inputs.resume_from is None else "--resume"
        raise RecipeError(f'{option} needs train.engine = "qlora_dpo"; TRL\'s checkpoints are pickled')
    return train_with_trl(inputs.model, inputs.context, inputs.state, inputs.run_log, inputs.tokenizer)
