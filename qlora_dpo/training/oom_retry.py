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

from qlora_dpo.errors import REDUCE_MEMORY_ADVICE, DoesNotFitError, is_out_of_memory
from qlora_dpo.model.decoder_layers import checkpointable_layers, set_gradient_checkpointing
from qlora_dpo.model.distributed import processes
from qlora_dpo.recipe.train import TrainTable
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states
from qlora_dpo.training.checkpoint.save import TrainState
from qlora_dpo.training.train_step import StepAborted

if TYPE_CHECKING:
    from qlora_dpo.training.loop import TrainContext
    from qlora_dpo.training.reference_pass import PreparedModel

MAX_HALVINGS = 3
"""How often in a row the rows of one step or evaluation are halved before the run ends."""

_Result = TypeVar("_Result")
_HasPacking = TypeVar("_HasPacking", "TrainContext", "PreparedModel")
"""What has the `packing` of the rows: a run's job, or the model of a reference pass."""


def with_row_tokens(inputs: _HasPacking, state: TrainState) -> _HasPacking:
    """`job` with rows of the size that has been found to fit."""
    if state.row_tokens is None:
        return inputs
    return replace(inputs, packing=replace(inputs.packing, token_budget=state.row_tokens))


def retry_with_smaller_rows(
    description: str,
    work: Callable[[_HasPacking], _Result],
    inputs: _HasPacking,
    state: TrainState,
    log: Callable[[str], None],
    undo: Callable[[], None] = lambda: None,
    last_resort: Callable[[], str] = lambda: "",
) -> _Result:
    """Do `work`, and again in smaller rows, and say so, each time that memory runs out; returns its result.

    Of several processes all do so again if memory runs out in one, but where weights are sharded the run ends.

    `undo` takes back what half a `work` has done beyond `state`, which is put back here, as are the generators.
    `resort` saves memory in another way before the last try, and says how. Raises DoesNotFitError if that runs out of
    memory too, and Left, with all put back, if `work` does in one of the processes.
    """
    before, counted = get_rng_states(), _snapshot_counters(state)
    for times in range(1, MAX_HALVINGS + 2):
        here, failed, left = with_row_tokens(inputs, state), False, False
        tokens = here.packing.token_budget
        try:
            result = work(here)
        except StepAborted:
            left = True
        except (RuntimeError, MemoryError) as error:
            if processes.is_sharded():
                raise _with_description(description, processes.sharded_run_error(error)) from error
            if not is_out_of_memory(error):
                raise
            failed = True
        # out of the handler, since the error holds the frames, and with them all tensors
        failures, leaves = processes.all_reduce_sum([failed, left])
        if not failures + leaves:
            return result
        undo()
        set_rng_states(before)
        vars(state).update(_copy_values(counted))
        if leaves:
            raise StepAborted
        _free_memory()
        state.row_tokens = rows = max(1, tokens // 2)
        if times <= MAX_HALVINGS:
            also = last_resort() if times == MAX_HALVINGS else ""
            log(f"{description}: out of memory with rows of {tokens:,} tokens; rows of {rows:,} from here on{also}")
    raise DoesNotFitError(f"{description}: out of memory {MAX_HALVINGS + 1} times in a row; {REDUCE_MEMORY_ADVICE}")


def enable_gradient_checkpointing(model: nn.Module, table: TrainTable) -> str:
    """Recompute the activations of all layers from here on, if the recipe leaves that to memory; says so if it is new.

    The activations of a pair that is longer than a row shrink by nothing else.
    """
    layers = checkpointable_layers(model)
    if table.gradient_checkpointing != "auto" or all(layer.gradient_checkpointing for layer in layers):
        return ""
    set_gradient_checkpointing(model, len(layers))
    return ", and all layers recomputed"


def _with_description(description: str, error: Exception) -> Exception:
    return DoesNotFitError(f"{description}: {error}") if isinstance(error, DoesNotFitError) else error


def _snapshot_counters(state: TrainState) -> dict[str, object]:
    return _copy_values(
        {name: getattr(state, name) for name in ("num_tokens", "margin_mean", "first_slope", "since_eval")}
    )


def _copy_values(values: dict[str, object]) -> dict[str, object]:
    return {name: copy.copy(value) for name, value in values.items()}


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
