"""Does again what did not fit in memory, in rows of half as many tokens: the same pairs, and the same result.

A step is redone as if it had not begun: gradients, random generators and what was counted go back to where they were.
"""

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from qlora_dpo.errors import LESS_MEMORY, DoesNotFitError, is_out_of_memory
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.memory import checkpoint, checkpointable
from qlora_dpo.recipe.train import TrainTable
from qlora_dpo.training.checkpoint.rng_state import random_states, restore
from qlora_dpo.training.checkpoint.save import State
from qlora_dpo.training.train_step import Left

if TYPE_CHECKING:
    from qlora_dpo.training.loop import Job
    from qlora_dpo.training.reference_pass import Model

HALVINGS = 3
"""How often in a row the rows of one step or evaluation are halved before the run ends."""

Result = TypeVar("Result")
Rowed = TypeVar("Rowed", "Job", "Model")
"""What has the `packing` of the rows: a run's job, or the model of a reference pass."""


def fitted(job: Rowed, state: State) -> Rowed:
    """`job` with rows of the size that has been found to fit."""
    if state.row_tokens is None:
        return job
    return replace(job, packing=replace(job.packing, token_budget=state.row_tokens))


def as_it_fits(
    what: str,
    work: Callable[[Rowed], Result],
    job: Rowed,
    state: State,
    say: Callable[[str], None],
    undo: Callable[[], None] = lambda: None,
    resort: Callable[[], str] = lambda: "",
) -> Result:
    """Do `work`, and again in smaller rows, and say so, each time that memory runs out; returns its result.

    Of several processes all do so again if memory runs out in one, but where weights are sharded the run ends.

    `undo` takes back what half a `work` has done beyond `state`, which is put back here, as are the generators.
    `resort` saves memory in another way before the last try, and says how. Raises DoesNotFitError if that runs out of
    memory too, and Left, with all put back, if `work` does in one of the processes.
    """
    before, counted = random_states(), _counted(state)
    for times in range(1, HALVINGS + 2):
        here, failed, left = fitted(job, state), False, False
        tokens = here.packing.token_budget
        try:
            result = work(here)
        except Left:
            left = True
        except (RuntimeError, MemoryError) as error:
            if processes.sharded():
                raise _named(what, processes.why_sharded_work_ends(error)) from error
            if not is_out_of_memory(error):
                raise
            failed = True
        # out of the handler, since the error holds the frames, and with them all tensors
        failures, leaves = processes.total([failed, left])
        if not failures + leaves:
            return result
        undo()
        restore(before)
        vars(state).update(_copied(counted))
        if leaves:
            raise Left
        _free()
        state.row_tokens = rows = max(1, tokens // 2)
        if times <= HALVINGS:
            also = resort() if times == HALVINGS else ""
            say(f"{what}: out of memory with rows of {tokens:,} tokens; rows of {rows:,} from here on{also}")
    raise DoesNotFitError(f"{what}: out of memory {HALVINGS + 1} times in a row; {LESS_MEMORY}")


def recompute_all(model: nn.Module, table: TrainTable) -> str:
    """Recompute the activations of all layers from here on, if the recipe leaves that to memory; says so if it is new.

    The activations of a pair that is longer than a row shrink by nothing else.
    """
    layers = checkpointable(model)
    if table.gradient_checkpointing != "auto" or all(layer.gradient_checkpointing for layer in layers):
        return ""
    checkpoint(model, len(layers))
    return ", and all layers recomputed"


def _named(what: str, error: Exception) -> Exception:
    return DoesNotFitError(f"{what}: {error}") if isinstance(error, DoesNotFitError) else error


def _counted(state: State) -> dict[str, object]:
    return _copied({name: getattr(state, name) for name in ("num_tokens", "margin_mean", "first_slope", "since_eval")})


def _copied(values: dict[str, object]) -> dict[str, object]:
    return {name: copy.copy(value) for name, value in values.items()}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
