"""A server on 127.0.0.1 with a small random model and its adapter, and plain connections to it."""

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import varied_model
from peft import LoraConfig, get_peft_model

from qlora_dpo.model.device import select_device
from qlora_dpo.talk.access import AccessPolicy
from qlora_dpo.talk.conversation import Conversation, ModelVariant, add_user_message, stream_reply
from qlora_dpo.talk.engine import Engine, RequestQueue
from qlora_dpo.talk.http_server import bind_socket, serve_in_thread, serve_until_stopped
from qlora_dpo.talk.sampling import SamplingParams
from qlora_dpo.talk.serve import ClientLimits, Service, create_app

GREEDY = SamplingParams(temperature=0, max_new_tokens=16, seed=0)


MODELS: dict[str, ModelVariant] = {"tuned": "tuned", "plain": "base"}


def adapted() -> Any:
    """The lively model with an adapter that changes its answers."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(varied_model.qwen2(), config).eval()  # type: ignore[arg-type,operator]


def dictating(text: str) -> Any:
    """A model that says `text`, whatever it is asked."""
    model = varied_model.qwen2()
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
    varied_model.qwen2().save_pretrained(home / "small")
    model.save_pretrained(home / "mine")
    for name in ("small", "mine"):
        tiny.tokenizer().save_pretrained(home / name)


@dataclass
class Served:
    """The running server: where it is, and what it is made of."""

    service: Service
    port: int

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


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the server has logged as failures of its own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("qlora_dpo")]


@contextmanager
def served(
    settings: SamplingParams = GREEDY,
    *,
    model: Any = None,
    key: str | None = None,
    host: str = "127.0.0.1",
    collect: Path | None = None,
    limits: ClientLimits | None = None,
    engine: Mapping[str, Any] | None = None,
    waiting: int = 64,
) -> Iterator[Served]:
    """The server, from its first request to its last."""
    model = adapted() if model is None else model
    held = Engine(model, tiny.tokenizer(), select_device("fp32"), RequestQueue(waiting), **(engine or {}))
    service = Service(held, dict(MODELS), settings, AccessPolicy(host, key), collect, limits or ClientLimits())
    listener = bind_socket("127.0.0.1", 0)
    port, stopping = listener.getsockname()[1], threading.Event()
    worker = threading.Thread(target=held.run, args=(stopping,), daemon=True)
    with serve_in_thread(create_app(service), listener):
        worker.start()
        try:
            yield Served(service, port)
        finally:
            stopping.set()
            worker.join(20)


def expected(server: Served, voice: str, *texts: str, system: str | None = None) -> list[str]:
    """What `chat` answers to `texts`, one after the other."""
    engine = server.service.engine
    held = Conversation("x", engine.model, engine.tokenizer, engine.device, GREEDY, (voice,), system)  # type: ignore[arg-type]
    said = []
    for text in texts:
        add_user_message(held, text)
        said.append("".join(stream_reply(held, voice, 0)))  # type: ignore[arg-type]
    return said


def main() -> None:
    """Serve in a process of its own, in float32, where greedy answers cannot depend on what is remembered."""
    engine = Engine(adapted(), tiny.tokenizer(), select_device("fp32"))
    service = Service(engine, MODELS, SamplingParams(max_new_tokens=200), AccessPolicy("127.0.0.1", None))
    listener = bind_socket("127.0.0.1", 0)
    serve_until_stopped(create_app(service), engine, listener, lambda: print(listener.getsockname()[1], flush=True))


if __name__ == "__main__":
    main()
