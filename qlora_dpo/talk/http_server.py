"""The HTTP server's lifetime: bind an address, read requests in one thread, run the model in another."""

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

MAX_CONNECTIONS = 256
"""Open at the same time; the next one gets status 503."""
MAX_HEADER_BYTES = 2**14
HEADER_TIMEOUT_SECONDS = 15.0
"""Time for a request's headers to arrive; a slower connection is closed, since it takes one of MAX_CONNECTIONS."""
TCP_USER_TIMEOUT_MS = 60_000
"""After which the kernel drops a connection whose other end acknowledges no data."""
SHUTDOWN_TIMEOUT_SECONDS = 3
"""Time for responses that are being sent when the server stops."""


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address; port 0 takes any free one. Raises RecipeError if it cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RecipeError(f"--host {host}: is no address of this machine; 127.0.0.1 is the usual one") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise RecipeError(
            f"{host}, port {port}: cannot be listened on ({error.strerror}); choose another with --port, "
            "0 takes any free one"
        ) from error
    return listener


class _HeaderTimeoutProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a timeout for request headers."""

    header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_header_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_header_timer()

    def _update_header_timer(self) -> None:
        """Run the timer while no request is in progress, and cancel it once one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.header_timer is not None:
                self.header_timer.cancel()
            self.header_timer = None
        elif self.header_timer is None:
            self.header_timer = self.loop.call_later(HEADER_TIMEOUT_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self.header_timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


@contextmanager
def serve_in_thread(app: ASGIApp, listener: socket.socket) -> Iterator[None]:
    """Serve HTTP requests in a thread of its own while this is open."""
    config: Any = uvicorn.Config(
        app,
        http=_HeaderTimeoutProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        backlog=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="requests", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.02)
        yield
    finally:
        server.should_exit = True
        thread.join(SHUTDOWN_TIMEOUT_SECONDS + 2)
        listener.close()


def serve_until_stopped(app: ASGIApp, engine: Engine, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until Ctrl+C; waiting requests then fail with status 503, and all threads end.

    The model runs in the calling thread, which must be the main one: only there can a chat template's time be limited.
    """
    # KeyboardInterrupt is SIGTERM, or Ctrl+C pressed twice
    with suppress(KeyboardInterrupt), catch_ctrl_c() as stopping, serve_in_thread(app, listener):
        ready()
        engine.run(stopping)
