"""Texts about the time of a run, and the same as `check --json` prints it."""

import os
from typing import Any

from qlora_dpo.planning.time_estimate import TimeEstimate

MINUTE, HOUR, DAY = 60, 3600, 86400
TENTHS_BELOW = 10
MIN_LOAD = 0.25
"""CPU cores that other programs must keep busy to be mentioned."""


def time_estimate_line(time: TimeEstimate) -> str:
    """The total, then each part; or why it is not known."""
    if time.unknown_reason:
        return f"not known: {time.unknown_reason}"
    counts, parts = time.pass_counts, list[str]()
    for part, seconds in time.seconds_by_part.items():
        label = {
            "reference": "reference",
            "steps": f"{counts.steps:,} steps" if counts.steps > 1 else "1 step",
            "evaluations": f"{counts.evaluations:,} evaluations",
        }[part]
        parts.append(f"{label} {format_duration(seconds)}" + (" unless cached" if part == "reference" else ""))
    if counts.uses_reference_model:
        parts.append("and the reference, which is another model")
    probe = f"probe of {format_duration(time.probe_seconds)} on this machine"
    if time.other_load >= MIN_LOAD:
        probe += (
            f"; other programs keep {time.other_load:.1f} of {os.cpu_count()} cores busy, beside which it takes longer"
        )
    return f"about {format_duration(time.total_seconds)}: {', '.join(parts)} ({probe})"


def format_duration(seconds: float) -> str:
    """A duration for people: tenths of a second below 10 s, and at most two units from two minutes on."""
    if round(seconds) < TENTHS_BELOW:
        return f"{max(0.1, seconds):.1f} s"
    if round(seconds) < 2 * MINUTE:
        return f"{round(seconds)} s"
    minutes = round(seconds / MINUTE)
    if minutes < HOUR // MINUTE:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, HOUR // MINUTE)
    if hours < DAY // HOUR:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / HOUR), DAY // HOUR)
    return f"{days} d {hours} h" if hours else f"{days} d"


def time_record(time: TimeEstimate) -> dict[str, Any]:
    """The estimate as a JSON object; `seconds` is null if unknown."""
    counts = time.pass_counts
    return {
        "seconds": dict(time.seconds_by_part) if time.seconds_by_part else None,
        "total_seconds": time.total_seconds if time.seconds_by_part else None,
        "probe_seconds": time.probe_seconds,
        "other_load": time.other_load,
        "why_not": time.unknown_reason,
        "evaluations": counts.evaluations,
        "pairs": {
            "trained": counts.trained_pairs,
            "reference": counts.reference_train_pairs + counts.reference_heldout_pairs,
            "evaluated": counts.evaluated_pairs,
        },
    }
