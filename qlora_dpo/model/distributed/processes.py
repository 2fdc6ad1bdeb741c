"""Rank, world size and collectives of a run that accelerate has launched; without a launcher, rank 0 of 1.

Collectives must be called by all ranks in the same order.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import DistError

from qlora_dpo.errors import (
    REDUCE_MEMORY_ADVICE,
    DoesNotFitError,
    ProcessEndedError,
    RecipeError,
    RunError,
    is_out_of_memory,
)

COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""Timeout of collectives: the other ranks wait in one while the main process reads the data."""

ResultT = TypeVar("ResultT")


def launched_world_size() -> int:
    """Number of processes that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@cache
def sharding_strategy() -> Literal["", "fsdp2", "zero2", "zero3"]:
    """The sharding strategy in accelerate's config file; empty for plain data-parallel training.

    FSDP2 and ZeRO-3 shard the base's layers (model/distributed/sharding.py), ZeRO-2 shards the optimizer state
    (training/zero2_optimizer.py). Raises RecipeError for settings that are not supported.
    """
    fsdp, deepspeed = (_env_flag(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if fsdp and os.environ.get("FSDP_VERSION") != "2":
        raise RecipeError(
            "accelerate's config file asks for FSDP 1, which cannot shard beside a float32 adapter; write "
            "fsdp_version: 2, as recipes/accelerate/fsdp2-qlora.yaml does"
        )
    if fsdp and _env_flag("FSDP_OFFLOAD_PARAMS"):
        raise RecipeError("accelerate's config file has fsdp_offload_params: true, which is not supported; write false")
    if deepspeed and stage not in ("2", "3"):
        raise RecipeError(
            f"accelerate's config file asks for DeepSpeed with zero_stage: {stage or 'not said'}; write zero_stage: 2 "
            "or 3 beside no deepspeed_config_file, as recipes/accelerate/zero2.yaml and zero3.yaml do"
        )
    for offloaded in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{offloaded.upper()}_DEVICE", "none")
        if deepspeed and device != "none":
            raise RecipeError(
                f"accelerate's config file has offload_{offloaded}_device: {device}, which is not supported; write none"
            )
    # otherwise accelerate and transformers would shard everything; here the adapter stays replicated
    for kind in ("FSDP", "DEEPSPEED"):
        os.environ.pop(f"ACCELERATE_USE_{kind}", None)
    if launched_world_size() == 1 or not (fsdp or deepspeed):
        return ""
    return "fsdp2" if fsdp else "zero2" if stage == "2" else "zero3"


def is_sharded() -> bool:
    """True if the base's layers are sharded, so that every forward and backward pass is a collective of all ranks."""
    return sharding_strategy() in ("fsdp2", "zero3")


def _env_flag(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def init_process_group(*, cpu: bool) -> None:
    """Join the process group; does nothing without a launcher."""
    if launched_world_size() > 1 and not _is_initialized():
        _partial_state(cpu=cpu, timeout=COLLECTIVE_TIMEOUT)


def _partial_state(**arguments: Any) -> Any:
    """Accelerate's PartialState, imported only with several ranks, since `check` and `--help` do not need it."""
    from accelerate import PartialState

    return PartialState(**arguments)


def _is_initialized() -> bool:
    """True if accelerate's state exists."""
    return "accelerate.state" in sys.modules and bool(sys.modules["accelerate.state"].PartialState._shared_state)


def destroy_process_group() -> None:
    """Leave the process group."""
    if world_size() > 1:
        _partial_state().destroy_process_group()


def world_size() -> int:
    """Number of ranks."""
    return int(_partial_state().num_processes) if _is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return int(_partial_state().process_index) if _is_initialized() else 0


def local_world_size() -> int:
    """Number of ranks on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched_world_size() > 1 else 1


def is_main() -> bool:
    """True on rank 0, which writes files and messages; also without a launcher."""
    return rank() == 0


def barrier() -> None:
    """Wait until all ranks have reached this call."""
    if world_size() > 1:
        with collective_errors():
            _partial_state().wait_for_everyone()


@contextmanager
def collective_errors() -> Iterator[None]:
    """Turns a failed collective into ProcessEndedError."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _process_ended_error() from error


def _process_ended_error() -> ProcessEndedError:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the launcher now sends to all ranks
    return ProcessEndedError(
        "another process of this run has ended; --resume goes on from the newest checkpoint, if there is one"
    )


def sharded_run_error(error: Exception) -> Exception:
    """The exception to raise after `error` in a sharded model.

    Other ranks are blocked inside a layer's collective, so no retry is possible.
    """
    if is_out_of_memory(error):
        return DoesNotFitError(
            f"out of memory, and with sharded weights nothing can be done again in smaller rows; {REDUCE_MEMORY_ADVICE}"
        )
    return _process_ended_error() if isinstance(error, DistError) or "gloo" in str(error) else error


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the body on each machine's main process first, so that its other ranks find the caches filled.

    accelerate's `local_main_process_first` does the same, but if the main process ends in the body, the others would
    fail with gloo's or NCCL's RuntimeError instead of ProcessEndedError.
    """
    is_local_main = world_size() == 1 or _partial_state().is_local_main_process
    if not is_local_main:
        barrier()
    yield
    if is_local_main:
        barrier()


def all_reduce_sum(numbers: Sequence[float]) -> list[float]:
    """The sum of each number over all ranks, in float64."""
    if world_size() == 1:
        return list(numbers)
    with collective_errors():
        summed: list[float] = _reduce(_to_comm_device(torch.tensor(numbers, dtype=torch.float64)), "sum").tolist()
    return summed


def all_reduce_any(flag: bool) -> bool:
    """True if `flag` is true on any rank."""
    return all_reduce_sum([float(flag)])[0] > 0


def run_or_raise_everywhere(work: Callable[[], ResultT]) -> ResultT:
    """Run `work` (no collectives inside), and raise MemoryError on every rank if any rank runs out of memory."""
    out_of_memory, result = False, None
    try:
        result = work()
    except (RuntimeError, MemoryError) as error:
        if is_sharded():
            raise sharded_run_error(error) from error
        if world_size() == 1 or not is_out_of_memory(error):
            raise
        out_of_memory = True
    # outside the handler, since the exception holds its frames, and with them all their tensors
    if all_reduce_any(out_of_memory):
        raise MemoryError("out of memory in one of the processes")
    return result  # type: ignore[return-value]


def all_gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the rows of each tensor over all ranks, in the order of ranks, on the tensor's own device.

    Ranks may have different numbers of rows; all tensors of one rank have the same number.
    """
    if world_size() == 1:
        return dict(tensors)
    lengths = _rows_per_rank(len(next(iter(tensors.values()))))
    with collective_errors():
        if not any(lengths):
            return dict(tensors)
        return {name: _all_gather_rows(tensor, lengths) for name, tensor in tensors.items()}


def _all_gather_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Gather tensors of `lengths[rank]` rows each: pad to equal length, gather, remove the padding.

    accelerate's `pad_across_processes` would gather the lengths once more for every tensor.
    """
    max_length, local_rows = max(lengths), rows.detach().to(torch.uint8 if rows.dtype == torch.bool else rows.dtype)
    padded = torch.cat([local_rows, local_rows.new_zeros(max_length - len(local_rows), *local_rows.shape[1:])])
    parts = _gather(_to_comm_device(padded)).split(max_length)
    gathered = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return gathered.to(rows.device, rows.dtype)


def rank_offset(rows: int) -> int:
    """Number of rows on the ranks before this one; `rows` is this rank's number."""
    return sum(_rows_per_rank(rows)[: rank()])


def all_reduce_max(rows: int) -> int:
    """The largest of all ranks' numbers of rows."""
    return max(_rows_per_rank(rows))


def all_reduce_min(number: int) -> int:
    """The smallest of all ranks' numbers."""
    return min(_rows_per_rank(number))


def _rows_per_rank(rows: int) -> list[int]:
    if world_size() == 1:
        return [rows]
    with collective_errors():
        lengths: list[int] = _gather(_to_comm_device(torch.tensor([rows]))).tolist()
    return lengths


def _gather(tensor: Tensor) -> Tensor:
    from accelerate.utils import gather

    gathered: Tensor = gather(tensor)
    return gathered


def _reduce(tensor: Tensor, reduction: str) -> Tensor:
    from accelerate.utils import reduce

    reduced: Tensor = reduce(tensor, reduction)
    return reduced


def _to_comm_device(tensor: Tensor) -> Tensor:
    return tensor.to(_partial_state().device).contiguous()


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients of `parameters` over all ranks, in one collective; a missing gradient counts as zero."""
    if world_size() == 1:
        return
    gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with collective_errors():
        summed = _reduce(flat, "sum").split([gradient.numel() for gradient in gradients])
    for parameter, gradient in zip(parameters, summed, strict=True):
        parameter.grad = gradient.view_as(parameter)


def partition_by_cost(costs: Sequence[int]) -> range:
    """The contiguous range of items for this rank, chosen so that all ranks have about the same total cost.

    Every item belongs to exactly one rank.
    """
    if world_size() == 1:
        return range(len(costs))
    total, ends = max(1, sum(costs)), list(accumulate(costs))
    # an item belongs to the rank whose equal part of the total cost contains the item's middle
    owners = [
        min(world_size() - 1, (2 * end - cost) * world_size() // (2 * total))
        for end, cost in zip(ends, costs, strict=True)
    ]
    local_indices = [index for index, owner in enumerate(owners) if owner == rank()]
    return range(local_indices[0], local_indices[-1] + 1) if local_indices else range(0)


def seed(value: int, step: int) -> None:
    """Seed torch's generators for a step, differently on each rank; does nothing in a run of one process.

    A resumed run therefore draws the same numbers in each step.
    """
    if world_size() > 1:
        torch.manual_seed((value * 1_000_003 + step) * 1_003 + rank())


def check_same_on_all_ranks(fingerprints: Mapping[str, str]) -> None:
    """Raise RunError on every rank if any of these hexadecimal fingerprints differs between ranks."""
    if world_size() == 1:
        return
    digests = {name: torch.tensor([list(bytes.fromhex(value))]) for name, value in fingerprints.items()}
    differ = [name for name, rows in all_gather(digests).items() if len(rows.unique(dim=0)) > 1]
    if differ:
        raise RunError(
            f"the processes of this run do not have the same {' and '.join(differ)}; give all machines the same files"
        )
