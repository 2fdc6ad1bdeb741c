"""The trackers that a recipe names beside metrics.jsonl; training never waits for their health."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qlora_dpo.recipe.train import TrackTable
from qlora_dpo.tracking.tensorboard_tracker import TensorBoardTracker
from qlora_dpo.tracking.trackio_tracker import TrackioTracker
from qlora_dpo.tracking.wandb_tracker import WandbTracker, error_reason, tracker_values


class Trackers:
    """All of them, for as long as a run lasts. One that fails says so once, and is told no more."""

    def __init__(self, log_info: Callable[[str], None]) -> None:
        self.log_info = log_info
        self.active: dict[str, WandbTracker | TensorBoardTracker | TrackioTracker] = {}

    def start(self, track: TrackTable, run_dir: Path, name: str, *, start_step: int, config: Mapping[str, Any]) -> None:
        """Start each, or let it go on from `start_step` with what it has of this run."""
        if track.wandb is not None:
            wandb = WandbTracker(run_dir, track.wandb, name, self.log_info)
            wandb.start(config)
            self.active["wandb"] = wandb
        if track.tensorboard:
            inside = track.tensorboard is True
            home = run_dir / "tensorboard" if inside else Path(str(track.tensorboard)).expanduser() / name
            self._catch_errors(
                "tensorboard",
                lambda: self._start_tensorboard(home, home if inside else home.parent, start_step, config),
            )
        if track.trackio is not None:
            project = track.trackio
            self._catch_errors("trackio", lambda: self._start_trackio(run_dir, project, name, start_step, config))

    def log(self, record: Mapping[str, Any]) -> None:
        """Tell each one record of metrics.jsonl, `kind` included."""
        for name, each in list(self.active.items()):
            match each:
                case WandbTracker():
                    each.log(record)  # which guards itself, since it can fall back to offline
                case TensorBoardTracker() | TrackioTracker():
                    self._catch_errors(name, partial(each.log, record["step"], tracker_values(record)))

    def log_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell each what the model answers after `step`; Trackio, whose rows are numbers, is told nothing."""
        for name, each in list(self.active.items()):
            match each:
                case WandbTracker() | TensorBoardTracker():
                    self._catch_errors(name, partial(each.log_samples, step, records))
                case TrackioTracker():
                    pass

    def finish(self, exit_code: int) -> None:
        """End each; with an exit code other than 0 the run counts as failed where that is shown."""
        for name, each in list(self.active.items()):
            match each:
                case WandbTracker():
                    each.finish(exit_code)
                case TensorBoardTracker() | TrackioTracker():
                    self._catch_errors(name, each.finish)

    def _start_tensorboard(self, home: Path, shown: Path, start_step: int, config: Mapping[str, Any]) -> None:
        self.active["tensorboard"] = TensorBoardTracker(home, start_step, config)
        self.log_info(f"tensorboard: look at it with: tensorboard --logdir {shown}")

    def _start_trackio(
        self, run_dir: Path, project: str, name: str, start_step: int, config: Mapping[str, Any]
    ) -> None:
        self.active["trackio"] = TrackioTracker(run_dir, project, name, start_step, config)
        self.log_info(f'trackio: look at it with: trackio show --project "{project}"')

    def _catch_errors(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # tracking is never worth a training run
            self.active.pop(name, None)
            self.log_info(f"{name}: {error_reason(error)}; the run goes on without it")
