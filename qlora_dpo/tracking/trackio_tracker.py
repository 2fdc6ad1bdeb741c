"""Puts into Trackio's local database what metrics.jsonl says; nothing leaves the machine.

The database is written to directly: `trackio.init` prints on stdout, starts a thread, and asks the hub for the user's
name wherever somebody is logged in.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TrackioTracker:
    """One run in the database, which `trackio show` reads while it grows."""

    def __init__(self, run_dir: Path, project: str, name: str, start_step: int, config: Mapping[str, Any]) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.validate_project_name(project)
        self.storage: Any = SQLiteStorage
        self.project, self.name, self.config = project, name, dict(config)
        known = run_dir / "trackio" / "run_id.txt"
        self.run_id = known.read_text(encoding="utf-8").strip() if known.is_file() else uuid.uuid4().hex
        if known.is_file():
            self._truncate(start_step)
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(f"{self.run_id}\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add what metrics.jsonl says of an optimizer step."""
        self._bulk_log([dict(values)], [step], None)

    def finish(self) -> None:
        """Nothing is left to do: every record is in the database."""

    def _truncate(self, start_step: int) -> None:
        """Keep what was logged up to the step that the run goes on from; a run that starts anew keeps nothing."""
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
