"""A command that is forked from a preloaded process is like one that Python has started."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkedPython, run_forked

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "HF_HOME": "/tmp/of-this-command",
    "HF_ENDPOINT": "http://127.0.0.1:1234",
    "QLORA_DPO_CACHE": "cache of this command",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_XET": "",
}
PROCESS = """
import json, os, random, signal, sys, threading, warnings
import datasets.config, huggingface_hub.constants as hub, torch
from huggingface_hub import hf_api
signals = {number: signal.getsignal(number) for number in signal.valid_signals()}
print(json.dumps({
    "environment": dict(os.environ), "folder": os.getcwd(), "arguments": sys.argv, "original": sys.orig_argv[1:],
    "stdin": sys.stdin.read(), "descriptors": len(os.listdir("/proc/self/fd")),
    "signals": {number: str(handler).split(" at ")[0] for number, handler in signals.items() if handler},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "python threads": threading.active_count(), "torch threads": torch.get_num_threads(),
    "path": sys.path, "cache": hub.HF_HUB_CACHE, "token": hub.HF_TOKEN_PATH,
    "endpoint": hub.ENDPOINT, "api": hf_api.api.endpoint, "main": sys.modules["__main__"].__name__,
    "offline": [hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_DISABLE_XET],
    "datasets": [str(datasets.config.HF_DATASETS_CACHE), datasets.config.HF_ENDPOINT],
    "buffered": [sys.stdout.line_buffering, sys.stderr.line_buffering], "encoding": sys.stdout.encoding,
}))
"""


def state_of(process: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_it_has_what_a_new_process_has(tmp_path: Path) -> None:
    arguments = ["-c", PROCESS, "a", "b c"]
    forked = run_forked(arguments, input="given", cwd=tmp_path, env=ENVIRONMENT)
    cold = subprocess.run(
        [sys.executable, *arguments], input="given", cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert state_of(forked) == state_of(cold)


@pytest.mark.parametrize(
    ("code", "exit_code", "out", "last"),
    [
        ("import sys; sys.exit(3)", 3, "", ""),
        ("import sys; sys.exit('a sentence')", 1, "", "a sentence"),
        (
            "import atexit; atexit.register(print, 'at the end'); raise ValueError('x')",
            1,
            "at the end\n",
            "ValueError: x",
        ),
        ("raise KeyboardInterrupt", -signal.SIGINT, "", "KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, "", ""),
        (
            "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('later'))).start()",
            *(0, "later\n", ""),
        ),
    ],
    ids=["code", "sentence", "exception", "interrupt", "kill", "thread"],
)
def test_it_ends_as_a_new_process_does(code: str, exit_code: int, out: str, last: str, tmp_path: Path) -> None:
    done = run_forked(["-c", code], cwd=tmp_path, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, (done.stderr.splitlines() or [""])[-1]) == (exit_code, out, last)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_signals_reach_it(number: signal.Signals, tmp_path: Path) -> None:
    code = "import time; print('running', flush=True); time.sleep(60)"
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ForkedPython(["-c", code], cwd=tmp_path, env=ENVIRONMENT, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.send_signal(number)
        assert process.wait(20) == -number


def test_nothing_is_left_over_for_the_next(tmp_path: Path) -> None:
    code = (
        "import os, random, sys, torch, numpy, qlora_dpo; print(getattr(qlora_dpo, 'left', None), os.getcwd());"
        "qlora_dpo.left = 1; os.environ['LEFT'] = '1'; print(os.environ.get('LEFT2'), file=sys.stderr);"
        "print(random.random(), torch.rand(1).item(), numpy.random.rand())"
    )
    first, second = (run_forked(["-c", code], cwd=tmp_path, env=ENVIRONMENT).stdout.splitlines() for _ in range(2))
    assert first[0] == second[0] == f"None {tmp_path}"
    assert not set(first[1].split()) & set(second[1].split())  # each draws numbers of its own
