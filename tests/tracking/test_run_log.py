"""What a run log writes: metrics.jsonl, progress on stderr with and without a terminal, and a real wandb run."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkedPython
from wandb_process import CONFIG, OFFLINE, SECRETS, TRACKED, TRAIN, tracked
from wandb_records import history, wandb_records

from qlora_dpo.errors import RunError
from qlora_dpo.tracking import progress, run_log
from qlora_dpo.tracking.progress import ProgressBars, ProgressLines
from qlora_dpo.tracking.run_log import RunLog

EVAL = {
    "step": 10,
    "epoch": 0.5,
    "eval_loss": 0.25,
    "eval_rewards/accuracies": 0.975,
    "eval_rewards/margins": 1.5,
    "eval_pairs": 60,
    "eval_ties": 0,
    "seconds": 4.0,
}


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that progress is measured by."""
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_are_one_json_object_per_line_and_complete_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, 48) as run:
        run.log_train(TRAIN)
        assert lines_of(tmp_path / "metrics.jsonl") == [{"kind": "train", **TRAIN}]
        run.log_evaluation(EVAL)
        assert lines_of(tmp_path / "metrics.jsonl")[1] == {"kind": "eval", **EVAL}
    assert run_log.read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "train", **TRAIN}, {"kind": "eval", **EVAL}]


def test_a_second_run_log_appends(tmp_path: Path) -> None:
    for step in (10, 20):
        with RunLog(tmp_path, 48, start_step=step - 10) as run:
            run.log_train({**TRAIN, "step": step})
    assert [record["step"] for record in lines_of(tmp_path / "metrics.jsonl")] == [10, 20]


def test_a_value_that_is_not_finite_is_written_as_null_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, 48) as run:
        run.log_train({"step": 3, "epoch": 0.1, "loss": float("nan"), "grad_norm": float("inf")})
    record = lines_of(tmp_path / "metrics.jsonl")[0]
    assert record == {"kind": "train", "step": 3, "epoch": 0.1, "loss": None, "grad_norm": None}
    assert capsys.readouterr().err.splitlines() == [
        "step 3: not finite, written as null to metrics.jsonl: loss, grad_norm",
        "step 3/48  loss nan  eta 0:00",
    ]


def test_truncating_keeps_the_steps_up_to_the_one_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [f'{{"kind": "train", "step": {step}, "epoch": 0.5}}\n' for step in (10, 20, 20, 30)]
    path.write_text("".join(records) + '{"kind": "train", "st', encoding="utf-8")
    run_log.truncate_metrics(path, 20)
    assert path.read_text(encoding="utf-8") == "".join(records[:3])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_does_nothing_where_there_is_no_file(tmp_path: Path) -> None:
    run_log.truncate_metrics(tmp_path / "metrics.jsonl", 20)
    assert list(tmp_path.iterdir()) == []


def test_on_step_is_called_after_every_optimizer_step(tmp_path: Path) -> None:
    steps: list[int] = []
    with RunLog(tmp_path, 48, on_step=steps.append) as run:
        for step in (1, 2):
            run.step(step)
        run.log_train({**TRAIN, "step": 2})
    assert steps == [1, 2]


@pytest.mark.parametrize("damaged", ["{broken\n", "[1]\n", '{"kind": "train"}\n', '{"step": "10"}\n', "\xff\n"])
def test_a_damaged_line_is_named(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(('{"step": 10}\n' + damaged + '{"step": 20}\n').encode("latin-1"))
    with pytest.raises(RunError) as caught:
        run_log.truncate_metrics(path, 20)
    assert str(caught.value) == f"{path}:2: is not a metrics record; the file was changed or damaged"


def test_without_a_terminal_each_logged_step_is_a_plain_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with RunLog(tmp_path, 48) as run:
        with run.phase("reference", 220) as advance:
            advance(220)
        clock.now += 20
        run.log_train(TRAIN)
        with run.phase("evaluate", 60) as advance:
            advance(60)
            clock.now += 1000
        run.log_evaluation(EVAL)
        run.info("[bold]plain\x1b[31m text")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "reference  220/220 pairs  0:00",
        "step 10/48  loss 0.6931  accuracy 0.500  margin +0.000  1.9 pairs/s  410 tokens/s  eta 1:16  memory 1.2 GiB",
        "step 10/48  held-out loss 0.2500  accuracy 0.975  margin +1.500  60 pairs",
        "[bold]plain text",
    ]


def test_a_long_phase_writes_a_line_now_and_then_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PHASE_LINE_SECONDS", 0.0)
    with RunLog(tmp_path, 48) as run, run.phase("answers", 4) as advance:
        advance(2)
        advance(2)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"answers  2/4(  eta 0:00)?", first)
    assert last == "answers  4/4  0:00"


def test_a_phase_that_fails_writes_no_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), RunLog(tmp_path, 48) as run, run.phase("answers", 4):
        raise RuntimeError
    assert capsys.readouterr().err == ""


def test_eta_is_the_mean_pace_of_this_run_times_the_steps_left_and_phases_do_not_count(clock: Clock) -> None:
    steps = progress.StepProgress(48, 24)
    display = ProgressLines(steps)
    clock.now = 100.0
    display.open()
    assert progress.eta(steps.task) is None
    clock.now += 6.0
    steps.set_step(26)
    assert progress.eta(steps.task) == pytest.approx(6.0 / 2 * 22)
    with display.phase("evaluate", 10), display.phase("read", 10):
        clock.now += 500.0
    clock.now += 6.0
    steps.set_step(28)
    assert progress.eta(steps.task) == pytest.approx(12.0 / 4 * 20)
    clock.now += 2000.0  # a step slower than the 30 seconds that rich looks back by default
    steps.set_step(29)
    assert progress.eta(steps.task) == pytest.approx(2012.0 / 5 * 19)
    steps.set_step(48)
    assert progress.eta(steps.task) == 0.0


def test_the_first_step_is_no_pace_and_evaluations_to_come_are_added(clock: Clock) -> None:
    steps = progress.StepProgress(10, 0, evaluation_steps=[5, 10])
    with steps.evaluation(), ProgressLines(steps).phase("evaluate", 10):
        clock.now += 30.0
    clock.now += 60.0  # slower than any other
    steps.set_step(1)
    assert progress.eta(steps.task) is None
    for step in range(2, 6):
        clock.now += 4.0
        steps.set_step(step)
    assert progress.eta(steps.task) == pytest.approx(4.0 * 5 + 2 * 30)
    with steps.evaluation():
        clock.now += 20.0
    clock.now += 4.0
    steps.set_step(6)
    assert progress.eta(steps.task) == pytest.approx(4.0 * 4 + 20)


def test_what_a_cache_knew_does_not_count_towards_the_pace(clock: Clock) -> None:
    bars = progress.make_progress()
    task = progress.start_task(bars, "reference", 1000)
    advance = progress.advance_task(bars, task)
    advance(900)
    assert progress.eta(task) is None
    clock.now = 5.0
    advance(20)
    assert progress.eta(task) == pytest.approx(5.0 / 20 * 80)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (80, "1:20"), (7280, "2:01:20")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert progress.format_clock(seconds) == text


def screen(command: list[str], columns: int, env: dict[str, str]) -> tuple[str, str]:
    """Run Python with these arguments, where stderr is a real terminal; return its output there and on stdout."""
    import fcntl
    import termios

    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with ForkedPython(command, cwd=Path.cwd(), stdout=subprocess.PIPE, stderr=stderr, env=env) as process:
        os.close(stderr)
        output = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # on Linux, the other end is closed
                break
            if not part:
                break
            output += part
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(terminal)
    assert process.returncode == 0, output.decode()
    return output.decode(), out.decode()


def lines_shown(seen: str) -> list[str]:
    """Every line that was ever drawn, without colours and cursor movements."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain)]


ON_A_TERMINAL = """
import pathlib, sys, time
from qlora_dpo.tracking.run_log import RunLog
with RunLog(pathlib.Path(sys.argv[1]), 48) as run:
    with run.phase("reference", 220) as advance:
        time.sleep(0.01)
        advance(110)
        time.sleep(0.4)
        advance(110)
    for step in range(1, 11):
        run.step(step)
    run.log_train({"step": 10, "epoch": 0.5, "loss": 0.6931, "rewards/accuracies": 0.5, "rewards/margins": 0.0,
                   "pairs_per_second": 1.94, "tokens_per_second": 410.2, "memory_bytes": 1288490188})
    time.sleep(0.4)
    run.info("a [red]note[/red]")
    run.log_evaluation({"step": 10, "epoch": 0.5, "eval_loss": 0.25, "eval_pairs": 60})
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_there_are_bars_with_the_figures_and_stdout_stays_empty(tmp_path: Path, columns: int) -> None:
    env = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
    env.pop("COLUMNS", None)
    seen, out = screen(["-c", ON_A_TERMINAL, str(tmp_path)], columns, env)
    lines = lines_shown(seen)
    assert out == ""
    assert any(re.fullmatch(r"reference  ━+╸?━* +110/220 pairs +eta 0:00", line) for line in lines)
    assert any(re.fullmatch(r"train      ━+[╸╺]?━* +10/48 +eta 0:\d\d", line) for line in lines)
    assert "           loss 0.6931  accuracy 0.500  margin +0.000" in lines
    assert "           1.9 pairs/s  410 tokens/s  memory 1.2 GiB" in lines
    assert "reference  220/220 pairs  0:00" in lines
    assert "a [red]note[/red]" in lines
    assert "step 10/48  held-out loss 0.2500  60 pairs" in lines
    assert max(len(line) for line in lines) <= columns
    assert seen.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in seen[seen.rindex("\x1b[?25l") :]


def test_bars_fit_a_narrow_terminal(tmp_path: Path) -> None:
    env = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
    env.pop("COLUMNS", None)
    lines = lines_shown(screen(["-c", ON_A_TERMINAL, str(tmp_path)], 40, env)[0])
    drawn = [line for line in lines if "held-out" not in line]  # the terminal wraps what stays
    assert any(re.fullmatch(r"train      ━+[╸╺]?━* +10/48 +eta 0:\d\d", line) for line in drawn)
    assert "           margin +0.000" in drawn
    assert max(len(line) for line in drawn) <= 40


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(RunLog(tmp_path, 1).display, ProgressLines)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(RunLog(tmp_path, 1).display, ProgressBars)


def test_wandb_holds_the_metrics_and_the_recipe_and_no_secret(tmp_path: Path) -> None:
    later = {**TRAIN, "step": 20, "epoch": 1.0, "loss": 0.5}
    done = tracked(tmp_path, TRAIN, EVAL, later, env={**OFFLINE, **SECRETS})
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr

    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    records = wandb_records(file)
    expected: dict[int, dict[str, Any]] = {}
    for record in lines_of(tmp_path / "metrics.jsonl"):
        row = expected.setdefault(record.pop("step"), {})
        if record.pop("kind") == "eval":
            record["eval_seconds"] = record.pop("seconds")
        row.update(record)
    assert set(expected) == {10, 20}
    assert history(records) == expected

    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert config == CONFIG
    assert (run.project, run.display_name, run.host) == ("house-rules", "quickstart", "")
    assert not run.git.commit

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 3
    for path in written:
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS.values()), path
    endings = {path.suffix for path in (tmp_path / "wandb").rglob("*") if path.is_file()}
    assert endings == {".wandb", ".log", ".txt"}  # no code, no packages, no metadata, no patch; run_id.txt is ours


def test_wandb_is_offline_and_reports_it_once_when_nobody_is_logged_in(tmp_path: Path) -> None:
    done = tracked(tmp_path, TRAIN, env={})
    assert done.stderr.splitlines() == [
        f'wandb: offline; after "wandb login", upload with: wandb sync {tmp_path}/wandb/offline-run-*',
        "step 10/48  loss 0.6931  accuracy 0.500  margin +0.000  1.9 pairs/s  410 tokens/s  eta 0:00  memory 1.2 GiB",
    ]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_a_resumed_run_keeps_its_wandb_run(tmp_path: Path) -> None:
    for start in (0, 10):
        done = tracked(tmp_path, {**TRAIN, "step": start + 10}, start=start)
        assert "goes on without" not in done.stderr
    ids = {file.name for file in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    assert ids == {f"run-{(tmp_path / 'wandb' / 'run_id.txt').read_text().strip()}.wandb"}


def test_a_run_goes_on_when_wandb_does_not(tmp_path: Path) -> None:
    done = tracked(tmp_path, TRAIN, project="not/a/name")
    assert (done.returncode, done.stdout) == (0, "True\n")
    warning, line = done.stderr.splitlines()
    assert warning.startswith("wandb: ")
    assert warning.endswith("; the run goes on without it")
    assert line.startswith("step 10/48  loss 0.6931")
    assert lines_of(tmp_path / "metrics.jsonl") == [{"kind": "train", **TRAIN}]


def test_without_the_track_table_wandb_is_not_imported(tmp_path: Path) -> None:
    code = TRACKED.replace("TrackTable(wandb=project)", "None")
    arguments = [str(tmp_path), "p", "0", "{}", json.dumps(TRAIN)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
