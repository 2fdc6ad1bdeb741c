"""The benchmarks run: what they print elsewhere stands in benchmarks/README.md."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--tiny", "--batch", "4", "--rounds", "1"]
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", *small]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    variants = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert variants == [
        "variant",
        "trl-4",
        "trl-1",
        "trl-best",
        "trl-compact",
        "packed",
        "lean",
        "cached",
        "longest sequence, tokens",
        "512",
        "1024",
        "2048",
    ]


def test_without_a_gpu_the_gpu_benchmark_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("no CUDA device; --device cpu --tiny shows that the benchmark runs\n")
