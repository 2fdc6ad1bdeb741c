"""The processes that train one run together, as accelerate has started them; a process alone is the first of one.

Every function that brings something together is called by all of them, in the same order.
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
"""How long a process waits for the others: as long as the first of them may need to read the data."""

ResultT = TypeVar("ResultT")


def launched_world_size() -> int:
    """How many processes the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@cache
def sharding_strategy() -> Literal["", "fsdp2", "zero2", "zero3"]:
    """What accelerate's config file asks the processes to share out: the base's layers by FSDP2 or ZeRO-3
    (model/distributed/sharding.py), or the optimizer's state by ZeRO-2 (training/zero2_optimizer.py); empty if each has
    all.

    Raises RecipeError for what the file asks for and cannot be had.
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
    for what in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        if deepspeed and device != "none":
            raise RecipeError(
                f"accelerate's config file has offload_{what}_device: {device}, which is not supported; write none"
            )
    # accelerate and transformers would do it by themselves, and what is shared out here is less: an adapter stays whole
    for kind in ("FSDP", "DEEPSPEED"):
        os.environ.pop(f"ACCELERATE_USE_{kind}", None)
    if launched_world_size() == 1 or not (fsdp or deepspeed):
        return ""
    return "fsdp2" if fsdp else "zero2" if stage == "2" else "zero3"


def is_sharded() -> bool:
    """True if the base's layers are shared out: then each forward and each backward pass is one that all processes make
    together.
    """
    return sharding_strategy() in ("fsdp2", "zero3")


def _env_flag(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def init_process_group(*, cpu: bool) -> None:
    """Find the others; alone, nothing is done."""
    if launched_world_size() > 1 and not _is_initialized():
        _partial_state(cpu=cpu, timeout=COLLECTIVE_TIMEOUT)


def _partial_state(**arguments: Any) -> Any:
    """Accelerate's own; imported where there are several processes, since a plan is printed without it."""
    from accelerate import PartialState

    return PartialState(**arguments)


def _is_initialized() -> bool:
    """True if accelerate knows what this process runs on."""
    return "accelerate.state" in sys.modules and bool(sys.modules["accelerate.state"].PartialState._shared_state)


def destroy_process_group() -> None:
    """Take leave of the others."""
    if world_size() > 1:
        _partial_state().destroy_process_group()


def world_size() -> int:
    """How many processes there are."""
    return int(_partial_state().num_processes) if _is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(_partial_state().process_index) if _is_initialized() else 0


def local_world_size() -> int:
    """How many of them share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched_world_size() > 1 else 1


def is_main() -> bool:
    """True for the process that writes and speaks; also for one that is alone."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        with collective_errors():
            _partial_state().wait_for_everyone()


@contextmanager
def collective_errors() -> Iterator[None]:
    """Say it in a sentence if one of them has ended."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _process_ended_error() from error


def _process_ended_error() -> ProcessEndedError:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what the launcher says to all now, and this one knows
    return ProcessEndedError(
        "another process of this run has ended; --resume goes on from the newest checkpoint, if there is one"
    )


def sharded_run_error(error: Exception) -> Exception:
    """What to raise after `error` in a model that is sharded, where the others wait in the midst of a layer, so that
    nothing can be agreed on and done again.
    """
    if is_out_of_memory(error):
        return DoesNotFitError(
            f"out of memory, and with sharded weights nothing can be done again in smaller rows; {REDUCE_MEMORY_ADVICE}"
        )
    return _process_ended_error() if isinstance(error, DistError) or "gloo" in str(error) else error


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the first process of each machine go first, so that the others find in the cache what it has made."""
    first = world_size() == 1 or _partial_state().is_local_main_process
    if not first:
        barrier()
    yield
    if first:
        barrier()


def all_reduce_sum(numbers: Sequence[float]) -> list[float]:
    """The sum of each number over all processes, in float64."""
    if world_size() == 1:
        return list(numbers)
    with collective_errors():
        summed: list[float] = _reduce(_to_comm_device(torch.tensor(numbers, dtype=torch.float64)), "sum").tolist()
    return summed


def all_reduce_any(flag: bool) -> bool:
    """True if `flag` is true in one of the processes."""
    return all_reduce_sum([float(flag)])[0] > 0


def run_or_raise_everywhere(work: Callable[[], ResultT]) -> ResultT:
    """Do `work`, which brings nothing together; raises MemoryError in every process if memory runs out in one."""
    failed, result = False, None
    try:
        result = work()
    except (RuntimeError, MemoryError) as error:
        if is_sharded():
            raise sharded_run_error(error) from error
        if world_size() == 1 or not is_out_of_memory(error):
            raise
        failed = True
    # out of the handler, since the error holds the frames, and with them all tensors
    if all_reduce_any(failed):
        raise MemoryError("out of memory in one of the processes")
    return result  # type: ignore[return-value]


def all_gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of each tensor from all processes, one process after another, in each of them and on its device."""
    if world_size() == 1:
        return dict(tensors)
    lengths = _rows_per_rank(len(next(iter(tensors.values()))))
    with collective_errors():
        return (
            {name: _all_gather_rows(each, lengths) for name, each in tensors.items()} if any(lengths) else dict(tensors)
        )


def _all_gather_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The rows of all processes, of which each has as many as `lengths` says; parts of one length can be sent."""
    most, sent = max(lengths), rows.detach().to(torch.uint8 if rows.dtype == torch.bool else rows.dtype)
    filled = torch.cat([sent, sent.new_zeros(most - len(sent), *sent.shape[1:])])
    parts = _gather(_to_comm_device(filled)).split(most)
    found = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return found.to(rows.device, rows.dtype)


def rank_offset(rows: int) -> int:
    """How many rows the processes before this one have, which has `rows`."""
    return sum(_rows_per_rank(rows)[: rank()])


def all_reduce_max(rows: int) -> int:
    """How many rows the process has that has the most."""
    return max(_rows_per_rank(rows))


def all_reduce_min(number: int) -> int:
    """The least number that one of the processes has."""
    return min(_rows_per_rank(number))


def _rows_per_rank(rows: int) -> list[int]:
    if world_size() == 1:
        return [rows]
    with collective_errors():
        lengths: list[int] = _gather(_to_comm_device(torch.tensor([rows]))).tolist()
    return lengths


def _gather(tensor: Tensor) -> Tensor:
    from accelerate.utils import gather

    parts: Tensor = gather(tensor)
    return parts


def _reduce(tensor: Tensor, how: str) -> Tensor:
    from accelerate.utils import reduce

    whole: Tensor = reduce(tensor, how)
    return whole


def _to_comm_device(tensor: Tensor) -> Tensor:
    return tensor.to(_partial_state().device).contiguous()


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the sum of all their gradients; one without a gradient adds nothing."""
    if world_size() == 1:
        return
    flat = torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in parameters])
    with collective_errors():
        summed = _reduce(flat, "sum").split([each.numel() for each in parameters])
    for parameter, gradient in zip(parameters, summed, strict=True):
        parameter.grad = gradient.view_as(parameter)


def partition_by_cost(costs: Sequence[int]) -> range:
    """Which stretch of things in a row this process takes, so that all have about the same cost; each thing is taken
    by exactly one.
    """
    if world_size() == 1:
        return range(len(costs))
    whole, ends = max(1, sum(costs)), list(accumulate(costs))
    # a thing belongs to the process in whose part of the whole its middle lies
    owners = [
        min(world_size() - 1, (2 * end - cost) * world_size() // (2 * whole))
        for end, cost in zip(ends, costs, strict=True)
    ]
    mine = [i for i, owner in enumerate(owners) if owner == rank()]
    return range(mine[0], mine[-1] + 1) if mine else range(0)


def seed(value: int, step: int) -> None:
    """Start this process's generators anew for a step, each process with draws of its own; alone, nothing is done.

    So a step draws the same in a run that is resumed.
    """
    if world_size() > 1:
        torch.manual_seed((value * 1_000_003 + step) * 1_003 + rank())


def check_same_on_all_ranks(fingerprints: Mapping[str, str]) -> None:
    """Raise RunError, in every process, if one of these hexadecimal fingerprints is not the same in all of them."""
    if world_size() == 1:
        return
    bytes_of = {name: torch.tensor([list(bytes.fromhex(value))]) for name, value in fingerprints.items()}
    differ = [name for name, rows in all_gather(bytes_of).items() if len(rows.unique(dim=0)) > 1]
    if differ:
        raise RunError(
            f"the processes of this run do not have the same {' and '.join(differ)}; give all machines the same files"
        )
