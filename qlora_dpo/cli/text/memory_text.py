"""Texts about the memory of a run: lines by part for `check`, one line for `train`, and why a run does not fit."""

from collections.abc import Sequence
from pathlib import Path

from qlora_dpo.model.device import Device
from qlora_dpo.planning.memory_advice import MemoryFix
from qlora_dpo.planning.memory_estimate import MemoryEstimate

GIB = 2**30
MIN_SHOWN_BYTES = 0.01 * GIB
"""Smaller parts are added up as "others" in the line that `train` shows."""


def memory_lines(memory: MemoryEstimate) -> list[str]:
    """The verdict, each part, and the peak of the process."""
    fits = "fits" if memory.fits else "does not fit"
    if memory.fits and memory.unplanned_reason:
        fits = "without a step"
    return [
        f"{fits}: {memory.needed / GIB:.2f} GiB of {memory.free_bytes / GIB:.2f} GiB that are free",
        *(f"{size / GIB:6.2f} GiB  {part}" for part, size in memory.bytes_by_part.items()),
        *([memory.smaller_rows_reason] if memory.smaller_rows_reason else []),
        *([_unplanned_line(memory)] if memory.unplanned_reason else []),
        *_process_lines(memory),
    ]


def _unplanned_line(memory: MemoryEstimate) -> str:
    return f"a step cannot be planned, since {memory.unplanned_reason}; a run measures it on the loaded model"


def _process_lines(memory: MemoryEstimate) -> list[str]:
    if not memory.process_bytes:
        return []
    loading = ", while the weights are read" if memory.loading_bytes > memory.needed else ""
    return [
        f"the process: {memory.peak_bytes / GIB:.2f} GiB at most{loading}, including {memory.process_bytes / GIB:.2f} "
        "GiB of Python, libraries and data, which are in use already"
    ]


def memory_line(memory: MemoryEstimate) -> str:
    """The estimate in one line, with its parts from the largest down."""
    shown = sorted(
        ((size, part) for part, size in memory.bytes_by_part.items() if size >= MIN_SHOWN_BYTES), reverse=True
    )
    others = memory.needed - sum(size for size, _ in shown)
    parts = [f"{part} {size / GIB:.2f}" for size, part in shown] + ([f"others {others / GIB:.2f}"] if others else [])
    total = f"{memory.needed / GIB:.2f} GiB of {memory.free_bytes / GIB:.2f} GiB that are free"
    unplanned = f"; {_unplanned_line(memory)}" if memory.unplanned_reason else ""
    return f"memory      {total}: {'; '.join(parts)}{unplanned}"


def does_not_fit_message(path: Path, memory: MemoryEstimate, fixes: Sequence[MemoryFix], device: Device) -> str:
    """How much memory is missing, and what to change, each with what the run would need then."""
    changes = [f"{' with '.join(fix.recipe_lines)} ({fix.needed_bytes / GIB:.1f} GiB)" for fix in fixes]
    advice = f"set {', or '.join(changes)}, or" if changes else "no line of the recipe makes it fit;"
    return (
        f"{path}: needs {memory.needed / GIB:.1f} GiB and {device.name} has {memory.free_bytes / GIB:.1f} GiB free; "
        f"{advice} take a smaller model or a larger card"
    )
