"""The experiment trackers that a recipe names beside metrics.jsonl. One that fails never stops or delays a run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from qlora_dpo.recipe.train import TrackTable
from qlora_dpo.tracking.tensorboard_tracker import TensorBoardTracker
from qlora_dpo.tracking.trackio_tracker import TrackioTracker
from qlora_dpo.tracking.wandb_tracker import WandbTracker, error_reason

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One tracker of one run. Its constructor starts it; every method may raise whatever its library raises."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the values of an optimizer step."""

    def log_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Record the answers to held-out prompts after `step`."""

    def finish(self, exit_code: int) -> None:
        """End the run; with an exit code other than 0 it counts as failed where the tracker shows that."""


class Trackers:
    """All trackers of a run. One that raises is reported in a sentence and dropped, and the run goes on without it."""

    def __init__(self) -> None:
        self.active: dict[str, Tracker] = {}

    def start(self, track: TrackTable, run_dir: Path, name: str, *, start_step: int, config: Mapping[str, Any]) -> None:
        """Start the trackers of `track`; a run that was tracked before is continued from `start_step`."""
        if track.wandb is not None:
            self._start("wandb", partial(WandbTracker, run_dir, track.wandb, name, config))
        if track.tensorboard:
            in_run = track.tensorboard is True
            folder = run_dir / "tensorboard" if in_run else Path(str(track.tensorboard)).expanduser() / name
            self._start(
                "tensorboard",
                partial(TensorBoardTracker, folder, start_step, config),
                f"tensorboard --logdir {folder if in_run else folder.parent}",
            )
        if track.trackio is not None:
            self._start(
                "trackio",
                partial(TrackioTracker, run_dir, track.trackio, name, start_step, config),
                f'trackio show --project "{track.trackio}"',
            )

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one record of metrics.jsonl, including its `kind`, to every tracker."""
        for name, tracker in list(self.active.items()):
            self._catch_errors(name, partial(tracker.log, record["step"], tracker_values(record)))

    def log_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Send the answers after `step` to every tracker."""
        for name, tracker in list(self.active.items()):
            self._catch_errors(name, partial(tracker.log_samples, step, records))

    def finish(self, exit_code: int) -> None:
        """End every tracker; with an exit code other than 0 the run counts as failed."""
        for name, tracker in list(self.active.items()):
            self._catch_errors(name, partial(tracker.finish, exit_code))

    def _start(self, name: str, make_tracker: Callable[[], Tracker], view_command: str = "") -> None:
        def start() -> None:
            self.active[name] = make_tracker()
            if view_command:
                logger.info(f"{name}: look at it with: {view_command}")

        self._catch_errors(name, start)

    def _catch_errors(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # tracking is never worth a training run
            self.active.pop(name, None)
            logger.warning(f"{name}: {error_reason(error)}; the run goes on without it")


def tracker_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a record for trackers, without its step: an evaluation's all have the prefix `eval_`, but `epoch`.

    A training record and an evaluation may have the same step, for which a tracker keeps one value per name: without
    the prefix, names that both have would overwrite each other.
    """
    values = {key: value for key, value in record.items() if key not in ("kind", "step")}
    if record["kind"] == "train":
        return values
    return {key if key.startswith("eval_") or key == "epoch" else f"eval_{key}": values[key] for key in values}
