"""Real failures through the real command line: each is one sentence, the right exit code, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hub import Hub
from workplace import DATA, HH, MODEL, Workplace, closed_port, fill, rows

RUN = """
import contextlib, io, json, sys, time
from qlora_dpo.cli import main
for arguments in json.loads(sys.argv[1]):
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


def said(place: Workplace, *commands: list[str], **environment: str) -> list[Said]:
    """Run commands one after another in one process, which spares the imports; none may print a traceback."""
    done = subprocess.run(
        [*UNSHARED.get(place.folder, ()), sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=place.folder,
        env=place.environment(**environment),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [Said(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    assert [each for each in found if "Traceback" in each.err or each.out] == []
    return found


UNSHARED: dict[Path, tuple[str, ...]] = {}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    fill(root)
    silent = root / "models" / "acme" / "no-template"
    shutil.copytree(root / "models" / MODEL, silent)
    (silent / "chat_template.jinja").unlink()
    pickled = root / "models" / "acme" / "pickled"
    shutil.copytree(root / "models" / MODEL, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with Hub(root) as serving:
        yield serving


@pytest.fixture
def place(hub: Hub, tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "work", hub)


def written(place: Workplace) -> list[str]:
    """What a command left in the folder beside the caches."""
    return sorted(str(each.relative_to(place.folder)) for each in place.folder.rglob("*") if each.is_file() and each.parts[len(place.folder.parts)] not in ("hf", "cache"))


def train(*changes: str, output: str = "adapters/x") -> list[str]:
    """The arguments of a short training run with some keys changed."""
    sets = [word for change in changes for word in ("--set", change)]
    return ["train", HH, "-o", output, "--max-steps", "1", *sets]


def test_x(place: Workplace) -> None:
    found = said(
        place,
        train("model.name=acme/none"),
        train("model.revision=v9"),
        train("model.name=acme/pickled"),
        train("model.name=acme/no-template"),
        train("data.train=acme/none"),
        train("data.eval_split=dev"),
        train("lora.rr=8"),
        train("lora.target_modules=[\"nope\"]"),
        ["merge"],
        ["merge", "adapters/none"],
        ["chat"],
        ["chat", "acme/none"],
    )
    for each in found:
        print(each.last, each.seconds)
    print(written(place))
    assert 0
