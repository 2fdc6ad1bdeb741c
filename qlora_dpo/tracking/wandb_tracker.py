"""Tells Weights & Biases what metrics.jsonl says: the same names and steps, and nothing about the machine."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

INIT_TIMEOUT, FINISH_TIMEOUT = 15, 30
"""A service that does not answer may hold up a run's start and end so long; wandb's own would be 90 and without end."""


class WandbTracker:
    """One Weights & Biases run. Training never waits for its health.

    A service that cannot be reached at the start has the run recorded offline; any other failure is said once and ends
    the tracking.
    """

    def __init__(self, run_dir: Path, project: str, name: str, say: Callable[[str], None]) -> None:
        self.run_dir, self.project, self.name, self.log_info = run_dir, project, name, say
        self.run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        """Start the run, or go on with the one this directory began; offline if nobody is logged in."""
        self._catch_errors(lambda: self._start(config))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one record of metrics.jsonl at its optimizer step."""
        if self.run is not None:
            self._catch_errors(lambda: self.run.log(tracker_values(record), step=record["step"]))

    def log_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Send answers to held-out prompts as a table, a row for each."""
        if self.run is not None:
            import wandb

            rows = [[record["row"], record["prompt"][-1]["content"], record["answer"]] for record in records]
            table = wandb.Table(columns=["row", "prompt", "answer"], data=rows)
            self._catch_errors(lambda: self.run.log({"samples": table}, step=step))

    def finish(self, exit_code: int) -> None:
        """End the run; with an exit code other than 0 it counts as failed."""
        if self.run is not None:
            self._catch_errors(lambda: self.run.finish(exit_code=exit_code))
        self.run = None

    def _start(self, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb reports its own errors home by default
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # wandb's own thread would print tracebacks
        import wandb

        mode = _wandb_mode()
        try:
            self._init(mode, config)
        except Exception as error:
            if mode != "online":
                raise
            self.log_info(f"wandb: the service cannot be used ({error_reason(error)})")
            wandb.teardown()
            mode = "offline"
            self._init(mode, config)
        if mode == "offline":
            self.log_info(
                f'wandb: offline; after "wandb login", upload with: wandb sync {self._run_files_glob("offline-run")}'
            )

    def _run_files_glob(self, kind: str) -> str:
        return f"{self.run_dir / 'wandb'}/{kind}-*"

    def _init(self, mode: Any, config: Mapping[str, Any]) -> None:
        import wandb

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
            settings=_wandb_settings(),
        )
        earlier.write_text(f"{self.run.id}\n", encoding="utf-8")

    def _catch_errors(self, call: Callable[[], None]) -> None:
        try:
            call()
        except TimeoutError:
            self.log_info(
                f"wandb: not all was uploaded within {FINISH_TIMEOUT} seconds; upload the rest with: "
                f"wandb sync {self._run_files_glob('run')}"
            )
        except Exception as error:  # tracking is never worth a training run
            self.run = None
            self.log_info(f"wandb: {error_reason(error)}; the run goes on without it")


def error_reason(error: Exception) -> str:
    """The first line of an error that says something: a service in trouble answers with pages and placeholders."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith("<")), "it did not answer as it should")[:200]


def tracker_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """What trackers are told of a record, without its step: training as it is, an evaluation under `eval_` names only.

    Both may stand at one step, where a tracker keeps one value of a name: those that they share would overwrite each
    other.
    """
    values = {key: value for key, value in record.items() if key not in ("kind", "step")}
    if record["kind"] == "train":
        return values
    return {key if key.startswith("eval_") or key == "epoch" else f"eval_{key}": values[key] for key in values}


def _wandb_mode() -> Any:
    """The mode that the user's wandb settings ask for, but offline where online would ask for a login."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup(_wandb_settings()).settings
    if settings.mode != "online":
        return settings.mode
    login = wbauth.authenticate_session(host=settings.base_url, source="", prompt=False, update_session=False)
    return "offline" if login is None else "online"


def _wandb_settings() -> Any:
    """Silent, and without code, git state, host, packages, console output or system metrics."""
    import wandb

    return wandb.Settings(
        silent=True,
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        finish_timeout_raises=True,
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
