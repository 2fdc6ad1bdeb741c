"""What a run takes of memory, in words: for `check` a line a part, for `train` one line, and why one does not fit."""

from collections.abc import Sequence
from pathlib import Path

from qlora_dpo.model.device import Device
from qlora_dpo.planning.memory_advice import Way
from qlora_dpo.planning.memory_estimate import Memory

GIB = 2**30
SHOWN = 0.01 * GIB
"""Bytes of a part below which `train` counts it to the others."""


def by_part(memory: Memory) -> list[str]:
    """The verdict, then each part, then what the process takes beside it."""
    fits = "fits" if memory.fits else "does not fit"
    return [
        f"{fits}: {memory.needed / GIB:.2f} GiB of {memory.free / GIB:.2f} GiB that are free",
        *(f"{size / GIB:6.2f} GiB  {part}" for part, size in memory.parts.items()),
        *([memory.smaller] if memory.smaller else []),
        *_process(memory),
    ]


def _process(memory: Memory) -> list[str]:
    if not memory.own:
        return []
    loading = ", while the weights are read" if memory.loading > memory.needed else ""
    return [
        f"the process: {memory.peak / GIB:.2f} GiB at most{loading}, with the {memory.own / GIB:.2f} GiB of Python, "
        "its libraries and the data, which are taken already"
    ]


def in_a_line(memory: Memory) -> str:
    """The plan, from its largest part down."""
    shown = sorted(((size, part) for part, size in memory.parts.items() if size >= SHOWN), reverse=True)
    others = memory.needed - sum(size for size, _ in shown)
    told = [f"{part} {size / GIB:.2f}" for size, part in shown] + ([f"others {others / GIB:.2f}"] if others else [])
    return f"memory      {memory.needed / GIB:.2f} GiB of {memory.free / GIB:.2f} GiB that are free: {'; '.join(told)}"


def does_not_fit(path: Path, memory: Memory, ways: Sequence[Way], device: Device) -> str:
    """What is missing, and what to change about it, each with what the run needs then."""
    told = [f"{' with '.join(way.lines)} ({way.needed / GIB:.1f} GiB)" for way in ways]
    change = f"set {', or '.join(told)}, or" if told else "no line of the recipe makes it fit;"
    return (
        f"{path}: needs {memory.needed / GIB:.1f} GiB and {device.name} has {memory.free / GIB:.1f} GiB free; "
        f"{change} take a smaller model or a larger card"
    )
