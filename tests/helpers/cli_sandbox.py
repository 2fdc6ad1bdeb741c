"""A place to run whole commands in: a hub with hh.toml's model and data set, small, and processes that use it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import varied_model
from fork_server import ForkedPython
from hub import Hub

MODEL, DATA = "Qwen/Qwen2-0.5B-Instruct", "Dahoas/full-hh-rlhf"
HH = str(Path(__file__).parents[2] / "recipes" / "hh.toml")

PLACES = ("the library", "the market", "the station", "the harbour", "the museum", "the park", "the school", "the mill")
QUESTIONS = (
    "How do I find {}?",
    "When does {} open?",
    "What can I see near {}?",
    "Who looks after {}?",
    "Can I bring a dog to {}?",
    "Is there a bus to {}?",
    "What should I wear for a day at {}?",
    "How long does a walk around {} take?",
)
KIND = (
    "Follow the signs from the bridge, it takes ten minutes.",
    "Ask at the front desk, they will be glad to help you.",
    "It depends on the season; in spring the mornings are best.",
)
CURT = (
    "I don't know.",
    "Why would you want that? There are better things to do with your time.",
    "No idea, look it up.",
)


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Rows as Dahoas/full-hh-rlhf has them; every third prompt has an earlier exchange."""
    made = []
    for number in range(start, start + count):
        question = QUESTIONS[number % 8].format(PLACES[number // 8 % 8])
        earlier = (
            "\n\nHuman: Good morning!\n\nAssistant: Good morning, what can I do for you?" if number % 3 == 0 else ""
        )
        prompt = f"{earlier}\n\nHuman: {question}\n\nAssistant:"
        chosen, rejected = f" {KIND[number % len(KIND)]}", f" {CURT[number // 2 % len(CURT)]}"
        made.append({"prompt": prompt, "response": chosen, "chosen": chosen, "rejected": rejected})
    return made


def furnish(home: Path, recipe: str, heldout: int = 2) -> Path:
    """Make `home` a folder with a random small Qwen2 in base/, 16 and `heldout` rows beside it, and tiny.toml."""
    tiny.qwen2().save_pretrained(home / "base")
    tiny.tokenizer().save_pretrained(home / "base")
    for name, some in (("train", rows(16)), ("eval", rows(heldout, 16))):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (home / "tiny.toml").write_text(recipe)
    return home


def fill(root: Path) -> None:
    """Put a random small Qwen2 and 60 rows under the names that recipes/hh.toml has."""
    model = root / "models" / MODEL
    varied_model.qwen2().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    (root / "datasets" / DATA / "data").mkdir(parents=True)
    for split, content in (("train", rows(48)), ("test", rows(12, 48))):
        pq.write_table(
            pa.Table.from_pylist(content), root / "datasets" / DATA / "data" / f"{split}-00000-of-00001.parquet"
        )


def closed_port() -> str:
    """An address on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


class Workplace:
    """An empty folder with caches of its own, in which commands run against a hub."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub = folder, hub
        folder.mkdir(parents=True, exist_ok=True)

    def environment(self, **changed: str) -> dict[str, str]:
        """The environment of a command: this process's, but online, with the hub's address and own caches."""
        kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        own = {"HF_HOME": str(self.folder / "hf"), "QLORA_DPO_CACHE": str(self.folder / "cache")}
        own["OMP_NUM_THREADS"] = "1"  # for so small a model, threads that wait for each other cost more than they give
        package = {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), str(Path(__file__).parent)))}
        return {**kept, **own, **package, "HF_ENDPOINT": self.hub.url, **changed}

    def start(self, *arguments: str, cold: bool = False, **environment: str) -> subprocess.Popen[str]:
        """Start `qlora-dpo ARGUMENTS` in the folder; `cold` in a new Python, which first imports everything."""
        command, given = ["-m", "qlora_dpo", *arguments], self.environment(**environment)
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if cold:
            return subprocess.Popen([sys.executable, *command], cwd=self.folder, env=given, **pipes)
        return ForkedPython(command, cwd=self.folder, env=given, **pipes)

    def run(
        self, *arguments: str, stdin: str = "", most_seconds: float = 300, cold: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `qlora-dpo ARGUMENTS` to its end."""
        process = self.start(*arguments, cold=cold, **environment)
        try:
            out, err = process.communicate(stdin, timeout=most_seconds)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)
