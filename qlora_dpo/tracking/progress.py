"""Shows on stderr how far a run is: rich's progress bars on a terminal, one plain line per logged step anywhere else.

The plain lines are ours: a log file or pipe gets one complete line per logged step, and one every half minute of a long
phase, where rich would write its bars once at the end.
"""

import math
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from qlora_dpo.tracking import console

UNITS = {"read": "rows", "tokenize": "pairs", "reference": "pairs", "evaluate": "pairs"}
TRANSIENT_PHASES = ("read", "tokenize", "evaluate")
"""Phases that leave no line of their own: what they produced is reported in another one."""
PHASE_LINE_SECONDS = 30.0  # between two plain lines of a long phase
FIRST_PHASE_LINE_SECONDS = 10.0  # until its first one
MIN_ROWS_SHOWN = 1000
CACHED_RATE = 1e5  # items per second: a count that grows faster than this was in a cache
LABEL_COLUMNS = 11

MetricsRecord = Mapping[str, Any]
Advance = Callable[[int], None]


class StepClock:
    """Seconds spent on training steps: the clock stands still during everything else, which would slow the ETA."""

    def __init__(self) -> None:
        self._phase_seconds = 0.0
        self._phase_start: float | None = None

    def __call__(self) -> float:
        """The seconds, from an arbitrary start."""
        start = self._phase_start
        return (monotonic() if start is None else start) - self._phase_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock; inside a block in which it stands still, this changes nothing."""
        if self._phase_start is not None:
            yield
            return
        self._phase_start = monotonic()
        try:
            yield
        finally:
            self._phase_seconds += monotonic() - self._phase_start
            self._phase_start = None


class EtaColumn(ProgressColumn):
    """The time until a task is done; rich's TimeRemainingColumn rounds up to whole seconds and pads minutes."""

    def render(self, task: Task) -> Text:
        """`eta 1:20`, or nothing until something is done."""
        return Text(eta_text(task), style="dim")


def make_progress(clock: Callable[[], float] | None = None, style: str = "cyan") -> Progress:
    """Rows of name, bar, count and ETA.

    The speed is a mean since the start (over the last 1000 updates, which is all that rich keeps). Its default is the
    last 30 seconds, and then a run with slower steps would never have an ETA.
    """
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(width=LABEL_COLUMNS - 1)),
        BarColumn(None, complete_style=style, finished_style=style, table_column=Column(ratio=1)),
        TextColumn(
            "{task.completed}/{task.total} {task.fields[unit]}",
            style="none",
            markup=False,
            table_column=Column(justify="right", no_wrap=True),
        ),
        EtaColumn(Column(justify="right", min_width=12, no_wrap=True)),
        get_time=clock or monotonic,
        speed_estimate_period=math.inf,
        auto_refresh=False,
        expand=True,
    )


def start_task(progress: Progress, name: str, total: int, done: int = 0) -> Task:
    """Add a task of which `done` was done earlier, which does not count towards its speed."""
    task_id = progress.add_task(name, total=total, completed=done, unit=UNITS.get(name, ""))
    task = next(task for task in progress.tasks if task.id == task_id)
    restart_pace(progress, task, done)
    return task


def restart_pace(progress: Progress, task: Task, done: int) -> None:
    """Set the count to `done` and measure the speed from now on."""
    progress.reset(task.id, completed=done)
    progress.advance(task.id, 0)  # rich measures from the first update, and leaves out what that one counts


def advance_task(progress: Progress, task: Task) -> Advance:
    """The function that counts for `task`. What a cache knows comes at once, and says nothing about the speed."""
    last = progress.get_time()

    def advance(count: int) -> None:
        nonlocal last
        seconds, last = progress.get_time() - last, progress.get_time()
        if count > CACHED_RATE * seconds:
            restart_pace(progress, task, int(task.completed) + count)
        else:
            progress.advance(task.id, count)

    return advance


def eta(task: Task) -> float | None:
    """Seconds until the task is done: at its mean speed since the start, and with the evaluations that are to come.

    None until something is done.
    """
    speed, remaining = task.speed, task.remaining
    if not speed or remaining is None:
        return None
    return float(max(remaining, 0) / speed + task.fields.get("evaluation_seconds", 0.0))


def eta_text(task: Task) -> str:
    """`eta 1:20`, or nothing until something is done."""
    seconds = eta(task)
    return "" if seconds is None else f"eta {format_clock(seconds)}"


def format_clock(seconds: float) -> str:
    """Seconds as 1:20, or as 2:01:20 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def quality_parts(record: MetricsRecord, prefix: str = "") -> list[str]:
    """Loss, accuracy and margin of a record, if it has them; token accuracy where no answers are compared."""
    if f"{prefix}rewards/accuracies" not in record:
        return _format_parts(
            record,
            (f"{prefix}loss", "{:.4f}", "loss {}"),
            (f"{prefix}perplexity", "{:.2f}", "perplexity {}"),
            (f"{prefix}mean_token_accuracy", "{:.3f}", "token accuracy {}"),
        )
    return _format_parts(
        record,
        (f"{prefix}loss", "{:.4f}", "loss {}"),
        (f"{prefix}rewards/accuracies", "{:.3f}", "accuracy {}"),
        (f"{prefix}rewards/margins", "{:+z.3f}", "margin {}"),
    )


def speed_parts(record: MetricsRecord) -> list[str]:
    """Pairs and tokens per second of a record, those of them that it has."""
    return _format_parts(
        record,
        ("pairs_per_second", "{:.1f}", "{} pairs/s"),
        ("tokens_per_second", "{:.0f}", "{} tokens/s"),
    )


def memory_parts(record: MetricsRecord) -> list[str]:
    """Peak memory of a record in GiB, if it has it."""
    size = record.get("memory_bytes")
    return [] if size is None else [f"memory {size / 2**30:.1f} GiB"]


def train_line(record: MetricsRecord, task: Task) -> str:
    """One logged step as a line; `task` counts the steps of the run."""
    parts = [f"step {record['step']}/{task.total}", *quality_parts(record), *speed_parts(record), eta_text(task)]
    return "  ".join(part for part in (*parts, *memory_parts(record)) if part)


def evaluation_line(record: MetricsRecord, total_steps: int) -> str:
    """One evaluation as a line."""
    values = quality_parts(record, "eval_")
    counted = "answers" if "eval_perplexity" in record and "eval_rewards/accuracies" not in record else "pairs"
    pairs = _format_parts(record, ("eval_pairs", "{:.0f}", f"{{}} {counted}"))
    return "  ".join([f"step {record['step']}/{total_steps}", " ".join(["held-out", *values[:1]]), *values[1:], *pairs])


def phase_line(task: Task, seconds: float) -> str:
    """How far a phase is as a line: with its ETA, or with the `seconds` it took once it is complete."""
    count = f"{task.completed}/{task.total} {task.fields['unit']}".rstrip()
    time = format_clock(seconds) if task.total is None or task.completed >= task.total else eta_text(task)
    return "  ".join(part for part in (task.description, count, time) if part)


@contextmanager
def show_reading_progress(name: str, total: int) -> Iterator[Advance]:
    """A phase before the run log is open; fewer than MIN_ROWS_SHOWN rows are read before anybody could see it."""
    if total < MIN_ROWS_SHOWN:
        yield lambda count: None
        return
    display = (ProgressBars if is_terminal() else ProgressLines)(StepProgress(0))
    display.open()
    try:
        with display.phase(name, total) as advance:
            yield advance
    finally:
        display.close()


def is_terminal() -> bool:
    """True if stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class StepProgress:
    """The training steps of a run: how many are done, and when the last one will be.

    `evaluation_steps` are the steps after which the run evaluates; each is expected to take as long as the last one.
    """

    def __init__(self, total_steps: int, start_step: int = 0, evaluation_steps: Sequence[int] = ()) -> None:
        self.clock = StepClock()
        self.progress = make_progress(self.clock, style="green")
        self.task = start_task(self.progress, "train", total_steps, start_step)
        self.start_step, self.evaluation_steps, self.evaluation_seconds = start_step, sorted(evaluation_steps), 0.0

    def restart(self) -> None:
        """Measure the speed from now on."""
        restart_pace(self.progress, self.task, int(self.task.completed))

    def set_step(self, step: int) -> None:
        """Count step `step` as done; the first of this process is slower than all others and says nothing of them."""
        if step == self.start_step + 1:
            restart_pace(self.progress, self.task, step)
        remaining = len(self.evaluation_steps) - bisect_left(self.evaluation_steps, step)
        seconds = remaining * self.evaluation_seconds
        self.progress.update(self.task.id, completed=step, visible=True, evaluation_seconds=seconds)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Measure how long an evaluation takes, which is no part of a step."""
        start = monotonic()
        with self.clock.paused():
            yield
        self.evaluation_seconds = monotonic() - start


class ProgressLines:
    """Plain lines on stderr, for log files and pipes."""

    def __init__(self, steps: StepProgress) -> None:
        self.steps = steps

    def open(self) -> None:
        """Start the clock of the training steps."""
        self.steps.restart()

    def close(self) -> None:
        """Do nothing: every line is complete."""

    def print_line(self, text: str) -> None:
        """Write one line."""
        console.print_line(text)

    def show_train_record(self, record: MetricsRecord) -> None:
        """Write a logged step."""
        self.print_line(train_line(record, self.steps.task))

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Write a line every PHASE_LINE_SECONDS, and one at the end unless the phase is transient."""
        progress = make_progress()
        task = start_task(progress, name, total)
        count_items = advance_task(progress, task)
        start = monotonic()
        next_line = start + min(FIRST_PHASE_LINE_SECONDS, PHASE_LINE_SECONDS)

        def advance(count: int) -> None:
            nonlocal next_line
            count_items(count)
            if task.completed < total and monotonic() >= next_line:
                next_line = monotonic() + PHASE_LINE_SECONDS
                self.print_line(phase_line(task, monotonic() - start))

        with self.steps.clock.paused():
            yield advance
            if name not in TRANSIENT_PHASES:
                self.print_line(phase_line(task, monotonic() - start))


class NullDisplay:
    """Shows nothing: for ranks above 0."""

    def __init__(self, steps: StepProgress) -> None:
        """Take the argument of the other displays."""

    def open(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def show_train_record(self, record: MetricsRecord) -> None:
        """Do nothing."""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Count nothing."""
        yield lambda count: None


class ProgressBars:
    """Bars at the bottom of a terminal; log messages, evaluations and finished phases stay above them."""

    def __init__(self, steps: StepProgress) -> None:
        self.steps = steps
        steps.progress.update(steps.task.id, visible=False)  # until the first step is done
        self.phases = make_progress()
        self.record: MetricsRecord = {}
        self.console = Console(stderr=True, highlight=False)
        self.live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )

    def open(self) -> None:
        """Start the clock of the training steps, and draw."""
        self.steps.restart()
        self.live.start()
        console.open_display(self)

    def close(self) -> None:
        """Remove the bars and show the cursor again."""
        console.close_display(self)
        self.live.stop()

    def print_line(self, text: str) -> None:
        """Write one line above the bars; brackets in it are text, not markup."""
        self.console.print(Text(console.printable(text)), soft_wrap=True)

    def show_train_record(self, record: MetricsRecord) -> None:
        """Show the figures of a logged step under the training bar."""
        self.record = record

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Draw a bar while the phase runs, and leave a line behind it unless the phase is transient."""
        task = start_task(self.phases, name, total)
        start = monotonic()
        try:
            with self.steps.clock.paused():
                yield advance_task(self.phases, task)
            if name not in TRANSIENT_PHASES:
                self.print_line(phase_line(task, monotonic() - start))
        finally:
            self.phases.remove_task(task.id)

    def render(self) -> RenderableType:
        """Everything at the bottom of the terminal: the training bar, its figures, and the bars of phases."""
        figures = [quality_parts(self.record), speed_parts(self.record) + memory_parts(self.record)]
        lines = [Padding(Text("  ".join(parts), "dim"), (0, 0, 0, LABEL_COLUMNS)) for parts in figures if parts]
        return Group(self.steps.progress.get_renderable(), *lines, self.phases.get_renderable())


def _format_parts(record: MetricsRecord, *formats: tuple[str, str, str]) -> list[str]:
    """The figures of `record` by key, number format and text; a null stands for one that is not finite."""
    return [
        text.format(number.format(math.nan if record[key] is None else record[key]))
        for key, number, text in formats
        if key in record
    ]
