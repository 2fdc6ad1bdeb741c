"""Starts the processes of `train --processes` with accelerate's launcher, and returns their exit code."""

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
"""Seconds that an interrupted process may take to end its step and save a checkpoint; torchrun's default is 30."""
RANK_ZERO_HEAD_START = 2.0  # seconds
ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
"""The environment variable that names the file from which torchrun reads why a process failed."""


def launch_processes(arguments: Sequence[str], num_processes: int) -> int:
    """Run `qlora-dpo ARGUMENTS` in `num_processes` processes on this machine and return the exit code."""
    # _report_child_failure says in a sentence what torchrun would print as a table
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
        "--main_process_port": "0",  # any free port
        "--mixed_precision": "no",  # the recipe decides
        "--dynamo_backend": "no",
        "--num_cpu_threads_per_process": threads,
    }
    flags = [argument for option in options.items() for argument in option]
    try:
        launch_command(launch_command_parser().parse_args(["--multi_gpu", *flags, "-m", "qlora_dpo", *arguments]))
    except SignalException:
        return EXIT_INTERRUPTED
    except ChildFailedError as error:
        return _report_child_failure(error)
    return 0


def _report_child_failure(error: "ChildFailedError") -> int:
    """Report why a rank above 0 failed, since rank 0 reports for itself; returns the exit code."""
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
    """Sort key that puts causes before consequences: killed, failed with a reason, failed without one, terminated."""
    if failure.exitcode < 0:
        return 3 if failure.signal_name() == "SIGTERM" else 0
    return 1 if isinstance(failure.message, dict) else 2


def silence_other_ranks() -> None:
    """On ranks above 0, discard all output, that of libraries too; with QLORA_DPO_TRACEBACK=1 stderr is kept."""
    if not _is_nonzero_rank():
        return
    silence()
    null = os.open(os.devnull, os.O_WRONLY)
    if os.environ.get("QLORA_DPO_TRACEBACK") != "1":
        os.dup2(null, sys.stderr.fileno())
    os.dup2(null, sys.stdout.fileno())


def _is_nonzero_rank() -> bool:
    """True for a launched process other than rank 0."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def report_to_launcher(text: str) -> None:
    """Write the reason of a failure to the file that the launcher reads, if this process was launched.

    Ranks above 0 wait RANK_ZERO_HEAD_START first: most often rank 0 fails for the same reason, and reports it itself.
    """
    if _is_nonzero_rank():
        time.sleep(RANK_ZERO_HEAD_START)
    if path := os.environ.get(ERROR_FILE_VARIABLE):
        report = {"message": {"message": text, "extraInfo": {"timestamp": int(time.time())}}}
        Path(path).write_text(json.dumps(report), encoding="utf-8")
