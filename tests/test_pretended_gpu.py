"""The CUDA path on a CPU: whole runs on a pretended T4 (fp16), A10 and H100 (bf16), and what they are compared with.

`pretended_gpu.py` says what is pretended, and what none of this can prove: the kernels' own constraints and rounding,
speed, fragmentation, errors that CUDA reports late, NCCL and several GPUs. For those there is `pytest -m gpu`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
import workplace
from pretended_gpu import PretendedGPU, pretended_gpu
from torch import Tensor

from qlora_dpo.cli import main
from qlora_dpo.errors import INTERRUPTED
from qlora_dpo.model import device
from qlora_dpo.recipe import Recipe
from qlora_dpo.report import write
from qlora_dpo.training.run import Outcome, prepare, run
from qlora_dpo.training.tracker import METRICS, Tracker, read

pytestmark = jobs.LIBRARIES_WARN

LN_2 = 0.6931471805599453
HOUSE_RULES = Path(__file__).parents[1] / "recipes" / "house_rules"


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "draw", lambda *some: [])  # a third of the time of a tiny run, and nobody looks at them


# whole commands: train, stop and resume, and what is done with the adapter

RECIPE = """
[model]
name = "./base"
quantization = "nf4"
[lora]
r = 4
lora_dropout = 0.1
[data]
train = "train.jsonl"
eval = "eval.jsonl"
max_length = 200
[train]
max_steps = 3
batch_size = 4
learning_rate = 1e-2
logging_steps = 1
[samples]
prompts = 1
max_new_tokens = 3
"""


@dataclass(frozen=True)
class Trained:
    """A folder with a finished run in `whole`, and one in `resumed` that was stopped after its first step."""

    card: str
    home: Path
    stopped: int
    gpu: PretendedGPU

    def text(self, run: str, name: str) -> str:
        return (self.home / run / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["t4", "a10", "h100"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """`train`, on its own and stopped and resumed, on each kind of card."""
    home = workplace.furnish(tmp_path_factory.mktemp(request.param), RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(write, "draw", lambda *some: [])
        with pretended_gpu(request.param) as gpu:
            assert main(["train", "tiny.toml", "-o", "whole"]) == 0
        with pretended_gpu(request.param):
            stopped = main(["train", "tiny.toml", "-o", "resumed", "--max-hours", "1e-9"])
        with pretended_gpu(request.param):
            assert main(["train", "tiny.toml", "-o", "resumed", "--resume"]) == 0
        yield Trained(request.param, home, stopped, gpu)


def test_a_run_that_was_stopped_ends_with_the_adapter_of_one_that_was_not(trained: Trained) -> None:
    assert trained.stopped == INTERRUPTED
    whole, resumed = (trained.home / run / "adapter_model.safetensors" for run in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
