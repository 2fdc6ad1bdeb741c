"""One run at a time in a folder; what a dead one leaves is taken over, and said."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from file_faults import forked

from qlora_dpo.errors import RunError
from qlora_dpo.lock import LOCK_FILE, lock_folder


def child(act: Callable[[], int]) -> int:
    """Fork a process that ends with what `act` returns; its pid."""
    pid = forked()
    if not pid:
        try:
            code = act()
        except BaseException:
            code = 77
        os._exit(code)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_of_four_runs_that_start_at_once_exactly_one_gets_the_folder(tmp_path: Path) -> None:
    for race in range(6):
        folder = tmp_path / str(race) / "run"
        start_out, start_in = os.pipe()
        end_out, end_in = os.pipe()

        def run(
            folder: Path = folder, start: int = start_out, end: int = end_out, ins: tuple[int, int] = (start_in, end_in)
        ) -> int:
            for each in ins:
                os.close(each)
            os.read(start, 1)  # returns for all at once, when the parent closes its end
            try:
                with lock_folder(folder, lambda words: None):
                    os.read(end, 1)
                    return 0
            except RunError:
                return 3

        for _ in range(4):
            child(run)
        os.close(start_in)
        codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)]
        os.close(end_in)
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
        assert codes == [3, 3, 3, 0], race
        assert list(folder.iterdir()) == []
        for each in (start_out, end_out):
            os.close(each)


def test_the_owner_is_named_to_who_comes_later(tmp_path: Path) -> None:
    with lock_folder(tmp_path, pytest.fail):

        def second() -> int:
            try:
                with lock_folder(tmp_path, lambda words: None):
                    return 0
            except RunError as error:
                (tmp_path / "said").write_text(str(error))
                return 3

        assert code_of(child(second)) == 3
    said = (tmp_path / "said").read_text()
    who = f"process {os.getpid()} on {socket.gethostname()[:64]} (since 20"
    assert said.startswith(f"{tmp_path}: is in use by {who}")
    assert said.endswith("); wait for it, or name another folder with -o DIR")


def test_the_lock_of_a_dead_run_is_taken_over_and_said(tmp_path: Path) -> None:
    def dies() -> int:
        with lock_folder(tmp_path, lambda words: None):
            os._exit(9)

    pid = child(dies)
    assert code_of(pid) == 9
    assert (tmp_path / LOCK_FILE).is_file()
    said: list[str] = []
    with lock_folder(tmp_path, said.append):
        assert said[0].startswith(f"{tmp_path}: taken over from process {pid} on {socket.gethostname()[:64]} (since 20")
        assert said[0].endswith("), which ended without leaving")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\x00" * 50])
def test_a_lock_file_with_nonsense_in_it_is_no_lock(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with lock_folder(tmp_path, pytest.fail):
        pass
