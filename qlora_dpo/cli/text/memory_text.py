"""What a run takes of memory, in words: for `check` a line a part, for `train` one line, and why one does not fit."""

from collections.abc import Sequence
from pathlib import Path

from qlora_dpo.model.device import Device
from qlora_dpo.planning.memory_advice import MemoryFix
from qlora_dpo.planning.memory_estimate import MemoryEstimate

GIB = 2**30
MIN_SHOWN_BYTES = 0.01 * GIB
"""Bytes of a part below which `train` counts it to the others."""


def memory_lines(memory: MemoryEstimate) -> list[str]:
    """The verdict, then each part, then what the process takes beside it."""
    fits = "fits" if memory.fits else "does not fit"
    return [
        f"{fits}: {memory.needed / GIB:.2f} GiB of {memory.free_bytes / GIB:.2f} GiB that are free",
        *(f"{size / GIB:6.2f} GiB  {part}" for part, size in memory.bytes_by_part.items()),
        *([memory.smaller_rows_reason] if memory.smaller_rows_reason else []),
        *_process_lines(memory),
    ]


def _process_lines(memory: MemoryEstimate) -> list[str]:
    if not memory.process_bytes:
        return []
    loading = ", while the weights are read" if memory.loading_bytes > memory.needed else ""
    return [
        f"the process: {memory.peak_bytes / GIB:.2f} GiB at most{loading}, with the {memory.process_bytes / GIB:.2f} GiB of Python, "
        "its libraries and the data, which are taken already"
    ]


def memory_line(memory: MemoryEstimate) -> str:
    """The plan, from its largest part down."""
    shown = sorted(
        ((size, part) for part, size in memory.bytes_by_part.items() if size >= MIN_SHOWN_BYTES), reverse=True
    )
    others = memory.needed - sum(size for size, _ in shown)
    told = [f"{part} {size / GIB:.2f}" for size, part in shown] + ([f"others {others / GIB:.2f}"] if others else [])
    return f"memory      {memory.needed / GIB:.2f} GiB of {memory.free_bytes / GIB:.2f} GiB that are free: {'; '.join(told)}"


def does_not_fit_message(path: Path, memory: MemoryEstimate, fixes: Sequence[MemoryFix], device: Device) -> str:
    """What is missing, and what to change about it, each with what the run needs then."""
    told = [f"{' with '.join(way.recipe_lines)} ({way.needed_bytes / GIB:.1f} GiB)" for way in fixes]
    change = f"set {', or '.join(told)}, or" if told else "no line of the recipe makes it fit;"
    return (
        f"{path}: needs {memory.needed / GIB:.1f} GiB and {device.name} has {memory.free_bytes / GIB:.1f} GiB free; "
        f"{change} take a smaller model or a larger card"
    )
