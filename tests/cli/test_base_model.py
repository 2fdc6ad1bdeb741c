"""`--base-model`: an adapter whose base has moved opens in every command that reads it, and on no other base."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import saved_adapters
import tiny_run

from qlora_dpo.cli import main

pytestmark = tiny_run.LIBRARIES_WARN

COMMANDS = {
    "chat": ["--temperature", "0", "--max-new-tokens", "2"],
    "serve": ["--port", "0", "--no-open"],
    "eval": ["--max-pairs", "2"],
    "merge": ["-o", "merged/it"],
    "compare": ["-p", "How?", "--max-new-tokens", "2"],
    "verify": [],
}


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, `a`, its base in `new`, no longer in `base`, and another base in `other`."""
    home = tmp_path_factory.mktemp("moved")
    saved_adapters.save_adapter(home / "a", saved_adapters.save_base(home / "base"), "none")
    (home / "base").rename(home / "new")
    saved_adapters.save_base(home / "other", seed=5)
    return home


def run(command: str, moved: Path, monkeypatch: pytest.MonkeyPatch, base_model: Path | str | None) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"How?")))
    given = ["--base-model", str(base_model)] if base_model else []
    return main([command, str(moved / "a"), *COMMANDS[command], *given])


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_base_that_moved_is_told_with_the_option_that_names_it(
    command: str, moved: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, moved, monkeypatch, None) == 1
    told = capsys.readouterr()
    says = f"its base {moved / 'base'} is not there any more; say where it lies now with --base-model PATH\n"
    assert (f"base: {says}" in told.out) if command == "verify" else told.err.endswith(f"{moved / 'a'}: {says}")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "serve"])
def test_every_command_opens_it_where_it_lies_now(
    command: str, moved: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, moved, monkeypatch, moved / "new") == 0


@pytest.mark.parametrize("command", list(COMMANDS))
def test_another_base_is_refused(
    command: str, moved: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, moved, monkeypatch, moved / "other") == 1
    told = capsys.readouterr()
    says = (
        f"was trained on other weights than --base-model {moved / 'other'} has; name the base that it was trained on\n"
    )
    assert (f"base: {says}" in told.out) if command == "verify" else told.err.endswith(f"{moved / 'a'}: {says}")


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("./nowhere", 2, "--base-model ./nowhere: {cwd}/nowhere: there is no such folder"),
        (
            "pypi:small==1",
            2,
            "pypi:small==1: only a recipe can pin a PyPI package; name a folder or a hub model as the base",
        ),
    ],
)
def test_a_base_model_that_cannot_be_opened_is_told(
    name: str,
    code: int,
    says: str,
    moved: Path,
    empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("merge", moved, monkeypatch, name) == code
    assert says.format(cwd=empty_folder) in capsys.readouterr().err


def test_a_full_model_has_no_base(
    moved: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(moved / "new", empty_folder / "a")
    assert run("chat", empty_folder, monkeypatch, moved / "new") == 2
    assert capsys.readouterr().err == (
        f"qlora-dpo: --base-model: {empty_folder / 'a'} is a full model, which has no base; leave --base-model out\n"
    )
