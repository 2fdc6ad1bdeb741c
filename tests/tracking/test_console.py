"""What the package logs reaches stderr as plain sentences: once, safe to show, and from rank 0 only."""

import errno
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_dpo.cli import main
from qlora_dpo.tracking import console
from qlora_dpo.tracking.run_log import RunLog

logger = logging.getLogger("qlora_dpo.some.module")


@pytest.fixture
def shown() -> Iterator[None]:
    with console.console_logging():
        yield


@pytest.mark.usefixtures("shown")
def test_a_logged_sentence_is_one_line_on_stderr_without_level_or_name(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("100% of the pairs fit")
    logger.warning("one is too long")
    logger.debug("not shown")
    assert capsys.readouterr() == ("", "100% of the pairs fit\none is too long\n")


@pytest.mark.usefixtures("shown")
def test_a_logged_sentence_cannot_control_the_terminal_or_show_a_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_FakeFakeFakeFakeFake")
    logger.info("\x1b[31mred\x07 hf_FakeFakeFakeFakeFake")
    assert capsys.readouterr().err == "red ***\n"


def test_installing_the_handler_twice_shows_a_sentence_once(capsys: pytest.CaptureFixture[str]) -> None:
    with console.console_logging():
        console.install_handler()
        console.install_handler()
        logger.info("once")
    assert capsys.readouterr().err == "once\n"


def test_other_handlers_still_receive_what_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    with console.console_logging():
        logger.info("for both")
    assert caplog.messages == ["for both"]


def test_ranks_above_0_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with console.console_logging():
        with RunLog(tmp_path, 1, silent=True) as run_log:
            run_log.info("rank 1")
            logger.error("rank 1")
        logger.info("rank 0")
        console.silence()
        logger.critical("rank 1")
    assert capsys.readouterr().err == "rank 0\n"


def test_what_is_logged_during_a_run_is_shown_without_a_handler_of_the_caller(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, 1):
        logger.info("during the run")
    logger.info("after it")
    assert capsys.readouterr().err == "during the run\n"


def test_logging_is_after_a_command_as_it_was_before() -> None:
    package = logging.getLogger("qlora_dpo")
    before = package.level, list(package.handlers)
    assert main(["--version"]) == 0
    assert (package.level, list(package.handlers)) == before


class FullDisk(io.StringIO):
    """A stderr that goes to a file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", FullDisk())
    with console.console_logging():
        logger.info("nobody reads this")


def test_the_command_line_imports_neither_rich_nor_torch_for_it() -> None:
    code = "import sys; from qlora_dpo.cli import main; main(['--help']); print({'rich', 'torch'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"
