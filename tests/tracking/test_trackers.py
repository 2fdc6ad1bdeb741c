"""TensorBoard and Trackio record what metrics.jsonl holds, each step once and offline; a run goes on without them."""

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from pydantic import ValidationError
from wandb_process import CONFIG, SECRETS, TRAIN

from qlora_dpo.cli import main
from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe.extras import check_extras
from qlora_dpo.recipe.train import TrackTable
from qlora_dpo.tracking.run_log import RunLog

NEEDS_TENSORBOARD = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
NEEDS_TRACKIO = pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
# their dependencies warn of deprecated features
OLD_LIBRARIES = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EVAL = {"step": 20, "epoch": 1.0, "eval_loss": 0.25, "eval_pairs": 60, "seconds": 4.0}
RUN = """
import json, pathlib, socket, sys
connect = socket.socket.connect
def refused(*arguments, **options):
    print("asked for a network", file=sys.stderr)
    raise OSError("there is no network here")
def local_only(sock, address):  # wandb connects to a process of its own
    return connect(sock, address) if isinstance(address, str) or address[0] == "127.0.0.1" else refused()
socket.socket.connect, socket.getaddrinfo = local_only, refused
from qlora_dpo.recipe.train import TrackTable
from qlora_dpo.tracking.run_log import RunLog
folder, track, start, config, *records = sys.argv[1:]
with RunLog(pathlib.Path(folder), 48, start_step=int(start), track=TrackTable(**json.loads(track)),
             config=json.loads(config), name="quickstart") as run:
    for record in map(json.loads, records):
        (run.log_train if "loss" in record else run.log_evaluation)(record)
"""


def train(step: int, loss: float = 0.5) -> dict[str, Any]:
    return {**TRAIN, "step": step, "loss": loss}


def tracked(folder: Path, track: dict[str, Any], start: int, *records: dict[str, Any]) -> list[str]:
    """Log a run in a process of its own that may use no network; returns the lines of its stderr."""
    folder.mkdir(exist_ok=True)
    arguments = [str(folder), json.dumps(track), str(start), json.dumps(CONFIG), *map(json.dumps, records)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *arguments],
        env={**os.environ, **SECRETS, "WANDB_API_KEY": "", "TRACKIO_DIR": str(folder.parent / "trackio")},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr.splitlines()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard shows for a folder: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@NEEDS_TENSORBOARD
@OLD_LIBRARIES
def test_tensorboard_shows_the_metrics(tmp_path: Path) -> None:
    run = tmp_path / "hh"
    lines = tracked(run, {"tensorboard": True}, 0, {**EVAL, "step": 0}, train(10), train(20, 0.25), EVAL)
    assert lines[0] == f"tensorboard: look at it with: tensorboard --logdir {run}/tensorboard"
    shown = curves(run / "tensorboard")
    assert shown["loss"] == [(10, 0.5), (20, 0.25)]
    assert shown["eval_loss"] == [(0, 0.25), (20, 0.25)]
    assert shown["eval_seconds"] == [(0, 4.0), (20, 4.0)]
    assert shown["seconds"] == [(10, 80.0), (20, 80.0)]
    assert set(shown) == set(TRAIN) - {"step"} | {"eval_loss", "eval_pairs", "eval_seconds"}


@NEEDS_TENSORBOARD
@OLD_LIBRARIES
def test_its_file_has_the_recipe_no_secret_and_no_machine_in_its_name(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked(tmp_path / "hh", {"tensorboard": True}, 0, train(10))
    (file,) = (tmp_path / "hh" / "tensorboard").iterdir()
    assert not any(secret.encode() in file.read_bytes() for secret in SECRETS.values())
    assert socket.gethostname() not in file.name
    events = EventAccumulator(str(file.parent)).Reload()
    (text,) = events.Tensors("recipe")
    assert json.loads(text.tensor_proto.string_val[0].decode()) == CONFIG


@NEEDS_TENSORBOARD
@OLD_LIBRARIES
def test_answers_of_evaluations_are_its_texts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompt = {"role": "user", "content": "Where is the <b>library</b>?"}
    with RunLog(tmp_path, 48, track=TrackTable(tensorboard=True)) as run:
        run.log_samples(10, [{"row": 7, "prompt": [prompt], "answer": "On the\nleft."}])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (text,) = events.Tensors("samples/row 7")
    assert text.step == 10
    assert text.tensor_proto.string_val[0].decode() == (
        "    user: Where is the <b>library</b>?\n\n    assistant: On the\n    left."
    )


@NEEDS_TENSORBOARD
@OLD_LIBRARIES
def test_a_resumed_run_goes_on_with_its_curves_and_no_step_is_there_twice(tmp_path: Path) -> None:
    run = tmp_path / "hh"
    tracked(run, {"tensorboard": True}, 0, train(10), train(20), train(30), {**EVAL, "step": 30})
    tracked(run, {"tensorboard": True}, 20, train(30, 0.1), {**EVAL, "step": 30, "eval_loss": 0.125}, train(40, 0.1))
    shown = curves(run / "tensorboard")
    assert shown["loss"] == [(10, 0.5), (20, 0.5), (30, pytest.approx(0.1)), (40, pytest.approx(0.1))]
    assert shown["eval_loss"] == [(30, 0.125)]
    assert len(list((run / "tensorboard").iterdir())) == 2


@NEEDS_TENSORBOARD
@OLD_LIBRARIES
def test_a_run_that_starts_again_hides_the_earlier_attempt(tmp_path: Path) -> None:
    run = tmp_path / "hh"
    tracked(run, {"tensorboard": True}, 0, train(10), train(20))
    tracked(run, {"tensorboard": True}, 0, train(10, 0.25))
    assert curves(run / "tensorboard")["loss"] == [(10, 0.25)]


@NEEDS_TENSORBOARD
@OLD_LIBRARIES
def test_a_folder_for_several_runs_holds_a_folder_for_each_run(tmp_path: Path) -> None:
    (tmp_path / "hh").mkdir()
    lines = tracked(tmp_path / "hh", {"tensorboard": "../logs"}, 0, train(10))
    assert lines[0] == "tensorboard: look at it with: tensorboard --logdir ../logs"
    assert curves(tmp_path / "logs" / "quickstart")["loss"] == [(10, 0.5)]
    assert not (tmp_path / "hh" / "tensorboard").exists()


@NEEDS_TENSORBOARD
@OLD_LIBRARIES
def test_a_tracker_that_cannot_write_costs_the_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = tracked(tmp_path / "hh", {"tensorboard": str(tmp_path / "file")}, 0, train(10), train(20))
    assert lines[0] == (
        f"tensorboard: [Errno 20] Not a directory: '{tmp_path}/file/quickstart'; the run goes on without it"
    )
    assert [line.partition("  ")[0] for line in lines[1:]] == ["step 10/48", "step 20/48"]
    assert len((tmp_path / "hh" / "metrics.jsonl").read_text().splitlines()) == 2


def rows(home: Path) -> list[dict[str, Any]]:
    """The rows of Trackio's database, read with sqlite3."""
    import sqlite3

    with sqlite3.connect(home / "house-rules.db") as database:
        records = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    return [{"run": name, "step": step, **json.loads(values)} for name, step, values in records]


@NEEDS_TRACKIO
def test_trackio_has_the_metrics_without_a_network(tmp_path: Path) -> None:
    lines = tracked(tmp_path / "hh", {"trackio": "house-rules"}, 0, train(10), EVAL)
    assert lines[0] == 'trackio: look at it with: trackio show --project "house-rules"'
    assert "asked for a network" not in lines
    values = {key: value for key, value in TRAIN.items() if key != "step"} | {"loss": 0.5}
    assert rows(tmp_path / "trackio") == [
        {"run": "quickstart", "step": 10, **values},
        {"run": "quickstart", "step": 20, "epoch": 1.0, "eval_loss": 0.25, "eval_pairs": 60, "eval_seconds": 4.0},
    ]
    for file in (tmp_path / "trackio").iterdir():
        assert not any(secret.encode() in file.read_bytes() for secret in SECRETS.values()), file


@NEEDS_TRACKIO
def test_a_resumed_run_is_one_run_in_trackio_and_another_of_its_name_is_left_alone(tmp_path: Path) -> None:
    project = {"trackio": "house-rules"}
    tracked(tmp_path / "other", project, 0, train(10, 9.0))
    tracked(tmp_path / "hh", project, 0, train(10), train(20), train(30))
    tracked(tmp_path / "hh", project, 20, train(30, 0.1))
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "trackio")] == [
        (10, 9.0),
        (10, 0.5),
        (20, 0.5),
        (30, 0.1),
    ]
    tracked(tmp_path / "hh", project, 0, train(10, 0.7))
    assert [row["loss"] for row in rows(tmp_path / "trackio")] == [9.0, 0.7]


@NEEDS_TRACKIO
@NEEDS_TENSORBOARD
@OLD_LIBRARIES
def test_several_trackers_follow_one_run(tmp_path: Path) -> None:
    track = {"trackio": "house-rules", "tensorboard": True, "wandb": "house-rules"}
    tracked(tmp_path / "hh", track, 0, train(10))
    assert curves(tmp_path / "hh" / "tensorboard")["loss"] == [(10, 0.5)]
    assert rows(tmp_path / "trackio")[0]["loss"] == 0.5
    assert list((tmp_path / "hh" / "wandb").glob("offline-run-*/run-*.wandb"))


@NEEDS_TRACKIO
def test_a_database_that_cannot_be_written_costs_the_run_nothing(tmp_path: Path) -> None:
    (tmp_path / "trackio").write_text("")
    _, warning, line = tracked(tmp_path / "hh", {"trackio": "house-rules"}, 0, train(10))
    assert warning.startswith("trackio: ") and warning.endswith("; the run goes on without it")
    assert line.startswith("step 10/48")


@pytest.mark.parametrize("package", ["tensorboard", "trackio"])
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_dpo.recipe.extras.find_spec", lambda name: None)
    track = {"tensorboard": {"tensorboard": True}, "trackio": {"trackio": "p"}}[package]
    with pytest.raises(RecipeError) as raised:
        check_extras(tiny_run.recipe(track=track))
    assert str(raised.value) == (
        f"track.{package} needs the package {package}, which is not installed; install it with: pip install "
        f"'qlora_dpo[{package}]'"
    )


def test_a_missing_package_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora_dpo.recipe.extras.find_spec", lambda name: None)
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nname = "org/model"\n[data]\ntrain = "org/data"\n[track]\ntensorboard = true\n')
    assert main(["train", str(recipe), "--dry-run"]) == 2
    assert "pip install 'qlora_dpo[tensorboard]'" in capsys.readouterr().err


def test_a_package_that_was_removed_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with RunLog(tmp_path, 48, track=TrackTable(tensorboard=True)) as run:
        run.log_train(TRAIN)
    first, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("tensorboard: ") and first.endswith("; the run goes on without it")


def test_a_track_table_without_a_tracker_is_refused() -> None:
    with pytest.raises(ValidationError) as raised:
        tiny_run.recipe(track={})
    assert 'names no tracker; write wandb = "PROJECT", tensorboard = true or trackio = "PROJECT"' in str(raised.value)
