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

from qlora_dpo.data.dialogue import printable
from qlora_dpo.redact import redacted

UNITS = {"read": "rows", "tokenize": "pairs", "reference": "pairs", "evaluate": "pairs"}
LEAVE_NOTHING = ("read", "tokenize", "evaluate")
"""Phases whose end is told by what they found."""
PLAIN_PHASE_SECONDS = 30.0  # without a terminal a long phase says where it is this often
FIRST_SECONDS = 10.0  # and the first time so soon
MANY_ROWS = 1000
AT_ONCE = 1e5  # a count that grows by so many a second is no work: it was known before
LABEL_COLUMNS = 11

Record = Mapping[str, Any]
Advance = Callable[[int], None]


@dataclass
class Pace:
    """How far a count has come, and how many seconds the rest takes at the mean pace so far; pauses do not count."""

    total: int
    done: int = 0
    clock: Callable[[], float] = time.monotonic
    seconds: float = 0.0
    _start: int = field(init=False)
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._start, self._since = self.done, self.clock()

    def reach(self, done: int) -> None:
        """Move the count to `done`."""
        self.pause()
        self.resume()
        self.done = done

    def gain(self, count: int) -> None:
        """Move the count on by `count`; what comes at once was known before, and says nothing of the pace."""
        worked = self.seconds
        self.reach(self.done + count)
        if count > AT_ONCE * (self.seconds - worked):
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


def clock_text(seconds: float) -> str:
    """Seconds as 1:20, or as 2:01:20 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def quality(record: Record, prefix: str = "") -> list[str]:
    """Loss, accuracy and margin of a record, as far as it has them."""
    return _parts(
        record,
        (f"{prefix}loss", "{:.4f}", "loss {}"),
        (f"{prefix}rewards/accuracies", "{:.3f}", "accuracy {}"),
        (f"{prefix}rewards/margins", "{:+z.3f}", "margin {}"),
    )


def speed(record: Record) -> list[str]:
    """Pairs and tokens per second of a record, as far as it has them."""
    return _parts(
        record,
        ("pairs_per_second", "{:.1f}", "{} pairs/s"),
        ("tokens_per_second", "{:.0f}", "{} tokens/s"),
    )


def memory(record: Record) -> list[str]:
    """Peak memory of a record in GiB, if it has it."""
    size = record.get("memory_bytes")
    return [] if size is None else [f"memory {size / 2**30:.1f} GiB"]


def train_line(record: Record, pace: Pace) -> str:
    """One logged step as a line."""
    left = pace.eta()
    eta = [] if left is None else [f"eta {clock_text(left)}"]
    head = f"step {record['step']}/{pace.total}"
    return "  ".join([head, *quality(record), *speed(record), *eta, *memory(record)])


def evaluation_line(record: Record, total: int) -> str:
    """One evaluation as a line."""
    values = quality(record, "eval_")
    pairs = _parts(record, ("eval_pairs", "{:.0f}", "{} pairs"))
    return "  ".join([f"step {record['step']}/{total}", " ".join(["held-out", *values[:1]]), *values[1:], *pairs])


def phase_line(name: str, pace: Pace) -> str:
    """How far a phase has come, as a line."""
    left = pace.eta()
    clock = clock_text(pace.seconds) if pace.done >= pace.total else f"eta {clock_text(left)}" if left else ""
    return "  ".join(part for part in (name, _count(pace, name), clock) if part)


@contextmanager
def reading(name: str, total: int) -> Iterator[Advance]:
    """A phase before the run has a tracker; few rows are read too soon to be shown."""
    if total < MANY_ROWS:
        yield lambda count: None
        return
    display = (Bars if on_terminal() else Lines)(0, 0)
    display.open()
    try:
        with display.phase(name, total) as advance:
            yield advance
    finally:
        display.close()


def on_terminal() -> bool:
    """True if stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class Lines:
    """Plain lines on stderr, for log files and pipes."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.pace = Pace(total_steps, start_step)

    def open(self) -> None:
        """Start the clock of the training steps."""
        self.pace.resume()

    def close(self) -> None:
        """Nothing to tidy up: every line is complete."""

    def note(self, text: str) -> None:
        """Write one line."""
        sys.stderr.write(f"{printable(redacted(text))}\n")
        sys.stderr.flush()

    def step(self, step: int) -> None:
        """Count an optimizer step; only logged steps write a line."""
        self.pace.reach(step)

    def train(self, record: Record) -> None:
        """Write a logged step."""
        self.note(train_line(record, self.pace))

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Say now and then how far the phase is, and once when it ends; an evaluation ends with its own line."""
        self.pace.pause()
        pace, said = Pace(total), time.monotonic() - max(0.0, PLAIN_PHASE_SECONDS - FIRST_SECONDS)

        def advance(count: int) -> None:
            nonlocal said
            pace.gain(count)
            if pace.done < total and time.monotonic() - said >= PLAIN_PHASE_SECONDS:
                said = time.monotonic()
                self.note(phase_line(name, pace))

        try:
            yield advance
            if name not in LEAVE_NOTHING:
                self.note(phase_line(name, pace))
        finally:
            self.pace.resume()


class Silence:
    """Shows nothing: of several processes one shows what all do."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.pace = Pace(total_steps, start_step)

    def open(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing to tidy up."""

    def note(self, text: str) -> None:
        """Write nothing."""

    def step(self, step: int) -> None:
        """Count an optimizer step."""
        self.pace.reach(step)

    def train(self, record: Record) -> None:
        """Write nothing."""

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Say nothing of the phase."""
        yield lambda count: None


class Bars:
    """Bars at the foot of a terminal; what stays above them are notes, evaluations and finished phases."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.pace = Pace(total_steps, start_step)
        self.phases: list[tuple[str, Pace]] = []
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

    def close(self) -> None:
        """Take the bars away and give the cursor back."""
        self.live.stop()

    def note(self, text: str) -> None:
        """Write one line above the bars, whatever brackets it holds."""
        self.console.print(Text(printable(redacted(text))), soft_wrap=True)

    def step(self, step: int) -> None:
        """Move the training bar."""
        self.training = True
        self.pace.reach(step)

    def train(self, record: Record) -> None:
        """Show the figures of a logged step under the training bar."""
        self.record = record

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Advance]:
        """Draw a bar while the phase runs; leave a line behind it, but for an evaluation, which ends with its own."""
        self.pace.pause()
        pace = Pace(total)
        self.phases.append((name, pace))
        try:
            yield pace.gain
            if name not in LEAVE_NOTHING:
                self.note(phase_line(name, pace))
        finally:
            self.phases.pop()
            self.pace.resume()

    def render(self) -> Group:
        """Everything at the foot of the terminal as it stands now."""
        parts: list[Table | Text] = []
        if self.training:
            parts.append(_bar("train", self.pace, style="green"))
        if self.record is not None:
            figures = [quality(self.record), speed(self.record) + memory(self.record)]
            parts += [Text(" " * LABEL_COLUMNS + "  ".join(line), style="dim") for line in figures if line]
        parts += [_bar(name, pace, style="cyan") for name, pace in self.phases]
        return Group(*parts)


def _bar(name: str, pace: Pace, style: str) -> Table:
    left = pace.eta()
    grid = Table.grid(expand=True)
    grid.add_column(width=LABEL_COLUMNS)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", min_width=18)
    grid.add_column(justify="right", min_width=13)
    bar = ProgressBar(total=max(pace.total, 1), completed=pace.done, complete_style=style, finished_style=style)
    eta = "" if left is None else f"eta {clock_text(left)}"
    grid.add_row(Text(name), bar, Text(_count(pace, name)), Text(eta, style="dim"))
    return grid


def _count(pace: Pace, name: str) -> str:
    return f"{pace.done}/{pace.total} {UNITS.get(name, '')}".rstrip()


def _parts(record: Record, *wanted: tuple[str, str, str]) -> list[str]:
    """The wanted figures that the record has; a null stands for a figure that is not finite."""
    found = [(record[key], number, words) for key, number, words in wanted if key in record]
    return [words.format(number.format(math.nan if value is None else value)) for value, number, words in found]
