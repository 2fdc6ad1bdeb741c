"""Sends the values of metrics.jsonl to Weights & Biases, with the same names and steps and nothing about the machine.

accelerate's WandBTracker is no substitute: it calls `wandb.init` and no more, which fails without a login, waits 90
seconds for a service that is down instead of recording offline, and cannot mark a run as failed.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

INIT_TIMEOUT, FINISH_TIMEOUT = 15, 30
"""Seconds that a service which does not respond may delay the start and the end of a run; wandb's defaults are 90
seconds and no limit."""


class WandbTracker:
    """One Weights & Biases run: a new one, or the one that this run directory began earlier.

    Without a login, or if the service cannot be reached at the start, the run is recorded offline.
    """

    def __init__(self, run_dir: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # by default wandb sends its own errors to its makers
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # wandb's own thread would print tracebacks
        import wandb

        self.run_dir, self.project, self.name, self.config = run_dir, project, name, dict(config)
        mode = _wandb_mode()
        try:
            self.run: Any = self._init(mode)
        except Exception as error:
            if mode != "online":
                raise
            logger.warning(f"wandb: the service cannot be used ({error_reason(error)})")
            wandb.teardown()
            mode = "offline"
            self.run = self._init(mode)
        if mode == "offline":
            logger.info(
                f'wandb: offline; after "wandb login", upload with: wandb sync {self._run_files_glob("offline-run")}'
            )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the values of an optimizer step."""
        self.run.log(dict(values), step=step)

    def log_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Send the answers to held-out prompts as a table with one row per prompt."""
        import wandb

        rows = [[record["row"], record["prompt"][-1]["content"], record["answer"]] for record in records]
        self.run.log({"samples": wandb.Table(columns=["row", "prompt", "answer"], data=rows)}, step=step)

    def finish(self, exit_code: int) -> None:
        """Upload the rest and end the run; with an exit code other than 0 it counts as failed."""
        try:
            self.run.finish(exit_code=exit_code)
        except TimeoutError:
            logger.warning(
                f"wandb: not all was uploaded within {FINISH_TIMEOUT} seconds; upload the rest with: "
                f"wandb sync {self._run_files_glob('run')}"
            )

    def _run_files_glob(self, prefix: str) -> str:
        return f"{self.run_dir / 'wandb'}/{prefix}-*"

    def _init(self, mode: Any) -> Any:
        import wandb

        id_file = self.run_dir / "wandb" / "run_id.txt"
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
        id_file.parent.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self.project,
            name=self.name,
            dir=str(self.run_dir),
            config=self.config,
            mode=mode,
            id=run_id,
            resume="allow" if run_id else None,
            settings=_wandb_settings(),
        )
        id_file.write_text(f"{run.id}\n", encoding="utf-8")
        return run


def error_reason(error: Exception) -> str:
    """The first informative line of an error: a failing service may respond with an HTML page."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith("<")), "it did not answer as it should")[:200]


def _wandb_mode() -> Any:
    """The mode of the user's wandb settings, but offline where wandb would prompt for a login."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup(_wandb_settings()).settings
    if settings.mode != "online":
        return settings.mode
    login = wbauth.authenticate_session(host=settings.base_url, source="", prompt=False, update_session=False)
    return "offline" if login is None else "online"


def _wandb_settings() -> Any:
    """Settings that print nothing and record no code, git state, host, packages, console output or system metrics."""
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
