"""A hub or a tracker that is down, slow, refuses, breaks or is cut off: what is cached is trained on all the same."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_sandbox import DATA, HH, MODEL, Workplace, closed_port, fill
from fork_server import run_forked
from hub import Hub
from tracking_service import Service
from wandb_process import TRAIN, tracked

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
    command = ["-c", COMMANDS, "" if down else place.hub.url, json.dumps(commands)]
    done = run_forked(command, cwd=place.folder, env=place.environment(HUB_RETRIES_AT_ONCE="1", **environment))
    found = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    assert not any("Traceback" in each[1] for each in found)
    return found  # type: ignore[return-value]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    fill(tmp_path / "hub")
    with Hub(tmp_path / "hub") as hub:
        yield Workplace(tmp_path / "work", hub)


FAULTS = ["401", "429", "500", "cut"]
SLOW = pytest.param(["403", "503", "slow"], marks=pytest.mark.slow)


@pytest.mark.parametrize("faults", [FAULTS, SLOW], ids=["quick", "slow"])
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


@pytest.mark.parametrize("faults", [FAULTS, SLOW], ids=["quick", "slow"])
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


AT_THE_START = ["401", "500", "cut", pytest.param("slow", marks=pytest.mark.slow)]


@pytest.mark.parametrize("fault", AT_THE_START)
def test_a_tracker_that_fails_at_the_start_has_the_run_recorded_offline(tmp_path: Path, fault: str) -> None:
    with Hub(tmp_path) as broken:
        broken.fault = fault
        done = tracked(tmp_path, TRAIN, env={"WANDB_BASE_URL": broken.url, "WANDB_API_KEY": "feedc0de" * 5})
    assert (done.returncode, done.stdout) == (0, "True\n")
    cannot, offline, step = done.stderr.splitlines()
    assert cannot.startswith("wandb: the service cannot be used (")
    assert offline == (f'wandb: offline; after "wandb login", upload with: wandb sync {tmp_path}/wandb/offline-run-*')
    assert step.startswith("step 10/48  loss 0.6931")
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1


@pytest.mark.slow
def test_a_tracker_that_is_down_has_the_run_recorded_offline(tmp_path: Path) -> None:
    done = tracked(tmp_path, TRAIN, env={"WANDB_BASE_URL": closed_port(), "WANDB_API_KEY": "feedc0de" * 5})
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert "connection refused" in done.stderr.splitlines()[0]
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_a_tracker_that_answers_gets_the_record(tmp_path: Path) -> None:
    with Service() as service:
        done = tracked(tmp_path, TRAIN, env={"WANDB_BASE_URL": service.url, "WANDB_API_KEY": "feedc0de" * 5})
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    assert any("wandb-history.jsonl" in each and "rewards/accuracies" in each for each in service.log)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["401", "500", "cut", "slow"])
def test_a_tracker_that_breaks_after_the_start_holds_up_the_end_for_half_a_minute(tmp_path: Path, fault: str) -> None:
    with Service(fault) as service:
        started = time.monotonic()
        done = tracked(tmp_path, TRAIN, env={"WANDB_BASE_URL": service.url, "WANDB_API_KEY": "feedc0de" * 5})
    assert time.monotonic() - started < 60
    assert (done.returncode, done.stdout) == (0, "True\n")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("step 10/48  loss 0.6931")
    told = fault != "401"  # then wandb gives up by itself, and says nothing
    assert lines[1:] == told * [
        f"wandb: not all was uploaded within 30 seconds; upload the rest with: wandb sync {tmp_path}/wandb/run-*"
    ]
