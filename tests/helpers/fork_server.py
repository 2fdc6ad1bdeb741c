"""Starts Python commands by forking a process that has already imported torch, transformers, peft and the package.

`ForkedPython(["-m", "qlora_dpo", "--help"], ...)` stands for `subprocess.Popen([sys.executable, "-m", ...], ...)`: a
cold start of a command takes 8 CPU-seconds, nearly all of them imports. The command has its own standard streams,
folder, environment, arguments, signals and exit, as a new process would.

Libraries read most variables when they are imported, so there is a server for each environment, but for the variables
in CALL_TIME, which are read when they are needed, and those in RELOCATED and SWITCHES, which are set anew in the child.
Runs draw no plots, and wait for no disk.
"""

import atexit
import contextlib
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

MAX_SERVERS = 3
"""About 0.6 GB each, so the least recently used one is stopped."""

CALL_TIME = (
    *("COLUMNS", "HF_TOKEN", "HOME", "PYTEST_", "QLORA_DPO_CACHE", "RANK", "TMPDIR", "WANDB_", "WORLD_SIZE"),
    *("AWS_", "DATABASE_", "HTTPS_PROXY_", "OPENAI_", "TRACKIO_", "NETRC", "SLURM_", "PWD", "OLDPWD", "_"),
    *("INPUTRC", "NO_COLOR", "PYTHONPATH", "TERM", "HUB_RETRIES_AT_ONCE"),
    # those that `quiet_libraries` sets, in the server too
    *("BITSANDBYTES_NOWELCOME", "DATASETS_VERBOSITY", "HF_DATASETS_DISABLE_", "HF_HUB_DISABLE_PROGRESS_BARS"),
    *("PYTORCH_CUDA_ALLOC_CONF", "TQDM_DISABLE", "TRANSFORMERS_NO_", "TRANSFORMERS_VERBOSITY"),
)
"""Beginnings of the names of variables that nothing reads at import, or whose folders a child puts into its path."""

SWITCHES = {
    "HF_HUB_OFFLINE": ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"),
    "HF_HUB_DISABLE_XET": ("huggingface_hub.constants.HF_HUB_DISABLE_XET",),
}
"""Variables that are on or off, and the constants that a child sets for them."""

RELOCATED = {"HF_HOME": f"/tmp/qlora-dpo-relocated-{'0' * 16}", "HF_ENDPOINT": "http://127.0.0.1:9/relocated"}
"""Read by huggingface_hub, datasets and transformers at import: the placeholders with which a server imports them."""

PRELOAD = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "matplotlib.pyplot")

_SERVERS: dict[tuple[tuple[str, str], ...], "ForkServer"] = {}


class ForkServer:
    """One preloaded process; `connect` gives a socket on which it waits for one command."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="qlora-dpo-fork-", dir="/tmp")
        self.address = f"{self.folder.name}/socket"
        with Path(self.folder.name, "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, self.address],
                env={**environment, **RELOCATED},
                stdin=subprocess.PIPE,  # closed when this process ends, however it does; then the server ends
                stdout=log,
                stderr=log,
                cwd="/",
            )

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        while True:
            try:
                connection.connect(self.address)
                return connection
            except OSError as error:
                if self.process.poll() is not None:
                    log = Path(self.folder.name, "log").read_text()
                    raise RuntimeError(f"the fork server ended with {self.process.returncode}\n{log}") from error
                time.sleep(0.02)

    def stop(self) -> None:
        """End the server; commands that are still running go on."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.folder.cleanup()


def server_for(environment: Mapping[str, str]) -> ForkServer:
    """The running server of an environment, or a new one."""
    key = tuple(
        sorted(
            (name, value)
            for name, value in environment.items()
            if name not in RELOCATED and name not in SWITCHES and not name.startswith(CALL_TIME)
        )
    )
    server = _SERVERS.pop(key, None)
    if server is None or server.process.poll() is not None:
        server = ForkServer({**dict(key), "PYTHONPATH": environment.get("PYTHONPATH", "")})
    _SERVERS[key] = server  # the newest last
    while len(_SERVERS) > MAX_SERVERS:
        _SERVERS.pop(next(iter(_SERVERS))).stop()
    return server


@atexit.register
def stop_servers() -> None:
    """End every server of this process."""
    while _SERVERS:
        _SERVERS.popitem()[1].stop()


class ForkedPython(subprocess.Popen[Any]):
    """A process of `python ARGUMENTS` (`-m MODULE`, `-c CODE` or a file), forked from a server; used like any Popen."""

    def __init__(self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], **options: Any) -> None:
        self._connection: socket.socket | None = None
        super().__init__(list(arguments), cwd=cwd, env=env, **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        """Where Popen would fork and exec: the server forks, with this end's descriptors."""
        cwd, env = rest[4], rest[5]
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[9:15]
        streams = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        request = json.dumps({"arguments": args, "cwd": str(cwd), "environment": dict(env)}).encode()
        self._connection = server_for(env).connect()
        socket.send_fds(self._connection, [len(request).to_bytes(8, "big")], streams)
        self._connection.sendall(request)
        self.pid = int.from_bytes(self._connection.recv(8, socket.MSG_WAITALL), "big")
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def poll(self) -> int | None:
        """The exit code, if the process has ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit code, negative for a signal."""
        if self.returncode is None:
            assert self._connection is not None
            self._connection.settimeout(1e-6 if timeout is not None and timeout <= 0 else timeout)
            try:
                status = self._connection.recv(8, socket.MSG_WAITALL)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.returncode = os.waitstatus_to_exitcode(int.from_bytes(status, "big"))
            self._connection.close()
        return self.returncode


PYTHON = """#!{python} -ISs
import json, os, signal, socket, sys, time
request = {{"arguments": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
body = json.dumps(request).encode()
connection = socket.socket(socket.AF_UNIX)
for wait in [0.05] * 2000:
    if not connection.connect_ex({address!r}):
        break
    time.sleep(wait)
socket.send_fds(connection, [len(body).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(body)
child = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda given, _: os.kill(child, given))
code = os.waitstatus_to_exitcode(int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big"))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
"""A program that passes its arguments, streams, folder, environment and signals to a process forked for it."""


def write_python(path: Path, environment: Mapping[str, str]) -> Path:
    """Write an executable that stands for Python (`-m MODULE ...`) in scripts that start commands themselves."""
    path.write_text(PYTHON.format(python=sys.executable, address=server_for(environment).address))
    path.chmod(0o755)
    return path


def run_forked(
    arguments: Sequence[str], *, input: str | bytes = "", timeout: float = 300, text: bool = True, **options: Any
) -> "subprocess.CompletedProcess[Any]":
    """Run `python ARGUMENTS` to its end; what it wrote on stdout and stderr."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": text}
    with ForkedPython(arguments, **pipes, **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)


# ---- what follows runs in the server and its children


def _preload() -> list[tuple[Any, Any, Any]]:
    """Import what commands import; returns where the placeholders of RELOCATED came to lie: (container, key, value)."""
    import importlib
    import pkgutil

    from qlora_dpo.cli.startup.quiet import quiet_libraries

    quiet_libraries()
    for name in PRELOAD:
        importlib.import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM  # noqa: F401

    import qlora_dpo

    for module in pkgutil.walk_packages(qlora_dpo.__path__, "qlora_dpo."):
        if not module.name.startswith("qlora_dpo.recipes") and not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # of an extra that is not installed
                importlib.import_module(module.name)
    marks = tuple(RELOCATED.values())
    found: list[tuple[Any, Any, Any]] = []
    for held in gc.get_objects():
        if str(type(held).__module__).startswith("huggingface_hub") and not isinstance(held, type):
            held = getattr(held, "__dict__", {})  # such as the HfApi that its functions are methods of
        if type(held) is dict and held is not os.environ._data and held is not RELOCATED:  # type: ignore[attr-defined]
            found += [(held, key, value) for key, value in held.items() if _mentions(value, marks)]
    return found


def _mentions(value: Any, marks: tuple[str, ...]) -> bool:
    return isinstance(value, str | Path) and any(mark in str(value) for mark in marks)


def _relocate(places: list[tuple[Any, Any, Any]], environment: Mapping[str, str]) -> None:
    """Put the folder and the address of this command where the libraries keep those that they were imported with."""
    home = environment.get("HF_HOME", str(Path(environment.get("HOME", "~"), ".cache", "huggingface").expanduser()))
    values = {
        RELOCATED["HF_HOME"]: home,
        RELOCATED["HF_ENDPOINT"]: environment.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"),
    }
    for container, key, value in places:
        text = str(value)
        for mark, own in values.items():
            text = text.replace(mark, own)
        container[key] = type(value)(text)
    for name, constants in SWITCHES.items():
        for constant in constants:
            module, _, attribute = constant.rpartition(".")
            setattr(sys.modules[module], attribute, environment.get(name, "").upper() in ("1", "ON", "YES", "TRUE"))


def _serve(address: str) -> dict[str, Any]:
    """Wait for commands; returns only in a forked child, with the request that it must carry out."""
    places = _preload()
    os.fsync = lambda handle: None  # as in conftest.py
    gc.collect()
    gc.freeze()  # children that collect garbage copy none of it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    import select

    while True:
        ready = select.select([listener, 0], [], [])[0]
        if 0 in ready:
            os._exit(0)
        connection = listener.accept()[0]
        if not os.fork():  # the keeper of one command: its parent, which tells how it ended
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            request, streams = _received(connection)
            child = os.fork()
            if not child:
                connection.close()
                _become(request, streams)
                _relocate(places, request["environment"])
                return request
            for stream in streams:
                os.close(stream)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            connection.sendall(child.to_bytes(8, "big"))
            status = os.waitpid(child, 0)[1]
            try:
                connection.sendall(status.to_bytes(8, "big"))
            finally:
                os._exit(0)
        connection.close()


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, streams = socket.recv_fds(connection, 8, 3)[:2]
    length, body = int.from_bytes(size, "big"), b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return json.loads(body), list(streams)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Take on what a new process would have: streams, folder, environment, signals, path, arguments."""
    import random

    import numpy
    import torch

    for own, given in enumerate(streams):
        os.dup2(given, own)
        os.close(given)
    if os.isatty(0):  # its terminal, whose Ctrl+C then reaches it
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.chdir(request["cwd"])
    of_server, own = (
        [folder for folder in each.get("PYTHONPATH", "").split(os.pathsep) if folder]
        for each in (os.environ, request["environment"])
    )
    sys.path[1 : 1 + len(of_server)] = own
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["environment"].get("HUB_RETRIES_AT_ONCE"):  # huggingface_hub's client otherwise waits 23 seconds in all
        sys.modules["huggingface_hub.utils._http"].time = types.SimpleNamespace(
            time=time.time, sleep=lambda seconds: None
        )
    # plots are a quarter of the time of a tiny run
    sys.modules["qlora_dpo.report.write"].draw_plots = lambda records, results: []  # type: ignore[attr-defined]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None
    random.seed()
    numpy.random.seed()
    torch.default_generator.seed()
    sys.path[0] = "" if request["arguments"][0] == "-c" else request["cwd"]
    sys.orig_argv = [sys.executable, *request["arguments"]]
    sys.argv = list(request["arguments"])


def _perform(arguments: list[str]) -> None:
    """What the interpreter does with its arguments."""
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


def _end(arguments: list[str]) -> NoReturn:
    """Perform, and end as the interpreter does, but for taking apart the modules: a second for nothing."""
    code: Any = 0
    try:
        _perform(arguments)
    except SystemExit as left:
        code = left.code
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # its reader has gone away
            code = code or 120
    if code is signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(0 if code is None else code & 255 if isinstance(code, int) else 1)


if __name__ == "__main__":
    atexit.unregister(stop_servers)
    _end(_serve(sys.argv[1])["arguments"])
