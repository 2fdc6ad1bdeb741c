"""Starts the processes of `train --processes` through accelerate's launcher, and passes on how they ended."""

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_dpo.errors import EXIT_FAILURE, EXIT_INTERRUPTED
from qlora_dpo.tracking.console import silence

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

SHUTDOWN_TIMEOUT = "600"
"""How long an interrupted process may take to end its step and save a checkpoint; torchrun itself gives it 30."""
RANK_ZERO_HEAD_START = 2.0
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""The variable with the file in which torchrun reads why a process failed."""


def launch_processes(arguments: Sequence[str], num_processes: int) -> int:
    """Run `qlora-dpo ARGUMENTS` in `count` processes on this machine, as `accelerate launch` does; the exit code."""
    # torchrun's tables and notes say what is said below
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_TIMEOUT)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // num_processes))
    options = {
        "--num_processes": str(num_processes),
        "--num_machines": "1",
        "--main_process_port": "0",  # a free one
        "--mixed_precision": "no",  # the recipe decides
        "--dynamo_backend": "no",
        "--num_cpu_threads_per_process": threads,
    }
    given = [word for option in options.items() for word in option]
    try:
        launch_command(launch_command_parser().parse_args(["--multi_gpu", *given, "-m", "qlora_dpo", *arguments]))
    except SignalException:
        return EXIT_INTERRUPTED
    except ChildFailedError as error:
        return _report_child_failure(error)
    return 0


def _report_child_failure(error: "ChildFailedError") -> int:
    """Say why a process failed, unless it was the first, which says so itself; returns the exit code."""
    failures: list[Any] = sorted(error.failures.values(), key=_failure_priority)
    cause = failures[0]
    if cause.exitcode < 0:
        click.echo(
            f"qlora-dpo: process {cause.local_rank} was ended by {cause.signal_name()}, and the others with it; "
            "--resume goes on from the newest checkpoint, if there is one",
            err=True,
        )
        return EXIT_FAILURE
    if cause.local_rank and isinstance(cause.message, dict):
        click.echo(f"qlora-dpo: process {cause.local_rank}: {cause.message['message']}", err=True)
    return int(cause.exitcode)


def _failure_priority(failure: Any) -> int:
    """Causes before consequences: killed by somebody, failed with a reason, failed since another did, told to end."""
    if failure.exitcode < 0:
        return 3 if failure.signal_name() == "SIGTERM" else 0
    return 1 if isinstance(failure.message, dict) else 2


def silence_other_ranks() -> None:
    """Of several processes let the first alone be heard; what libraries write goes the same way."""
    if not _is_nonzero_rank():
        return
    silence()
    nothing = os.open(os.devnull, os.O_WRONLY)
    if os.environ.get("QLORA_DPO_TRACEBACK") != "1":
        os.dup2(nothing, sys.stderr.fileno())
    os.dup2(nothing, sys.stdout.fileno())


def _is_nonzero_rank() -> bool:
    """True for a process that was launched beside a first one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def report_to_launcher(text: str) -> None:
    """Tell the launcher, if there is one, why this process fails.

    The first process most often fails for the same reason, and says so: the others give it the time.
    """
    if _is_nonzero_rank():
        time.sleep(RANK_ZERO_HEAD_START)
    if path := os.environ.get(ERROR_FILE_VARIABLE):
        word = {"message": {"message": text, "extraInfo": {"timestamp": int(time.time())}}}
        Path(path).write_text(json.dumps(word), encoding="utf-8")
