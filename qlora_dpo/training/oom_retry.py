"""Retries what ran out of memory with half the tokens per row; the result is the same."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import nn

from qlora_dpo.errors import REDUCE_MEMORY_ADVICE, DoesNotFitError, is_out_of_memory
from qlora_dpo.model.decoder_layers import checkpointable_layers, set_gradient_checkpointing
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.memory import free_cached_memory
from qlora_dpo.preference.pack import Packing
from qlora_dpo.recipe.train import TrainTable
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states
from qlora_dpo.training.context import StepAborted

logger = logging.getLogger(__name__)

MAX_HALVINGS = 3
"""How often in a row the rows of one step or evaluation are halved before the run ends."""

Result = TypeVar("Result")


def retry_with_smaller_rows(
    what: str,
    work: Callable[[Packing], Result],
    packing: Packing,
    before_last_try: Callable[[], str] = lambda: "",
) -> tuple[Result, Packing]:
    """Call `work` with `packing`, and with half the tokens per row after each out-of-memory error.

    Returns its result and the packing that fitted. A failed call leaves nothing behind: `work` changes nothing but
    gradients, which it begins anew, and the random state is restored here. If memory runs out on one rank, all ranks
    retry; with sharded weights the run ends instead. `before_last_try` saves memory in another way and returns how.
    Raises DoesNotFitError if the last try runs out of memory as well, and StepAborted on all ranks if `work` raises it
    on one.
    """
    rng = get_rng_states()
    for attempt in range(1, MAX_HALVINGS + 2):
        result, out_of_memory, aborted = _attempt(what, work, packing)
        failures, aborts = processes.all_reduce_sum([out_of_memory, aborted])
        if not failures + aborts:
            return result, packing  # type: ignore[return-value]
        set_rng_states(rng)
        if aborts:
            raise StepAborted
        free_cached_memory()
        tokens = packing.token_budget
        packing = replace(packing, token_budget=max(1, tokens // 2))
        if attempt <= MAX_HALVINGS:
            also = before_last_try() if attempt == MAX_HALVINGS else ""
            logger.info(
                f"{what}: out of memory with rows of {tokens:,} tokens; rows of {packing.token_budget:,} from here "
                f"on{also}"
            )
    raise DoesNotFitError(f"{what}: out of memory {MAX_HALVINGS + 1} times in a row; {REDUCE_MEMORY_ADVICE}")


def _attempt(what: str, work: Callable[[Packing], Result], packing: Packing) -> tuple[Result | None, bool, bool]:
    """The result of `work`, whether memory ran out, and whether the step was aborted.

    Returns instead of raising, since an exception holds its frames, and with them all their tensors.
    """
    try:
        return work(packing), False, False
    except StepAborted:
        return None, False, True
    except (RuntimeError, MemoryError) as error:
        if processes.is_sharded():
            raise _with_context(what, processes.sharded_run_error(error)) from error
        if not is_out_of_memory(error):
            raise
        return None, True, False


def enable_gradient_checkpointing(model: nn.Module, table: TrainTable) -> str:
    """Checkpoint the activations of all layers from here on, if the recipe leaves that to memory; says so if it is new.

    Nothing else shrinks the activations of a pair that is longer than a row.
    """
    layers = checkpointable_layers(model)
    if table.gradient_checkpointing != "auto" or all(layer.gradient_checkpointing for layer in layers):
        return ""
    set_gradient_checkpointing(model, len(layers))
    return ", and all layers recomputed"


def _with_context(what: str, error: Exception) -> Exception:
    return DoesNotFitError(f"{what}: {error}") if isinstance(error, DoesNotFitError) else error
