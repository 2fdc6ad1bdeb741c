"""Errors that a user can act on: one sentence each, with the exit code of the command line."""

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_GATE, EXIT_DOES_NOT_FIT, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

OOM_MESSAGES = (
    *("out of memory", "not enough memory", "defaultcpuallocator: can't allocate", "cannot allocate memory"),
    # a full GPU often fails first in a matrix product or attention, whose libraries allocate their own memory
    *("cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
    *("cudnn_status_internal_error_device_allocation_failed", "cudnn_status_internal_error_host_allocation_failed"),
)
"""Parts of the messages of out-of-memory errors, in lower case."""
REDUCE_MEMORY_ADVICE = (
    "lower train.micro_batch_tokens or data.max_length, or set train.gradient_checkpointing = true, and close other "
    "programs that hold memory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """True for MemoryError, for torch's OutOfMemoryError, and for errors of torch, the GPU libraries and the operating
    system whose message says so.
    """
    # compared by name, since this module is imported before torch
    from_torch = any(f"{kind.__module__}.{kind.__name__}" == "torch.OutOfMemoryError" for kind in type(error).__mro__)
    message = str(error).lower() if isinstance(error, RuntimeError | OSError) else ""
    return isinstance(error, MemoryError) or from_torch or any(part in message for part in OOM_MESSAGES)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class QloraDpoError(Exception):
    """Base of all errors whose text is meant for the user: where, what was found, what would be right, what to do."""

    exit_code = EXIT_FAILURE


class RecipeError(QloraDpoError):
    """The recipe or the command line names something that does not exist, or combines what cannot be combined."""

    exit_code = EXIT_USAGE


class DataError(QloraDpoError):
    """The preference data cannot be read or cannot be trained on."""


class ModelError(QloraDpoError):
    """A model, tokenizer or adapter cannot be loaded, or lacks a property that training relies on."""


class SourceError(QloraDpoError):
    """A hub, a package index or a disk did not deliver a file, or could not take one."""


class RunError(QloraDpoError):
    """A run directory, a checkpoint or a training step is not in the state that the command needs."""


class ProcessEndedError(RunError):
    """Another rank of a distributed run has ended, so this one cannot continue."""


class GateError(QloraDpoError):
    """A measured figure is below the bar that the user set."""

    exit_code = EXIT_GATE


class DoesNotFitError(QloraDpoError):
    """The run would need more memory or disk than is available."""

    exit_code = EXIT_DOES_NOT_FIT


class Interrupted(QloraDpoError):
    """The user stopped the run; a checkpoint was saved first."""

    exit_code = EXIT_INTERRUPTED
