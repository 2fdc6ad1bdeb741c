"""Writes the values of metrics.jsonl to Trackio's local database; nothing leaves the machine.

The database is written directly. `trackio.init`, which accelerate's TrackioTracker calls, prints to stdout, starts a
thread, connects to huggingface.co if a token is set, and on a resume keeps the steps that are logged again.
"""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class TrackioTracker:
    """One run in the database; `trackio show` can display it while it is written."""

    def __init__(self, run_dir: Path, project: str, name: str, start_step: int, config: Mapping[str, Any]) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.validate_project_name(project)
        self.storage: Any = SQLiteStorage
        self.project, self.name, self.config = project, name, dict(config)
        id_file = run_dir / "trackio" / "run_id.txt"
        self.run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else uuid.uuid4().hex
        if id_file.is_file():
            self._truncate(start_step)
        id_file.parent.mkdir(parents=True, exist_ok=True)
        id_file.write_text(f"{self.run_id}\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the values of an optimizer step."""
        self._bulk_log([dict(values)], [step], None)

    def log_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing: the rows of the database are numbers."""

    def finish(self, exit_code: int) -> None:
        """Do nothing: every record is in the database already."""

    def _truncate(self, start_step: int) -> None:
        """Delete the steps after `start_step`, which will be logged again; at 0, the start of a run, delete all."""
        rows = self.storage.get_logs(self.project, self.name, run_id=self.run_id) if start_step else []
        kept = [dict(row) for row in rows if row["step"] <= start_step]
        self.storage.delete_run(self.project, self.name, run_id=self.run_id)
        steps, times = ([row.pop(key) for row in kept] for key in ("step", "timestamp"))
        if kept:
            self._bulk_log(kept, steps, times)

    def _bulk_log(self, values: list[dict[str, Any]], steps: list[int], times: list[str] | None) -> None:
        self.storage.bulk_log(
            self.project, self.name, values, steps=steps, timestamps=times, config=self.config, run_id=self.run_id
        )
