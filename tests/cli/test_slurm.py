"""The batch script of docs/slurm.md, run by bash without Slurm: stopped by SIGTERM it saves, and again it resumes."""

import os
import re
import signal
import subprocess
from pathlib import Path

from cli_sandbox import furnish
from documents import ROOT, blocks
from fork_server import write_python

RECIPE = """
[model]
name = "./base"
quantization = "none"
dtype = "fp32"

[data]
train = "./train.jsonl"
eval = "./eval.jsonl"
max_length = 200

[train]
batch_size = 2
num_train_epochs = 1000
max_steps = 2000
save_steps = 100000
eval_steps = 100000
logging_steps = 1

[samples]
prompts = 1
max_new_tokens = 2
"""


def test_the_batch_script_saves_at_sigterm_requeues_and_resumes(tmp_path: Path) -> None:
    (script,) = [each for each in blocks(ROOT / "docs/slurm.md") if "trap " in each]
    (tmp_path / "train.sbatch").write_text(script)
    furnish(tmp_path, RECIPE)
    commands = tmp_path / "bin"
    commands.mkdir()
    python = write_python(tmp_path / "python", {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    for name, does in (
        ("qlora-dpo", f'exec {python} -m qlora_dpo "$@"'),
        ("scontrol", f'echo "$@" >> {tmp_path}/scontrol'),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{does}\n")
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "17",
    }
    environment.pop("QLORA_DPO_CACHE", None)

    def start(steps: int) -> "subprocess.Popen[str]":
        (tmp_path / "tiny.toml").write_text(RECIPE.replace("max_steps = 2000", f"max_steps = {steps}"))
        return subprocess.Popen(
            ["bash", "train.sbatch", "tiny.toml", "adapters/tiny"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    told = list[str]()
    with start(steps=2000) as job:
        for line in job.stderr or ():
            told.append(line)
            if line.startswith("step 3/"):
                job.send_signal(signal.SIGTERM)
    assert job.returncode == 130, "".join(told[-20:])
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
    (checkpoint,) = (tmp_path / "adapters/tiny/checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert told[-1].endswith(f"{checkpoint.relative_to(tmp_path)} is saved, --resume goes on from there\n")
    assert (tmp_path / "cache").is_dir()

    with start(steps=step + 2) as job:
        told = list(job.stderr or ())
    assert job.returncode == 0, told
    steps = [int(found[1]) for line in told if (found := re.match(r"step (\d+)/\d+  loss", line))]
    assert steps == [step + 1, step + 2]
    assert (tmp_path / "scontrol").read_text() == "requeue 17\n"
