"""`serve` under load for a long time: 50 clients of all kinds, no wrong answer, no complaint, no growing memory.

QLORA_DPO_LOAD_SECONDS is how long; absent: 30 minutes.
"""

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("QLORA_DPO_LOAD_SECONDS", "1800"))
PATIENCE = 600.0
"""Seconds that a client waits for anything: on a machine with other work the line of 35 moves slowly."""
TEXTS = ("rice?", "birds?", "a cat", "the park", "the library", "Thank you")

Kind = Callable[["Clients", random.Random], str]


class Clients:
    """What all threads of the load share."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.want: dict[tuple[str, str], str] = {}
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.longest: dict[str, float] = {}

    def send(self, body: bytes) -> socket.socket:
        wire = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        try:
            wire.sendall(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
        except OSError:
            wire.close()
            raise
        return wire

    def asked(self, text: str, model: str, tokens: int = 24) -> bytes:
        turns = [{"role": "user", "content": text}]
        return json.dumps(
            {"model": model, "messages": turns, "stream": True, "temperature": 0, "max_tokens": tokens}
        ).encode()

    def answer(self, text: str, model: str) -> str:
        """A whole streamed answer; "" if the line was full."""
        with self.send(self.asked(text, model)) as wire:
            raw = b"".join(iter(lambda: wire.recv(65536), b"")).decode()
        if raw.startswith("HTTP/1.1 429"):
            return ""
        pieces = [line[6:] for line in raw.replace("\r", "").split("\n") if line.startswith("data: {")]
        return "".join(json.loads(piece)["choices"][0]["delta"].get("content") or "" for piece in pieces)


def talks(clients: Clients, draw: random.Random) -> str:
    text, model = draw.choice(TEXTS), draw.choice(("tuned", "plain"))
    said = clients.answer(text, model)
    if said and said != clients.want[text, model]:
        clients.wrong.append(f"{model} to {text}: {said!r}, not {clients.want[text, model]!r}")
    return "answers" if said else "told to come again"


def leaves(clients: Clients, draw: random.Random) -> str:
    wire = clients.send(clients.asked(f"{draw.choice(TEXTS)} {draw.random()}", "tuned", 200))
    wire.recv(300)
    wire.close()
    return "left in mid-stream"


def hardly_reads(clients: Clients, draw: random.Random) -> str:
    with clients.send(clients.asked(draw.choice(TEXTS), "tuned", 60)) as wire:
        for _ in range(20):
            wire.recv(8)
            time.sleep(0.1)
    return "read slowly"


def sends_too_much(clients: Clients, draw: random.Random) -> str:
    with suppress(OSError), clients.send(b"x" * 2**21) as wire:
        wire.recv(65536)
    return "sent too much"


def sends_nonsense(clients: Clients, draw: random.Random) -> str:
    with suppress(OSError), clients.send(draw.choice((b"{", b"[1]", b'{"model": "tuned"}', b"\xff"))) as wire:
        wire.recv(65536)
    return "sent nonsense"


KINDS: tuple[Kind, ...] = (talks, talks, talks, leaves, hardly_reads, sends_too_much, sends_nonsense)


def resident_mib(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_under_load_answers_stay_right_and_memory_flat(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "server_process.py")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    errors = (tmp_path / "errors").open("w+")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert process.stdout is not None
        clients = Clients(int(process.stdout.readline()))
        for text, model in itertools.product(TEXTS, ("tuned", "plain")):
            clients.want[text, model] = clients.answer(text, model)
        assert len(set(clients.want.values())) > 6
        end = time.monotonic() + SECONDS

        def live(number: int) -> None:
            draw, kind = random.Random(number), KINDS[number % len(KINDS)]
            while time.monotonic() < end:
                began = time.monotonic()
                try:
                    clients.done[kind(clients, draw)] += 1
                except OSError as error:
                    clients.wrong.append(f"{kind.__name__}: {error!r}")
                took = time.monotonic() - began
                clients.longest[kind.__name__] = max(took, clients.longest.get(kind.__name__, 0))

        threads = [threading.Thread(target=live, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        sizes = []
        while time.monotonic() < end:
            sizes.append(resident_mib(process.pid))
            time.sleep(SECONDS / 200)
        for thread in threads:
            thread.join(PATIENCE)
        # the first quarter fills caches and the allocator's arenas
        first, last = (sorted(sizes[start : start + 50])[25] for start in (50, 150))
        told = f"{sizes[0]:.0f} MiB at first, {first:.0f} in the second quarter, {last:.0f} in the last"
        longest = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in clients.longest.items())
        print(f"{dict(clients.done)}; resident {told}; longest: {longest}")
        assert process.poll() is None
        assert clients.wrong == []
        assert clients.done["answers"] > SECONDS / 4
        assert last - first < 0.03 * first
        process.send_signal(2)
        assert process.wait(60) == 0
        errors.seek(0)
        assert [line for line in errors.read().splitlines() if " failed: " in line] == []
    finally:
        process.kill()
        process.communicate()
        errors.close()
