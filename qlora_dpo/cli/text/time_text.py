"""What a run takes of time, in words and as `check --json` has it."""

from typing import Any

from qlora_dpo.planning.time_estimate import Timetable

MINUTE, HOUR, DAY = 60, 3600, 86400
TENTHS_BELOW = 10


def in_a_line(time: Timetable) -> str:
    """The whole time, then each part."""
    if time.why_not:
        return f"not known: {time.why_not}"
    done, told = time.passes, list[str]()
    for part, seconds in time.seconds.items():
        what = {
            "reference": "reference",
            "steps": f"{done.steps:,} steps" if done.steps > 1 else "1 step",
            "evaluations": f"{done.evaluations:,} evaluations",
        }[part]
        told.append(f"{what} {duration(seconds)}" + (" where it is not cached" if part == "reference" else ""))
    if done.other:
        told.append("and the reference, which is another model")
    return f"about {duration(time.total)}: {', '.join(told)} (probe of {duration(time.probe)} on this machine)"


def duration(seconds: float) -> str:
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


def as_json(time: Timetable) -> dict[str, Any]:
    """The same figures; `seconds` is null where they are not known."""
    done = time.passes
    return {
        "seconds": dict(time.seconds) if time.seconds else None,
        "total_seconds": time.total if time.seconds else None,
        "probe_seconds": time.probe,
        "why_not": time.why_not,
        "evaluations": done.evaluations,
        "pairs": {
            "trained": done.trained,
            "reference": done.reference_train + done.reference_heldout,
            "evaluated": done.evaluated,
        },
    }
