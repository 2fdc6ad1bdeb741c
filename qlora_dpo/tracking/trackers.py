"""The trackers that a recipe names beside metrics.jsonl; training never waits for their health."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qlora_dpo.recipe.train import TrackTable
from qlora_dpo.tracking.tensorboard_tracker import TensorboardRun
from qlora_dpo.tracking.trackio_tracker import TrackioRun
from qlora_dpo.tracking.wandb_tracker import WandbRun, reason, sent


class Trackers:
    """All of them, for as long as a run lasts. One that fails says so once, and is told no more."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.followed: dict[str, WandbRun | TensorboardRun | TrackioRun] = {}

    def start(self, track: TrackTable, run_dir: Path, name: str, *, start_step: int, config: Mapping[str, Any]) -> None:
        """Start each, or let it go on from `start_step` with what it has of this run."""
        if track.wandb is not None:
            wandb = WandbRun(run_dir, track.wandb, name, self.say)
            wandb.start(config)
            self.followed["wandb"] = wandb
        if track.tensorboard:
            inside = track.tensorboard is True
            home = run_dir / "tensorboard" if inside else Path(str(track.tensorboard)).expanduser() / name
            self._guarded(
                "tensorboard", lambda: self._tensorboard(home, home if inside else home.parent, start_step, config)
            )
        if track.trackio is not None:
            project = track.trackio
            self._guarded("trackio", lambda: self._trackio(run_dir, project, name, start_step, config))

    def log(self, record: Mapping[str, Any]) -> None:
        """Tell each one record of metrics.jsonl, `kind` included."""
        for name, each in list(self.followed.items()):
            match each:
                case WandbRun():
                    each.log(record)  # which guards itself, since it can fall back to offline
                case TensorboardRun() | TrackioRun():
                    self._guarded(name, partial(each.log, record["step"], sent(record)))

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell each what the model answers after `step`; Trackio, whose rows are numbers, is told nothing."""
        for name, each in list(self.followed.items()):
            match each:
                case WandbRun() | TensorboardRun():
                    self._guarded(name, partial(each.samples, step, records))
                case TrackioRun():
                    pass

    def finish(self, exit_code: int) -> None:
        """End each; with an exit code other than 0 the run counts as failed where that is shown."""
        for name, each in list(self.followed.items()):
            match each:
                case WandbRun():
                    each.finish(exit_code)
                case TensorboardRun() | TrackioRun():
                    self._guarded(name, each.finish)

    def _tensorboard(self, home: Path, shown: Path, start_step: int, config: Mapping[str, Any]) -> None:
        self.followed["tensorboard"] = TensorboardRun(home, start_step, config)
        self.say(f"tensorboard: look at it with: tensorboard --logdir {shown}")

    def _trackio(self, run_dir: Path, project: str, name: str, start_step: int, config: Mapping[str, Any]) -> None:
        self.followed["trackio"] = TrackioRun(run_dir, project, name, start_step, config)
        self.say(f'trackio: look at it with: trackio show --project "{project}"')

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # tracking is never worth a training run
            self.followed.pop(name, None)
            self.say(f"{name}: {reason(error)}; the run goes on without it")
