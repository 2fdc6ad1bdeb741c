"""A server on 127.0.0.1 with a small random model and its adapter, and plain connections to it."""

import json
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lively
import tiny
import torch
from peft import LoraConfig, get_peft_model

from qlora_dpo.model.device import choose
from qlora_dpo.talk.access import Guard
from qlora_dpo.talk.conversation import Conversation, Voice, ask, reply
from qlora_dpo.talk.engine import Engine, Line
from qlora_dpo.talk.http_server import bound, reading, serve
from qlora_dpo.talk.sampling import Settings
from qlora_dpo.talk.serve import Limits, Service, application

GREEDY = Settings(temperature=0, max_new_tokens=16, seed=0)


MODELS: dict[str, Voice] = {"tuned": "tuned", "plain": "base"}


def adapted() -> Any:
    """The lively model with an adapter that changes its answers."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(lively.qwen2(), config).eval()  # type: ignore[arg-type,operator]


def dictating(text: str) -> Any:
    """A model that says `text`, whatever it is asked."""
    model = lively.qwen2()
    tokens = iter(tiny.tokenizer()(text)["input_ids"] + [2])

    def dictate(module: object, given: object, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.zeros_like(logits)
        forced[..., next(tokens)] = 1
        return forced

    model.lm_head.register_forward_hook(dictate)
    return model


def save_adapted(home: Path) -> None:
    """The same on disk: the adapter `mine` and its base `small`."""
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(home / "small")
    lively.qwen2().save_pretrained(home / "small")
    model.save_pretrained(home / "mine")
    for name in ("small", "mine"):
        tiny.tokenizer().save_pretrained(home / name)


@dataclass
class Served:
    """The running server: where it is, what it is made of, and what it complained of."""

    service: Service
    port: int
    complaints: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """One request by hand: its status and its answer, read as JSON where it is."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        named = {"Host": f"127.0.0.1:{self.port}", "Content-Type": "application/json", "Connection": "close"}
        named |= {name.replace("_", "-").title(): value for name, value in headers.items()}
        with self.connected() as wire:
            head = "".join(
                f"{name}: {value}\r\n" for name, value in {**named, "Content-Length": str(len(data))}.items()
            )
            with suppress(OSError):  # it may be refused before all was sent
                wire.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
            return answer_of(everything(wire))

    def connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def chat(self, text: str = "rice?", **more: Any) -> tuple[int, Any]:
        return self.ask("POST", "/v1/chat/completions", question(text, **more))


def question(text: str = "rice?", **more: Any) -> dict[str, Any]:
    return {"model": "tuned", "messages": [{"role": "user", "content": text}], **more}


def everything(wire: socket.socket) -> bytes:
    """What arrives until the other end closes."""
    parts = []
    with suppress(ConnectionError):  # reset: it did not want all that was sent
        while part := wire.recv(65536):
            parts.append(part)
    return b"".join(parts)


def answer_of(raw: bytes) -> tuple[int, Any]:
    head, _, body = raw.partition(b"\r\n\r\n")
    status = int(head.split()[1]) if head else 0
    return status, json.loads(body) if b"application/json" in head.lower() else body.decode()


@contextmanager
def served(
    settings: Settings = GREEDY,
    *,
    model: Any = None,
    key: str | None = None,
    host: str = "127.0.0.1",
    collect: Path | None = None,
    limits: Limits | None = None,
    engine: Mapping[str, Any] | None = None,
    waiting: int = 64,
) -> Iterator[Served]:
    """The server, from its first request to its last."""
    complaints: list[str] = []
    model = adapted() if model is None else model
    held = Engine(model, tiny.tokenizer(), choose("fp32"), Line(waiting), complain=complaints.append, **(engine or {}))
    service = Service(held, dict(MODELS), settings, Guard(host, key), collect, limits or Limits())
    listener = bound("127.0.0.1", 0)
    port, stopping = listener.getsockname()[1], threading.Event()
    worker = threading.Thread(target=held.work, args=(stopping,), daemon=True)
    with reading(application(service), listener):
        worker.start()
        try:
            yield Served(service, port, complaints)
        finally:
            stopping.set()
            worker.join(20)


def expected(server: Served, voice: str, *texts: str, system: str | None = None) -> list[str]:
    """What `chat` answers to `texts`, one after the other."""
    engine = server.service.engine
    held = Conversation("x", engine.model, engine.tokenizer, engine.device, GREEDY, (voice,), system)  # type: ignore[arg-type]
    said = []
    for text in texts:
        ask(held, text)
        said.append("".join(reply(held, voice, 0)))  # type: ignore[arg-type]
    return said


def main() -> None:
    """Serve in a process of its own, in float32, where greedy answers cannot depend on what is remembered."""
    engine = Engine(adapted(), tiny.tokenizer(), choose("fp32"), complain=lambda told: print(told, file=sys.stderr))
    service = Service(engine, MODELS, Settings(max_new_tokens=200), Guard("127.0.0.1", None))
    listener = bound("127.0.0.1", 0)
    serve(application(service), engine, listener, lambda: print(listener.getsockname()[1], flush=True))


if __name__ == "__main__":
    main()
