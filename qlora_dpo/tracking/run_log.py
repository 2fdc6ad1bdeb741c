"""Records a run while it lasts: in metrics.jsonl, on the terminal and in the trackers that the recipe names."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import RunError
from qlora_dpo.files import atomic_write
from qlora_dpo.recipe.train import TrackTable
from qlora_dpo.run_folder import EVALUATION_SAMPLES as EVALUATION_SAMPLES
from qlora_dpo.run_folder import METRICS as METRICS
from qlora_dpo.tracking.console import console_logging
from qlora_dpo.tracking.progress import (
    Advance,
    NullDisplay,
    ProgressBars,
    ProgressLines,
    StepProgress,
    evaluation_line,
    is_terminal,
)

logger = logging.getLogger(__name__)

MAX_SHOWN_CHARACTERS = 100
"""Characters of a prompt, and of the answer to it, that are shown during a run."""


class RunLog:
    """Records one run from its first phase to its last: `with RunLog(...) as run_log`.

    `total_steps` counts the optimizer steps of the whole run, `start_step` those done before an interruption. `config`
    is what trackers show as the run's configuration, and `name` what they call the run. While the log is open, what the
    package logs (logger "qlora_dpo") is written to stderr. With `silent`, for ranks above 0, nothing is written at all.
    `on_step` is called with the number of every optimizer step that is done. After `evaluation_steps` the run
    evaluates, which the ETA allows for.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        *,
        start_step: int = 0,
        track: TrackTable | None = None,
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
        silent: bool = False,
        on_step: Callable[[int], None] | None = None,
        evaluation_steps: Sequence[int] = (),
    ) -> None:
        self.run_dir, self.total_steps, self.name = run_dir, total_steps, name or run_dir.name
        self.track, self.config, self.start_step = None if silent else track, config or {}, start_step
        self.silent, self.on_step = silent, on_step
        self.progress = StepProgress(total_steps, start_step, evaluation_steps)
        self.display = (NullDisplay if silent else ProgressBars if is_terminal() else ProgressLines)(self.progress)

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            resources.enter_context(console_logging(silent=self.silent))
            path = Path(os.devnull) if self.silent else self.run_dir / METRICS
            self.metrics: TextIO = resources.enter_context(path.open("a", encoding="utf-8", newline="\n"))
            self.trackers = None
            if self.track is not None:
                from qlora_dpo.tracking.trackers import Trackers

                self.trackers = Trackers()
                self.trackers.start(self.track, self.run_dir, self.name, start_step=self.start_step, config=self.config)
            resources.callback(self.display.close)
            self.display.open()
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._resources:
            if self.trackers is not None:
                self.trackers.finish(exit_code=0 if kind is None else 1)

    def step(self, step: int) -> None:
        """Count optimizer step `step` as done: called after every step, logged or not, so that the ETA is right."""
        self.progress.set_step(step)
        if self.on_step is not None:
            self.on_step(step)

    def log_train(self, record: Mapping[str, Any]) -> None:
        """Write the record of a logged step: TRL's metric names, `step` and `epoch`."""
        if record["step"] != self.progress.task.completed:
            self.progress.set_step(record["step"])
        self._write("train", record)
        self.display.show_train_record(record)

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Write the record of an evaluation: the same names with the prefix `eval_`, `step` and `epoch`."""
        self._write("eval", record)
        logger.info(evaluation_line(record, self.total_steps))

    def log_warning(self, record: Mapping[str, Any]) -> None:
        """Write a warning of [watch]: `step`, its `name` and a `sentence` with advice."""
        self._write("sign", record)
        logger.info(f"step {record['step']}: {record['sentence']}")

    def log_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the model's answers after `step` to evaluation_samples.jsonl, and log the beginning of each."""
        lines = [json.dumps({"step": step, **record}, ensure_ascii=False) + "\n" for record in records]
        with (self.run_dir / EVALUATION_SAMPLES).open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(lines))
        for record in records:
            prompt, answer = (_shorten(text) for text in (record["prompt"][-1]["content"], record["answer"]))
            logger.info(f"step {step}/{self.total_steps}  {prompt} -> {answer or '(nothing)'}")
        if self.trackers is not None:
            self.trackers.log_samples(step, records)

    def phase(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Show how far work beside the steps is: `with run_log.phase("reference", 220) as advance: ... advance(8)`.

        `total` counts the items of the phase (pairs, rows, answers), and `advance(count)` those that were just done.
        This is the one protocol for progress: code that takes long and knows no run log takes `advance`, or a function
        with this signature (`qlora_dpo.data.progress.ProgressCallback`).
        """
        return self.display.phase(name, total)

    def evaluation(self) -> AbstractContextManager[None]:
        """Around an evaluation, whose time is then no part of a step in the ETA."""
        return self.progress.evaluation()

    def pause(self) -> AbstractContextManager[None]:
        """Around other work between two steps, whose time is then no part of a step in the ETA."""
        return self.progress.clock.paused()

    def info(self, text: str) -> None:
        """Log a sentence at level INFO; new code calls its module's logger."""
        logger.info(text)

    def _write(self, kind: Literal["train", "eval", "sign"], record: Mapping[str, Any]) -> None:
        line, nonfinite = to_json_line({**record, "kind": kind})
        self.metrics.write(line)
        self.metrics.flush()
        if nonfinite:
            logger.info(f"step {record['step']}: not finite, written as null to {METRICS}: {', '.join(nonfinite)}")
        if self.trackers is not None and kind != "sign":
            self.trackers.log({**record, "kind": kind})


def _shorten(text: str) -> str:
    """The beginning of `text`, on one line."""
    line = " ".join(sanitize_text(text).split())
    return line if len(line) <= MAX_SHOWN_CHARACTERS else f"{line[:MAX_SHOWN_CHARACTERS]}..."


def to_json_line(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The record as one JSON line with `kind` first, and the keys whose values are NaN or infinite, written as null."""
    nonfinite = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    values = {key: None if key in nonfinite else value for key, value in record.items() if key != "kind"}
    return json.dumps({"kind": record["kind"], **values}, allow_nan=False) + "\n", nonfinite


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without an incomplete last line.

    Raises RunError naming any other line that is not a record.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            records.append(dict(json.loads(line)))
            records[-1]["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{path}:{number}: is not a metrics record; the file was changed or damaged") from error
    return records


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the records up to and including `step`, for a run that resumes there; the file is replaced atomically."""
    if not path.is_file():
        return
    read_metrics(path)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    atomic_write(path, b"".join(kept))
