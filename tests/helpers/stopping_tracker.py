"""A run log that stops its run after a step, as a signal does, and figures for merges that nobody measures."""

import os
import signal
from pathlib import Path
from typing import Any

from qlora_dpo.tracking.run_log import RunLog

FIGURES: dict[str, Any] = {
    "kl": 0.0,
    "top1": 1.0,
    "trained_accuracy": None,
    "merged_accuracy": None,
    "why_no_accuracy": "not asked for",
    "tokens": 1,
    "measured_on": "nothing",
    "computed_in": "nothing",
}


def tracker_that_stops(folder: Path, total_steps: int, stop_at: int) -> RunLog:
    """A run log whose process gets SIGTERM when step `stop_at` is done; 0 for none."""

    def stop(step: int) -> None:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    return RunLog(folder, total_steps, on_step=stop)
