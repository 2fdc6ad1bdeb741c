"""What is done with a finished adapter, and several processes: each command once, on a generated model."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import gpu_card
import torch
from gpu_runs import ON_A_GPU, Place, Run, apart, why_failed
from gpu_table import Report, last_line

QUESTION = "bak bal bam ban"
MOST_KL = 1e-3
"""Nats per token between the trained and the merged model: rounding alone gives 1e-4 on a CPU (README.md)."""
FSDP2 = gpu_card.ROOT / "recipes" / "accelerate" / "fsdp2-qlora.yaml"


def commands(place: Place, report: Report, shape: str, longest: int) -> None:
    """Train a little, then eval, compare, merge, chat and serve."""
    recipe = place.recipe(shape, longest, train={"max_steps": 10})
    run = place.train(recipe, "run")
    report.checks()
    report.check("train", f"{run.code} {why_failed(run)}", "0", run.code == 0)
    if run.code:
        return
    adapter = str(run.folder)
    _evaluated(place, report, adapter)
    _compared(place, report, adapter)
    _merged(place, report, adapter)
    for model in (adapter, "merged"):
        done = place.run("chat", model, "--max-new-tokens", "8", "--temperature", "0", given=QUESTION)
        said = last_line(done.stderr) if done.returncode else f"{done.stdout!r:.60}"
        # random weights say what they like, be it empty lines
        talks = done.returncode == 0 and bool(done.stdout)
        report.check(f"chat, {Path(model).name}", f"{done.returncode} {said}", "0 and an answer", talks)
    _served(place, report, adapter)


def _evaluated(place: Place, report: Report, adapter: str) -> None:
    done = place.run("eval", adapter, "--json")
    if done.returncode:
        report.check("eval", f"{done.returncode} {last_line(done.stderr)}", "0", False)
        return
    found = json.loads(done.stdout)
    told = ", ".join(f"{name} {found[name]:.4g}" for name in ("accuracy", "loss", "kl") if name in found)
    report.check("eval", f"0: {told}", "0, accuracy above one half", found["accuracy"] > 0.5)


def _compared(place: Place, report: Report, adapter: str) -> None:
    done = place.run("compare", adapter, "-p", QUESTION, "--max-new-tokens", "8", "--json")
    found = done.stdout.strip() if done.returncode == 0 else last_line(done.stderr)
    report.check("compare", f"{done.returncode} {found[:120]}", "0", done.returncode == 0)


def _merged(place: Place, report: Report, adapter: str) -> None:
    done = place.run("merge", adapter, "-o", "merged")
    kl = re.search(r"nats per token +(\S+)", done.stdout)
    found = f"{done.returncode}, KL {kl[1]} nats per token" if kl else f"{done.returncode} {last_line(done.stderr)}"
    target = f"0 and at most {MOST_KL:g}"
    report.check("merge", found, target, done.returncode == 0 and kl is not None and float(kl[1]) <= MOST_KL)


def _served(place: Place, report: Report, adapter: str) -> None:
    """Start the server, ask it once, and end it by SIGINT."""
    process = subprocess.Popen(
        gpu_card.command(place.form, ["serve", adapter, "--port", "0", "--no-open"]),
        cwd=place.work,
        env=gpu_card.environment(place.work),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    late = threading.Timer(240, process.kill)
    late.start()
    try:
        address = process.stdout.readline().strip() if process.stdout else ""
        if not address:
            _, err = process.communicate()
            report.check("serve", f"{process.returncode} {last_line(err)}", "an address", False)
            return
        began = time.monotonic()
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, "temperature": 0}
        body["model"] = Path(adapter).name
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            said = json.loads(reply.read())["choices"][0]["message"]["content"]
        seconds = time.monotonic() - began
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        report.check(
            "serve, one request",
            f"{said!r} after {seconds:.1f} s, ended with {process.returncode}",
            "an answer",
            bool(said),
        )
    except OSError as error:
        report.check("serve, one request", error, "an answer", False)
    finally:
        late.cancel()
        process.kill()


def several(place: Place, report: Report, shape: str, longest: int, count: int) -> None:
    """The run of several processes, each with its card, beside that of one: DDP, then FSDP2."""
    cards = torch.cuda.device_count()
    if ON_A_GPU and cards < 2:
        report.say(f"skipped: several processes need a card each, and there is {cards}")
        return
    recipe = place.recipe(shape, longest, train={"max_steps": 8})
    one = place.train(recipe, "one")
    report.checks()
    report.check("one process", f"{one.code} {why_failed(one)}, {one.seconds:.0f} s", "0", one.code == 0)
    ways = {"DDP": [sys.executable, "-m", "qlora_dpo", "train", str(recipe), "--processes", str(count)]}
    if ON_A_GPU:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2)]
        ways["FSDP2"] = [*launch, "--num_processes", str(count), "-m", "qlora_dpo", "train", str(recipe)]
    for name, command in ways.items() if one.code == 0 else ():
        run = _launched(place, name, command)
        told = f"{run.code} {why_failed(run)}, {run.seconds:.0f} s"
        report.check(f"{count} processes, {name}", told, "0", run.code == 0)
        if run.code == 0:
            target = "at most 2e-2 in 16 bits"
            report.check(f"{name}, adapter from that of one", f"{apart(run, one):.1e}", target, apart(run, one) <= 2e-2)
    if not ON_A_GPU:
        report.say("\nFSDP2: skipped, its config file is one for GPUs; the tests run it on a CPU")


def _launched(place: Place, name: str, command: list[str]) -> Run:
    began, folder = time.monotonic(), place.work / name
    environment = {**gpu_card.environment(place.work), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [*command, "-o", str(folder)], cwd=place.work, env=environment, capture_output=True, text=True, check=False
    )
    return Run(done.returncode, done.stderr, folder, time.monotonic() - began)
