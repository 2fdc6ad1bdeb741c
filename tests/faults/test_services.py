"""A hub or a tracker that is down, slow, refuses, breaks or is cut off: what is cached is trained on all the same."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub
from workplace import DATA, HH, MODEL, Workplace, closed_port, fill

COMMANDS = """
import contextlib, hashlib, io, json, pathlib, sys, time, urllib.request
from qlora_dpo.cli import main
url = sys.argv[1]
for fault, arguments in json.loads(sys.argv[2]):
    if url:
        urllib.request.urlopen(f"{url}/fault/{fault}").read()
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    adapter = pathlib.Path(arguments[arguments.index("-o") + 1], "adapter_model.safetensors")
    digest = hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.is_file() else None
    print(json.dumps([code, err.getvalue(), digest, time.monotonic() - start]))
"""
SMALL = ("train.batch_size=8", "train.eval_steps=9", "samples.prompts=0", "train.max_steps=2")
Said = tuple[int, str, str | None, float]


def train(output: str, *changes: str) -> list[str]:
    sets = [word for change in (*SMALL, *changes) for word in ("--set", change)]
    return ["train", HH, "-o", f"adapters/{output}", *sets]


def run(place: Workplace, *commands: tuple[str, list[str]], down: bool = False, **environment: str) -> list[Said]:
    """Train with one fault of the hub after another, in one process."""
    if down:
        environment["HF_ENDPOINT"] = closed_port()
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, "" if down else place.hub.url, json.dumps(commands)],
        cwd=place.folder,
        env=place.environment(**environment),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    assert not any("Traceback" in each[1] for each in found)
    return found  # type: ignore[return-value]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    fill(tmp_path / "hub")
    with Hub(tmp_path / "hub") as hub:
        yield Workplace(tmp_path / "work", hub)


FAULTS = ["401", "403", "429", "500", "503", "cut"]


@pytest.mark.parametrize("faults", [FAULTS, pytest.param(["slow"], marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_what_is_cached_is_trained_on_whatever_the_hub_answers(place: Workplace, faults: list[str]) -> None:
    first, *others = run(place, ("", train("first")), *((fault, train(f"with-{fault}")) for fault in faults))
    assert first[0] == 0, first[1]
    for fault, (code, err, digest, seconds) in zip(faults, others, strict=True):
        assert (code, digest) == (0, first[2]), (fault, err)
        assert seconds < (60 if fault == "slow" else 30)


def test_what_is_cached_is_trained_on_with_the_hub_down_and_pinned_it_is_not_asked(place: Workplace) -> None:
    (first,) = run(place, ("", train("first")))
    (again,) = run(place, ("", train("again")), down=True)
    assert first[0] == again[0] == 0 and first[2] == again[2]
    commits = {"model": place.hub.commit("models", MODEL), "data": place.hub.commit("datasets", DATA)}
    place.hub.log.clear()
    (pinned,) = run(place, ("500", train("pinned", *(f"{key}.revision={each}" for key, each in commits.items()))))
    assert (pinned[0], pinned[2]) == (0, first[2]), pinned[1]
    assert place.hub.log == ["GET /fault/500 -> 200"]


@pytest.mark.parametrize("faults", [FAULTS, pytest.param(["slow"], marks=pytest.mark.slow)], ids=["quick", "slow"])
def test_what_is_not_cached_is_refused_in_a_sentence_and_nothing_is_left(place: Workplace, faults: list[str]) -> None:
    for fault, (code, err, digest, seconds) in zip(
        faults, run(place, *((fault, train("x")) for fault in faults)), strict=True
    ):
        last = err.splitlines()[-1]
        remedy = {"401": "log in again with `hf auth login`", "403": "log in again with `hf auth login`"}
        answered = f"the hub answered with an error ({fault}); {remedy.get(fault, 'try later')}"
        trouble = answered if fault.isdigit() else "the hub cannot be reached; connect and try again"
        assert (code, digest, last) == (1, None, f"qlora-dpo: {MODEL}: is not in the cache, and {trouble}")
        assert seconds < 40
    assert not (place.folder / "adapters").exists() or not list((place.folder / "adapters").iterdir())
