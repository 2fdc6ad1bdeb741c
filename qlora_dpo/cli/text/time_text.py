"""What a run takes of time, in words and as `check --json` has it."""

from typing import Any

from qlora_dpo.planning.time_estimate import TimeEstimate

MINUTE, HOUR, DAY = 60, 3600, 86400
TENTHS_BELOW = 10


def time_estimate_line(time: TimeEstimate) -> str:
    """The whole time, then each part."""
    if time.unknown_reason:
        return f"not known: {time.unknown_reason}"
    done, told = time.pass_counts, list[str]()
    for part, seconds in time.seconds_by_part.items():
        what = {
            "reference": "reference",
            "steps": f"{done.steps:,} steps" if done.steps > 1 else "1 step",
            "evaluations": f"{done.evaluations:,} evaluations",
        }[part]
        told.append(f"{what} {format_duration(seconds)}" + (" where it is not cached" if part == "reference" else ""))
    if done.uses_reference_model:
        told.append("and the reference, which is another model")
    return f"about {format_duration(time.total_seconds)}: {', '.join(told)} (probe of {format_duration(time.probe_seconds)} on this machine)"


def format_duration(seconds: float) -> str:
    """Seconds as they are told: to tenths where there are few, and in the two largest units from two minutes on."""
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
    """The same figures; `seconds` is null where they are not known."""
    done = time.pass_counts
    return {
        "seconds": dict(time.seconds_by_part) if time.seconds_by_part else None,
        "total_seconds": time.total_seconds if time.seconds_by_part else None,
        "probe_seconds": time.probe_seconds,
        "why_not": time.unknown_reason,
        "evaluations": done.evaluations,
        "pairs": {
            "trained": done.trained_pairs,
            "reference": done.reference_train_pairs + done.reference_heldout_pairs,
            "evaluated": done.evaluated_pairs,
        },
    }
