"""Chats with a small model, and a terminal to have them in."""

import os
import pty
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import varied_model
from fork_server import ForkedPython
from peft import LoraConfig, get_peft_model

from qlora_dpo.model.device import select_device
from qlora_dpo.talk.conversation import (
    Conversation,
    ModelVariant,
    add_user_message,
    next_seed,
    stream_reply,
)
from qlora_dpo.talk.sampling import SamplingParams

ROOT = Path(__file__).parents[2]

SETTINGS = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=8, seed=5)


def conversation(adapter: bool = False, settings: SamplingParams = SETTINGS) -> Conversation:
    model = varied_model.qwen2()
    if adapter:
        torch.manual_seed(1)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config).eval()  # type: ignore[assignment,operator]
    voices: tuple[ModelVariant, ...] = ("tuned",) if adapter else ("model",)
    return Conversation("merged/tiny", model, tiny.tokenizer(), select_device("fp32"), settings, voices)


def said(held: Conversation, question: str) -> list[str]:
    """Ask, let every voice answer, and return the answers."""
    add_user_message(held, question)
    seed = next_seed(held)
    return ["".join(stream_reply(held, voice, seed)) for voice in held.variants]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a merged model in merged/tiny and an adapter for it in adapters/tiny."""
    home = tmp_path_factory.mktemp("chat")
    model = varied_model.qwen2()
    model.save_pretrained(home / "merged/tiny")
    tiny.tokenizer().save_pretrained(home / "merged/tiny")
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = str(home / "merged/tiny")
    tuned.save_pretrained(home / "adapters/tiny")
    tiny.tokenizer().save_pretrained(home / "adapters/tiny")
    return home


class Terminal:
    """A real `qlora-dpo chat` on a pseudo-terminal; what it shows is read and what it asks is typed."""

    def __init__(self, folders: Path, *arguments: str) -> None:
        self.screen, terminal = pty.openpty()
        environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "INPUTRC": "/dev/null", "PYTHONPATH": str(ROOT)}
        command, streams = (
            ["-m", "qlora_dpo", "chat", *arguments],
            dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
        )
        self.process = ForkedPython(command, cwd=folders, env=environment, **streams)
        os.close(terminal)
        self.shown = ""

    def until(self, words: str, seconds: float = 60) -> str:
        """Read on until `words` are shown; return what was shown since the last call, up to and with them."""
        self._read_on(lambda: words in self.shown, repr(words), seconds)
        before, _, self.shown = self.shown.partition(words)
        return before + words

    def until_anything(self, seconds: float = 60) -> None:
        """Read on until something is shown after what the last call returned."""
        self._read_on(lambda: bool(self.shown), "anything", seconds)

    def _read_on(self, found: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < end, f"{what} is not in {self.shown!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                self.shown += os.read(self.screen, 65536).decode(errors="replace").replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def code(self, seconds: float = 60) -> int:
        """Wait for the process to leave and return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"the chat is still there; it shows {self.shown!r}") from error

    def close(self) -> None:
        self.process.kill()
        os.close(self.screen)
