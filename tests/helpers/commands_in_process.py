"""Many commands one after another in one process, which spares all but the first the imports."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fork_server import run_forked

RUN = """
import contextlib, io, json, sys, time
from qlora_dpo.cli import main
from qlora_dpo.cli.text import train_text
train_text.write_report = lambda *some: []  # a third of the time of a tiny run, and nobody looks at these reports
for arguments in json.load(sys.stdin):
    if "accelerate.state" in sys.modules:  # as if the next command had a process of its own
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b""))
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue(), time.monotonic() - start]))
"""


@dataclass(frozen=True)
class Said:
    """What one command ended with."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def last(self) -> tuple[int, str]:
        """The exit code and the last line of stderr."""
        return self.code, self.err.splitlines()[-1]


def said(
    commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str], within: Sequence[str] = ()
) -> list[Said]:
    """Run `qlora-dpo` with each of `commands` in `folder`; none may print a traceback."""
    if within:
        command, given = [*within, sys.executable, "-c", RUN], json.dumps(commands)
        done = subprocess.run(command, input=given, cwd=folder, env=environment, capture_output=True, text=True)
    else:
        done = run_forked(["-c", RUN], input=json.dumps(commands), cwd=folder, env=environment, timeout=600)
    found = [Said(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    assert [each for each in found if "Traceback" in each.err] == []
    return found


def here(**changed: str) -> dict[str, str]:
    """The environment of this process, in which the package is found, with `changed` on top."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **changed}
