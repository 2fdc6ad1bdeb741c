"""Errors a user can act on: one sentence each, with the exit code the command line ends with."""

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_GATE, EXIT_DOES_NOT_FIT, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

OOM_MESSAGES = (
    *("out of memory", "not enough memory", "defaultcpuallocator: can't allocate", "cannot allocate memory"),
    # a full card often says so first in a product or an attention, whose libraries allocate for themselves
    *("cublas_status_alloc_failed", "cudnn_status_alloc_failed"),
    *("cudnn_status_internal_error_device_allocation_failed", "cudnn_status_internal_error_host_allocation_failed"),
)
"""What such errors say, in lower-case letters."""
REDUCE_MEMORY_ADVICE = (
    "lower train.micro_batch_tokens or data.max_length, or set train.gradient_checkpointing = true, and close other "
    "programs that hold memory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's own MemoryError, torch's OutOfMemoryError, and errors of torch, the GPU's libraries and the
    system that say so in words.
    """
    # by its name, since this file is read before torch is imported
    torchs = any(f"{kind.__module__}.{kind.__name__}" == "torch.OutOfMemoryError" for kind in type(error).__mro__)
    told = isinstance(error, RuntimeError | OSError) and any(words in str(error).lower() for words in OOM_MESSAGES)
    return isinstance(error, MemoryError) or torchs or told


class QloraDpoError(Exception):
    """Base of all errors whose text is meant for the user: where, what was found, what would be right, what to do."""

    exit_code = EXIT_FAILURE


class RecipeError(QloraDpoError):
    """The recipe or the command line asks for something that does not exist or does not fit together."""

    exit_code = EXIT_USAGE


class DataError(QloraDpoError):
    """The preference data cannot be read or cannot be trained on."""


class ModelError(QloraDpoError):
    """A model, tokenizer or adapter cannot be loaded, or does not do what training relies on."""


class SourceError(QloraDpoError):
    """A hub, a package index or a disk did not give what was asked for."""


class RunError(QloraDpoError):
    """A run directory, a checkpoint or a training step is not in the state that the command needs."""


class ProcessEndedError(RunError):
    """Another of the processes that train together has ended, so this one cannot go on."""


class GateError(QloraDpoError):
    """A measured figure is below the bar that the user set."""

    exit_code = EXIT_GATE


class DoesNotFitError(QloraDpoError):
    """The plan needs more memory or disk than there is."""

    exit_code = EXIT_DOES_NOT_FIT


class Interrupted(QloraDpoError):
    """The user stopped the run; a checkpoint was saved first."""

    exit_code = EXIT_INTERRUPTED
