"""Tables of what was found, printed line by line and appended to a file, so that what ends early leaves what it has."""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

GIB = 2**30
YES, NO, UNJUDGED = "yes", "NO", ""


@dataclass
class Report:
    """Where results go, and whether all that has to hold does."""

    output: Path | None
    failed: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def say(self, line: str = "") -> None:
        """Print one line, and append it to the file."""
        print(line, flush=True)
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def begin(self, machine: str) -> None:
        """The heading of one command's results: the command itself, and what it ran on."""
        words = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
        self.say(f"\n### gpu.py {sys.argv[1] if len(sys.argv) > 1 else ''}\n\n`{words}`\n\n{machine}\n")

    def columns(self, *names: str) -> None:
        """Begin a table."""
        self.say(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}")

    def row(self, *cells: object) -> None:
        """One row of it."""
        self.say(f"| {' | '.join(' '.join(str(cell).split()).replace('|', '/') for cell in cells)} |")

    def checks(self) -> None:
        """Begin a table of things that have to hold."""
        self.columns("what", "found", "has to be", "holds")

    def check(self, what: str, found: object, target: str, holds: bool | None) -> None:
        """One of them; None where it is not judged, as on a CPU. What does not hold makes the command fail."""
        if holds is False:
            self.failed.append(what)
        self.row(what, found, target, UNJUDGED if holds is None else YES if holds else NO)

    def target(self, what: str, found: float | None, least: float, unit: str, *, judged: bool) -> None:
        """A figure that is aimed at, as a row of a table of checks; one that is missed is no failure.

        It is not `judged` where the target is for another machine or model.
        """
        aim = f"at least {least:g}{unit}" if judged else ""
        verdict = UNJUDGED if found is None or not judged else YES if found >= least else NO
        self.row(what, "not measured" if found is None else f"{found:.2f}{unit}", aim, verdict)

    def end(self) -> int:
        """How long it took and what does not hold; the exit code."""
        minutes = (time.monotonic() - self.began) / 60
        verdict = f"does not hold: {'; '.join(self.failed)}" if self.failed else "all that has to hold does"
        self.say(f"\n{minutes:.1f} minutes; {verdict}\n")
        return 1 if self.failed else 0


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def last_line(text: str) -> str:
    """The last line of what a command wrote, which is where its errors stand."""
    lines: Sequence[str] = text.strip().splitlines() or [""]
    return lines[-1][:300]
