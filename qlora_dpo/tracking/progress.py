"""Shows on stderr how a run gets on: bars on a terminal, one plain line per logged step anywhere else."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_dpo.tracking import console

UNITS = {"read": "rows", "tokenize": "pairs", "reference": "pairs", "evaluate": "pairs"}
TRANSIENT_PHASES = ("read", "tokenize", "evaluate")
"""Phases whose end is told by what they found."""
PHASE_LINE_SECONDS = 30.0  # without a terminal a long phase says where it is this often
FIRST_PHASE_LINE_SECONDS = 10.0  # and the first time so soon
MIN_ROWS_SHOWN = 1000
CACHED_RATE = 1e5  # a count that grows by so many a second is no work: it was known before
LABEL_COLUMNS = 11

Record = Mapping[str, Any]
Advance = Callable[[int], None]


@dataclass
class Progress:
    """How far a count has come, and how many seconds the rest takes at the mean pace so far; pauses do not count."""

    total: int
    done: int = 0
    clock: Callable[[], float] = time.monotonic
    seconds: float = 0.0
    _start: int = field(init=False)
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._start, self._since = self.done, self.clock()

    def set_done(self, done: int) -> None:
        """Move the count to `done`."""
        self.pause()
        self.resume()
        self.done = done

    def advance(self, count: int) -> None:
        """Move the count on by `count`; what comes at once was known before, and says nothing of the pace."""
        worked = self.seconds
        self.set_done(self.done + count)
        if count > CACHED_RATE * (self.seconds - worked):
            self._start += count

    def pause(self) -> None:
        """Stop the clock."""
        self.seconds += self.clock() - self._since

    def resume(self) -> None:
        """Start the clock again."""
        self._since = self.clock()

    def eta(self) -> float | None:
        """Seconds until `total`; None until something is done."""
        gained = self.done - self._start
        return self.seconds / gained * max(self.total - self.done, 0) if gained > 0 else None


def format_clock(seconds: float) -> str:
    """Seconds as 1:20, or as 2:01:20 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def quality_parts(record: Record, prefix: str = "") -> list[str]:
    """Loss, accuracy and margin of a record, as far as it has them."""
    return _format_parts(
        record,
        (f"{prefix}loss", "{:.4f}", "loss {}"),
        (f"{prefix}rewards/accuracies", "{:.3f}", "accuracy {}"),
        (f"{prefix}rewards/margins", "{:+z.3f}", "margin {}"),
    )


def speed_parts(record: Record) -> list[str]:
    """Pairs and tokens per second of a record, as far as it has them."""
    return _format_parts(
        record,
        ("pairs_per_second", "{:.1f}", "{} pairs/s"),
        ("tokens_per_second", "{:.0f}", "{} tokens/s"),
    )


def memory_parts(record: Record) -> list[str]:
    """Peak memory of a record in GiB, if it has it."""
    size = record.get("memory_bytes")
    return [] if size is None else [f"memory {size / 2**30:.1f} GiB"]


def train_line(record: Record, pace: Progress) -> str:
    """One logged step as a line."""
    left = pace.eta()
    eta = [] if left is None else [f"eta {format_clock(left)}"]
    head = f"step {record['step']}/{pace.total}"
    return "  ".join([head, *quality_parts(record), *speed_parts(record), *eta, *memory_parts(record)])


def evaluation_line(record: Record, total: int) -> str:
    """One evaluation as a line."""
    values = quality_parts(record, "eval_")
    pairs = _format_parts(record, ("eval_pairs", "{:.0f}", "{} pairs"))
    return "  ".join([f"step {record['step']}/{total}", " ".join(["held-out", *values[:1]]), *values[1:], *pairs])


def phase_line(name: str, pace: Progress) -> str:
    """How far a phase has come, as a line."""
    left = pace.eta()
    clock = format_clock(pace.seconds) if pace.done >= pace.total else f"eta {format_clock(left)}" if left else ""
    return "  ".join(part for part in (name, _count_text(pace, name), clock) if part)


@contextmanager
def show_reading_progress(name: str, total: int) -> Iterator[Advance]:
    """A phase before the run has a tracker; few rows are read too soon to be shown."""
    if total < MIN_ROWS_SHOWN:
        yield lambda count: None
        return
    display = (ProgressBars if is_terminal() else ProgressLines)(0, 0)
    display.open()
    try:
        with display.phase(name, total) as advance:
            yield advance
    finally:
        display.close()


def is_terminal() -> bool:
    """True if stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class ProgressLines:
    """Plain lines on stderr, for log files and pipes."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.pace = Progress(total_steps, start_step)

    def open(self) -> None:
        """Start the clock of the training steps."""
        self.pace.resume()

    def close(self) -> None:
        """Nothing to tidy up: every line is complete."""

    def print_line(self, text: str) -> None:
        """Write one line."""
        console.print_line(text)

    def set_step(self, step: int) -> None:
        """Count an optimizer step; only logged steps write a line."""
        self.pace.set_done(step)

    def show_train_record(self, record: Record) -> None:
        """Write a logged step."""
        self.print_line(train_line(record, self.pace))

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Say now and then how far the phase is, and once when it ends; an evaluation ends with its own line."""
        self.pace.pause()
        pace, said = Progress(total), time.monotonic() - max(0.0, PHASE_LINE_SECONDS - FIRST_PHASE_LINE_SECONDS)

        def advance(count: int) -> None:
            nonlocal said
            pace.advance(count)
            if pace.done < total and time.monotonic() - said >= PHASE_LINE_SECONDS:
                said = time.monotonic()
                self.print_line(phase_line(name, pace))

        try:
            yield advance
            if name not in TRANSIENT_PHASES:
                self.print_line(phase_line(name, pace))
        finally:
            self.pace.resume()


class NullDisplay:
    """Shows nothing: of several processes one shows what all do."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.pace = Progress(total_steps, start_step)

    def open(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing to tidy up."""

    def print_line(self, text: str) -> None:
        """Write nothing."""

    def set_step(self, step: int) -> None:
        """Count an optimizer step."""
        self.pace.set_done(step)

    def show_train_record(self, record: Record) -> None:
        """Write nothing."""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Say nothing of the phase."""
        yield lambda count: None


class ProgressBars:
    """Bars at the foot of a terminal; what stays above them are notes, evaluations and finished phases."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.pace = Progress(total_steps, start_step)
        self.phases: list[tuple[str, Progress]] = []
        self.record: Record | None = None
        self.training = False
        self.console = Console(stderr=True, highlight=False)
        self.live = Live(
            console=self.console,
            get_renderable=self.render,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
        )

    def open(self) -> None:
        """Start drawing."""
        self.pace.resume()
        self.live.start()
        console.open_display(self)

    def close(self) -> None:
        """Take the bars away and give the cursor back."""
        console.close_display(self)
        self.live.stop()

    def print_line(self, text: str) -> None:
        """Write one line above the bars, whatever brackets it holds."""
        self.console.print(Text(console.printable(text)), soft_wrap=True)

    def set_step(self, step: int) -> None:
        """Move the training bar."""
        self.training = True
        self.pace.set_done(step)

    def show_train_record(self, record: Record) -> None:
        """Show the figures of a logged step under the training bar."""
        self.record = record

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Draw a bar while the phase runs; leave a line behind it, but for an evaluation, which ends with its own."""
        self.pace.pause()
        pace = Progress(total)
        self.phases.append((name, pace))
        try:
            yield pace.advance
            if name not in TRANSIENT_PHASES:
                self.print_line(phase_line(name, pace))
        finally:
            self.phases.pop()
            self.pace.resume()

    def render(self) -> Group:
        """Everything at the foot of the terminal as it stands now."""
        parts: list[Table | Text] = []
        if self.training:
            parts.append(_progress_row("train", self.pace, style="green"))
        if self.record is not None:
            figures = [quality_parts(self.record), speed_parts(self.record) + memory_parts(self.record)]
            parts += [Text(" " * LABEL_COLUMNS + "  ".join(line), style="dim") for line in figures if line]
        parts += [_progress_row(name, pace, style="cyan") for name, pace in self.phases]
        return Group(*parts)


def _progress_row(name: str, pace: Progress, style: str) -> Table:
    left = pace.eta()
    grid = Table.grid(expand=True)
    grid.add_column(width=LABEL_COLUMNS)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", min_width=18)
    grid.add_column(justify="right", min_width=13)
    bar = ProgressBar(total=max(pace.total, 1), completed=pace.done, complete_style=style, finished_style=style)
    eta = "" if left is None else f"eta {format_clock(left)}"
    grid.add_row(Text(name), bar, Text(_count_text(pace, name)), Text(eta, style="dim"))
    return grid


def _count_text(pace: Progress, name: str) -> str:
    return f"{pace.done}/{pace.total} {UNITS.get(name, '')}".rstrip()


def _format_parts(record: Record, *wanted: tuple[str, str, str]) -> list[str]:
    """The wanted figures that the record has; a null stands for a figure that is not finite."""
    found = [(record[key], number, words) for key, number, words in wanted if key in record]
    return [words.format(number.format(math.nan if value is None else value)) for value, number, words in found]
