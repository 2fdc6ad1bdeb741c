"""The server's lifetime: an address is taken, requests are read in one thread, the model answers in another."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlora_dpo.errors import RecipeError
from qlora_dpo.talk.engine import Engine
from qlora_dpo.talk.terminal import catch_ctrl_c

CONNECTIONS = 256
"""At once; one more is answered with 503."""
HEADER_BYTES = 2**14
HEADER_TIMEOUT_SECONDS = 15.0
"""For a request's headers to arrive; a connection that takes longer is closed, since it holds one of CONNECTIONS."""
MILLISECONDS_UNREAD = 60_000
"""After which the kernel gives up a connection whose other end takes no data."""
SECONDS_TO_END = 3
"""For answers that are on their way when the server ends."""


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket on the address; raise RecipeError if it cannot be had. Port 0 is any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RecipeError(f"--host {host}: is no address of this machine; 127.0.0.1 is the usual one") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, MILLISECONDS_UNREAD)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise RecipeError(
            f"{host}, port {port}: cannot be listened on ({error.strerror}); choose another with --port, "
            "0 takes any free one"
        ) from error
    return listener


class _HeaderTimeoutProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which leaves a connection that does not ask in time."""

    asking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        """Start the clock, once, where no request is being read or answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.asking is not None:
                self.asking.cancel()
            self.asking = None
        elif self.asking is None:
            self.asking = self.loop.call_later(HEADER_TIMEOUT_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self.asking = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


@contextmanager
def serve_in_thread(app: ASGIApp, listener: socket.socket) -> Iterator[None]:
    """Read requests in a thread of its own for as long as this is open."""
    config: Any = uvicorn.Config(
        app,
        http=_HeaderTimeoutProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        backlog=CONNECTIONS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=SECONDS_TO_END,
    )
    server = uvicorn.Server(config)
    reader = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="requests", daemon=True)
    reader.start()
    try:
        while not server.started and reader.is_alive():
            time.sleep(0.02)
        yield
    finally:
        server.should_exit = True
        reader.join(SECONDS_TO_END + 2)
        listener.close()


def serve_until_stopped(app: ASGIApp, engine: Engine, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Answer until Ctrl+C; those who wait then are told, and nothing is left running.

    The model works in the calling thread, which must be the main one: only there a chat template's time can be limited.
    """
    # KeyboardInterrupt is SIGTERM, or Ctrl+C pressed twice
    with suppress(KeyboardInterrupt), catch_ctrl_c() as stopping, serve_in_thread(app, listener):
        ready()
        engine.work(stopping)
