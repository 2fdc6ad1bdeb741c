"""The command line: help at once, one sentence for every failure, and the right exit code."""

import errno
import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from fork_server import run_forked

from qlora_dpo import __version__, cli, errors, files
from qlora_dpo.cli import main

SHOW_WHERE = "; set QLORA_DPO_TRACEBACK=1 to see where it came from"
LESS_MEMORY = (
    "; lower train.micro_batch_tokens or data.max_length, or set train.gradient_checkpointing = true, "
    "and close other programs that hold memory"
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qlora_dpo", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


def test_help_names_every_command() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name} " in done.stdout for name in cli.commands.commands)


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"qlora-dpo {__version__}\n", "")


@pytest.mark.parametrize("name", sorted(cli.commands.commands))
def test_the_help_of_a_command_starts_with_a_verb_and_shows_a_line_to_paste(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"\n  qlora-dpo {name}" in told


def test_help_imports_no_library_but_click() -> None:
    code = (
        "import sys; from qlora_dpo.cli import main; main(['--help']);"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'accelerate', 'rich', 'pydantic', 'wandb'};"
        "sys.stderr.write(' '.join(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a command; see qlora-dpo --help"),
        (["trian"], "No such command 'trian'. Did you mean 'train'? - see qlora-dpo --help"),
        (["zzz"], "No such command 'zzz'; see qlora-dpo --help"),
        (["train"], "Missing argument 'RECIPE'; see qlora-dpo train --help"),
        (["train", "a", "b"], "Got unexpected extra argument (b); see qlora-dpo train --help"),
        (
            ["train", "a", "--dry-rum"],
            "No such option '--dry-rum'. Did you mean '--dry-run'? - see qlora-dpo train --help",
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(arguments)
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err) == (2, "", f"qlora-dpo: {message}\n")


def failing_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command, added for this test, that raises `error`."""

    @click.command()
    def fail() -> None:
        raise error

    monkeypatch.setitem(cli.commands.commands, "fail", fail)
    return main(["fail"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.RecipeError("a.toml: is wrong"), 2, "a.toml: is wrong"),
        (errors.DataError("a.csv:3: is wrong"), 1, "a.csv:3: is wrong"),
        (errors.GateError("0.59 is below 0.60"), 3, "0.59 is below 0.60"),
        (errors.DoesNotFitError("needs 20 GB"), 4, "needs 20 GB"),
        (errors.Interrupted("stopped at step 7"), 130, "stopped at step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 4, "out of memory (no details)" + LESS_MEMORY),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            4,
            "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)" + LESS_MEMORY,
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            4,
            "out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.)" + LESS_MEMORY,
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            "/x/y: the disk is full; free some space, or set QLORA_DPO_CACHE to another disk",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "the disk is full; free some space, or set QLORA_DPO_CACHE to another disk",
        ),
        (
            KeyError("x"),
            1,
            "something went wrong that this program does not foresee: KeyError: 'x'" + SHOW_WHERE,
        ),
        (
            ValueError("two\n  lines"),
            1,
            "something went wrong that this program does not foresee: ValueError: two lines" + SHOW_WHERE,
        ),
        (click.ClickException("a file is missing"), 1, "a file is missing"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_failure_is_a_sentence_and_an_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failing_with(error, monkeypatch) == code
    assert capsys.readouterr().err.strip() == f"qlora-dpo: {message}"


def test_torch_without_memory_is_exit_code_4(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert failing_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), monkeypatch) == 4


def test_an_allocation_that_the_machine_refuses_is_exit_code_4(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.int8)
    assert failing_with(refused.value, monkeypatch) == 4


def test_several_problems_are_several_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_with(errors.RecipeError("one\ntwo"), monkeypatch)
    assert capsys.readouterr().err == "qlora-dpo: one\nqlora-dpo: two\n"


def test_a_message_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_with(errors.DataError("row \x1b[31m3\x1b[0m is \u202ewrong\x07"), monkeypatch)
    assert capsys.readouterr().err == "qlora-dpo: row 3 is wrong\n"


def test_the_traceback_is_shown_to_who_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_DPO_TRACEBACK", "1")
    failing_with(KeyError("x"), monkeypatch)
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):\n")
    assert printed.splitlines()[-1].startswith("qlora-dpo: something went wrong")


def test_a_reader_that_goes_away_causes_no_traceback() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "qlora_dpo", "--help"], stdout=writes, stderr=subprocess.PIPE, text=True
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_ends_the_process_with_130(tmp_path: Path) -> None:
    code = (
        "import sys, time, click, qlora_dpo.cli as cli\n"
        "@click.command()\n"
        "def wait() -> None:\n"
        "    click.echo('waiting')\n"
        "    time.sleep(60)\n"
        "cli.commands.add_command(wait)\n"
        "sys.exit(cli.main(['wait']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told.strip()) == (130, "qlora-dpo: interrupted")


def test_what_the_user_has_set_is_left_alone() -> None:
    code = (
        "import os; from qlora_dpo.cli.startup.quiet import quiet_libraries; quiet_libraries();"
        "print(os.environ['TRANSFORMERS_VERBOSITY'])"
    )
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "debug"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "debug\n"


def test_importing_the_quantizer_prints_nothing() -> None:
    code = "from qlora_dpo.cli.startup import quiet; quiet.quiet_libraries(); import transformers, bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (errno.EACCES, 1, "cannot be read or written (Permission denied); look at its permissions, or name another"),
        (
            errno.EROFS,
            1,
            "cannot be read or written (Read-only file system); look at its permissions, or name another",
        ),
        (
            errno.EFBIG,
            1,
            "would be larger than a file may be here; choose another disk, or raise the limit (ulimit -f)",
        ),
        (errno.ENAMETOOLONG, 2, "is too long for the name of a file (255 bytes at most); name a shorter one"),
    ],
)
def test_what_the_operating_system_refuses_is_a_sentence(
    number: int,
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failing_with(OSError(number, os.strerror(number), "/x/y"), monkeypatch) == code
    assert capsys.readouterr().err == f"qlora-dpo: /x/y: {sentence}\n"


def test_an_unwritable_cache_names_the_variable_that_moves_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QLORA_DPO_CACHE", "/x")
    assert failing_with(PermissionError(errno.EACCES, "Permission denied", "/x/logps/y"), monkeypatch) == 1
    assert capsys.readouterr().err == (
        "qlora-dpo: /x/logps/y: cannot be read or written (Permission denied); set QLORA_DPO_CACHE to a folder that "
        "you may read and write\n"
    )
    with pytest.raises(errors.SourceError) as refused, files.translate_disk_errors(Path("/x/logps/y")):
        raise OSError(errno.EROFS, "Read-only file system")
    assert str(refused.value) == (
        "/x/logps/y: cannot be written (Read-only file system); set QLORA_DPO_CACHE to a folder that you may write to"
    )


LONG_NAME = "é" * 140


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "lint", "p.jsonl", "--fix", LONG_NAME],
        ["data", "split", "p.jsonl", "-o", LONG_NAME],
        ["data", "show", LONG_NAME + ".jsonl"],
        ["data", "show", LONG_NAME],
        ["runs", LONG_NAME],
        ["report", LONG_NAME],
        ["verify", LONG_NAME],
        ["init", LONG_NAME + ".toml"],
        ["compare", LONG_NAME, "-p", "Hi"],
    ],
    ids=" ".join,
)
def test_a_name_of_more_than_255_bytes_is_a_sentence(
    empty_folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = '{{"prompt": "{}?", "chosen": "a", "rejected": "b"}}\n'
    Path("p.jsonl").write_text("".join(line.format(number) for number in range(40)))
    code = main(arguments)
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert (code, "foresee" in told, "é" in told) == (2, False, True)
    assert sorted(path.name for path in empty_folder.iterdir()) == ["p.jsonl"]


def test_a_name_of_255_bytes_can_be_written(empty_folder: Path) -> None:
    name = "é" * 125 + ".txt"
    files.atomic_write(Path(name), "text")
    assert Path(name).read_text() == "text"
    with files.atomic_folder(Path("x" * 255)) as folder:
        (folder / "y").write_text("z")
    assert Path("x" * 255, "y").read_text() == "z"


def test_a_file_larger_than_allowed_is_named_and_nothing_is_left(empty_folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(errors.SourceError) as refused:
            files.atomic_write(Path("big"), "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(refused.value).startswith("big: would be larger than a file may be here; ")
    assert list(empty_folder.iterdir()) == []


def test_a_command_goes_on_when_nobody_reads_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(io.FileIO(writer, "w"), encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        done = []

        def told() -> None:
            for _ in range(3):
                click.echo("line")
                sys.stdout.flush()
            done.append(True)

        monkeypatch.setitem(cli.commands.commands, "told", click.Command("told", callback=told))
        assert (main(["told"]), done) == (1, [True])
        assert sys.stdout is stream


def test_a_command_goes_on_without_any_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["runs", "--help"]) == 0


SPEAKING_HANDLER = """
import os, signal, sys, threading, time
from qlora_dpo.cli.startup.closed_output import lasting_output
with lasting_output():
    signal.signal(signal.SIGUSR1, lambda *given: sys.stderr.write("stopping\\n"))
    end = time.monotonic() + 1
    def interrupt():
        while time.monotonic() < end:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(3e-4)
    thread = threading.Thread(target=interrupt)
    thread.start()
    while time.monotonic() < end:
        print("a line", file=sys.stderr)
    thread.join()
"""


def test_a_signal_handler_may_speak_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = str(Path(__file__).parents[2])
    done = run_forked(["-c", SPEAKING_HANDLER], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-500:]
    assert {"a line", "stopping"} <= set(done.stderr.splitlines())
