"""Tells Weights & Biases what metrics.jsonl says: the same names and steps, and nothing about the machine."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class WandbRun:
    """One Weights & Biases run. Training never waits for its health: its first failure is said once and ends it."""

    def __init__(self, run_dir: Path, project: str, name: str, say: Callable[[str], None]) -> None:
        self.run_dir, self.project, self.name, self.say = run_dir, project, name, say
        self.run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Start the run, or go on with the one this directory began; offline if nobody is logged in."""
        self._guarded(lambda: self._start(config))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one record of metrics.jsonl at its optimizer step."""
        if self.run is not None:
            self._guarded(lambda: self.run.log(sent(record), step=record["step"]))

    def finish(self, exit_code: int) -> None:
        """End the run; with an exit code other than 0 it counts as failed."""
        if self.run is not None:
            self._guarded(lambda: self.run.finish(exit_code=exit_code))
        self.run = None

    def _start(self, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb reports its own errors home by default
        import wandb

        mode = _mode()
        earlier = self.run_dir / "wandb" / "run_id.txt"
        run_id = earlier.read_text(encoding="utf-8").strip() if earlier.is_file() else None
        (self.run_dir / "wandb").mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=self.project,
            name=self.name,
            dir=str(self.run_dir),
            config=dict(config),
            mode=mode,
            id=run_id,
            resume="allow" if run_id else None,
            settings=_settings(),
        )
        earlier.write_text(f"{self.run.id}\n", encoding="utf-8")
        if mode == "offline":
            self.say(
                f'wandb: offline; after "wandb login", upload with: wandb sync {self.run_dir / "wandb"}/offline-run-*'
            )

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # tracking is never worth a training run
            self.run = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.say(f"wandb: {reason[0]}; the run goes on without it")


def sent(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent of a record: a training record as it is, an evaluation under its `eval_` names only.

    Both may stand at one step, and wandb keeps one row per step: names that they share would overwrite each other.
    """
    values = {key: value for key, value in record.items() if key not in ("kind", "step")}
    if record["kind"] == "train":
        return values
    return {key if key.startswith("eval_") or key == "epoch" else f"eval_{key}": values[key] for key in values}


def _mode() -> Any:
    """The mode that the user's wandb settings ask for, but offline where online would ask for a login."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup(_settings()).settings
    if settings.mode != "online":
        return settings.mode
    login = wbauth.authenticate_session(host=settings.base_url, source="", prompt=False, update_session=False)
    return "offline" if login is None else "online"


def _settings() -> Any:
    """Silent, and without code, git state, host, packages, console output or system metrics."""
    import wandb

    return wandb.Settings(
        silent=True,
        init_timeout=30,  # seconds; wandb's own 90 would hold up a run on a machine without network
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        symlink=False,
        host="",
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
