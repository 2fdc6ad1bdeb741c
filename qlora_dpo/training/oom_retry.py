"""Retries what ran out of memory with half the tokens per row; the result is the same."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Self

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


class RowAttempt:
    """One attempt at some work, as a context in which running out of memory, or StepAborted, is noted and not raised.

    `packing` is how the attempt lays out its rows.
    """

    def __init__(self, what: str, packing: Packing) -> None:
        self.what, self.packing = what, packing
        self.out_of_memory = self.is_aborted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, StepAborted):
            self.is_aborted = True
        elif isinstance(error, RuntimeError | MemoryError):
            if processes.is_sharded():
                raise _with_context(self.what, processes.sharded_run_error(error)) from error
            self.out_of_memory = is_out_of_memory(error)
        return self.is_aborted or self.out_of_memory


def row_attempts(what: str, packing: Packing, before_last_try: Callable[[], str] = lambda: "") -> Iterator[RowAttempt]:
    """Attempts at the same work: with `packing`, and with half the tokens per row after each out-of-memory error.

        for attempt in row_attempts("step 3", packing):
            with attempt:
                result = work(attempt.packing)

    The work changes nothing but gradients, which it begins anew, so a failed attempt is dropped; the random state is
    restored here. If memory runs out on one rank, all ranks retry; with sharded weights the run ends instead.
    `before_last_try` saves memory in another way and returns how. Raises DoesNotFitError if the last attempt runs out
    of memory as well, and StepAborted on all ranks if the work raises it on one.
    """
    rng_states = get_rng_states()
    for number in range(1, MAX_HALVINGS + 2):
        yield (attempt := RowAttempt(what, packing))
        failures, aborts = processes.all_reduce_sum([attempt.out_of_memory, attempt.is_aborted])
        if not failures + aborts:
            return
        set_rng_states(rng_states)
        if aborts:
            raise StepAborted
        free_cached_memory()
        tokens = packing.token_budget
        packing = replace(packing, token_budget=max(1, tokens // 2))
        if number <= MAX_HALVINGS:
            also = before_last_try() if number == MAX_HALVINGS else ""
            logger.info(
                f"{what}: out of memory with rows of {tokens:,} tokens; rows of {packing.token_budget:,} from here "
                f"on{also}"
            )
    raise DoesNotFitError(f"{what}: out of memory {MAX_HALVINGS + 1} times in a row; {REDUCE_MEMORY_ADVICE}")


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
