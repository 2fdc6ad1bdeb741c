"""No secret of the environment, the hub's login or an address is printed or written."""

from pathlib import Path

import click
import pytest

from qlora_dpo import cli
from qlora_dpo.cli import main
from qlora_dpo.redact import redact_secrets
from qlora_dpo.tracking.progress import ProgressLines, StepProgress

CANARY = "canary-5e7d1c0a9b"


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_token"])
def test_values_of_variables_that_are_named_like_secrets_are_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, CANARY)
    assert redact_secrets(f"401 for {CANARY}: {CANARY}x") == "401 for ***: ***x"


def test_the_longer_of_two_secrets_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", CANARY)
    monkeypatch.setenv("B_TOKEN", f"{CANARY}-and-more")
    assert redact_secrets(f"<{CANARY}-and-more>") == "<***>"


def test_the_token_of_the_hubs_login_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{CANARY}\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redact_secrets(f"Bearer {CANARY}") == "Bearer ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("hf_abcdefghijklmnopqrstuvwx is wrong", "*** is wrong"),
        ("https://user:pass@example.org/x", "https://***@example.org/x"),
        ("https://example.org/x?token=abc&y=1", "https://example.org/x?token=***&y=1"),
        ("pad_token=<s> and lora.r=8, key=value", "pad_token=<s> and lora.r=8, key=value"),
        ("the hf_home folder, a task-oriented sk-learn", "the hf_home folder, a task-oriented sk-learn"),
    ],
)
def test_what_looks_like_a_secret_is_hidden_and_other_words_are_not(text: str, shown: str) -> None:
    assert redact_secrets(text) == shown


def test_variables_that_hold_a_path_or_a_word_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_KEY_FILE", "/home/someone/.ssh/id")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert redact_secrets("/home/someone/.ssh/id is false") == "/home/someone/.ssh/id is false"


@pytest.mark.parametrize("traceback", ["0", "1"])
def test_neither_a_sentence_nor_a_traceback_tells_a_secret(
    traceback: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("QLORA_DPO_TRACEBACK", traceback)

    @click.command()
    def fails() -> None:
        raise KeyError(f"https://me:{CANARY}@hub.example: {CANARY}")

    monkeypatch.setitem(cli.commands.commands, "fails", fails)
    assert main(["fails"]) == 1
    told = capsys.readouterr()
    assert CANARY not in told.out + told.err
    assert "***" in told.err
    assert ("Traceback" in told.err) == (traceback == "1")


def test_a_note_of_a_run_tells_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    ProgressLines(StepProgress(1)).print_line(f"wandb: {CANARY} was refused")
    assert capsys.readouterr().err == "wandb: *** was refused\n"
