"""A command of this project on a card as it is, or as on a T4: what a T4 says of itself, its kernels and its memory.

    python benchmarks/gpu_card.py --as t4 train RECIPE -o FOLDER    # qlora-dpo train RECIPE -o FOLDER

`--ceiling BYTES` lets the allocator give no more than so much, which the plan does not know. On a machine without a GPU
`--as` only chooses the dtype, and `--rows-above TOKENS` says of longer rows, where gradients are wanted, that memory is
out.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from qlora_dpo.cli.startup.allocator import use_expandable_segments

use_expandable_segments()  # as every command does before torch is imported

import torch  # noqa: E402

from qlora_dpo.model.device import Device, select_device  # noqa: E402
from qlora_dpo.model.gpu_specs import GPU_SPECS  # noqa: E402

Form = Literal["card", "t4"]
T4 = GPU_SPECS["t4"]
T4_PROCESSORS = 40
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "triton")


class _Properties:
    """The properties of the card that is there, but for what a T4 has otherwise."""

    def __init__(self, real: Any) -> None:
        self.real, self.name, self.total_memory = real, T4.name, T4.total_bytes
        self.major, self.minor = T4.capability
        self.multi_processor_count = T4_PROCESSORS

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@contextmanager
def like(form: Form, ceiling: int | None = None) -> Iterator[None]:
    """Inside, the card is like a T4 or as it is; with a `ceiling`, the allocator gives no more than so many bytes.

    Like a T4: capability (7, 5), 40 multiprocessors, 15 GiB, no flash and no cuDNN attention. Not like one: its speed,
    its matrix units and what compiled kernels themselves ask of the card.
    """
    if not torch.cuda.is_available():
        yield
        return
    real = torch.cuda.get_device_properties(0)
    most = ceiling or (T4.total_bytes if form == "t4" else real.total_memory)
    kernels = torch.backends.cuda
    before = kernels.flash_sdp_enabled(), kernels.cudnn_sdp_enabled()
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / real.total_memory))
    with ExitStack() as stack:
        if form == "t4":
            kernels.enable_flash_sdp(False)
            kernels.enable_cudnn_sdp(False)
            said = {
                "get_device_name": lambda device=None: T4.name,
                "get_device_capability": lambda device=None: T4.capability,
                "get_device_properties": lambda device=None: _Properties(real),
                "mem_get_info": lambda device=None: (
                    max(0, T4.total_bytes - torch.cuda.memory_reserved()),
                    T4.total_bytes,
                ),
            }
            for name, function in said.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, function))
        try:
            yield
        finally:
            kernels.enable_flash_sdp(before[0])
            kernels.enable_cudnn_sdp(before[1])
            torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def out_of_memory_above(tokens: int | None) -> Iterator[None]:
    """Inside, an embedding of more than so many tokens, where gradients are wanted, is told that memory is out."""

    def refuse(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        long = isinstance(module, torch.nn.Embedding) and inputs and inputs[0].numel() > (tokens or 0)
        if long and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory, as it was planted here")

    if tokens is None:
        yield
        return
    hook = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def dtype_of(form: Form) -> Literal["auto", "bf16", "fp16", "fp32"]:
    """The compute dtype of a form; a CPU has no fp16, so there a T4 is stood for by fp32."""
    if torch.cuda.is_available():
        return "fp16" if form == "t4" else "auto"
    return "fp32" if form == "t4" else "bf16"


def here(form: Form) -> Device:
    """What is decided on this machine in this form; to be called inside of `like`."""
    return select_device(dtype_of(form))


def command(form: Form, words: Sequence[str], **more: int) -> list[str]:
    """The command line that runs `qlora-dpo WORDS` in this form."""
    options = [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, str(Path(__file__).resolve()), "--as", form, *options, *words]


def environment(work: Path) -> dict[str, str]:
    """The environment of a command: no network, a cache of its own, this checkout."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    own = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_MODE": "offline"}
    return {**os.environ, **own, "QLORA_DPO_CACHE": str(work / "cache"), "PYTHONPATH": os.pathsep.join(paths)}


def words_for_the_machine(commit: str | None) -> str:
    """Card, driver, versions, commit and date, for the head of a table."""
    if torch.cuda.is_available():
        real = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        card = f"{count} x " * (count > 1) + f"{real.name}, capability ({real.major}, {real.minor})"
        machine = f"{card}, {real.total_memory / 2**30:.0f} GiB, driver {_driver()}, CUDA {torch.version.cuda}"
    else:
        machine = f"no GPU, {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    versions = versions.replace(f"torch {_version('torch')}", f"torch {torch.__version__}", 1)
    today = datetime.now(UTC).date().isoformat()
    return f"{machine}; Python {platform.python_version()}, {versions}; code of {_commit(commit)}; {today}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _driver() -> str:
    return _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown"


def _commit(named: str | None) -> str:
    return named or _said(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]) or "an unknown commit (--commit)"


def _said(words: Sequence[str]) -> str:
    """The first line a program prints; empty if it fails or is not there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return "" if done.returncode else (done.stdout.splitlines() or [""])[0].strip()


def wait() -> None:
    """Wait until the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rate(place: Device, *, tiny: bool) -> float:
    """Operations a second of a square matrix product in the compute dtype, the median of a second's worth."""
    width = 512 if tiny else 8192
    one, other = (torch.randn(width, width, dtype=place.torch_dtype, device=place.torch_device) for _ in range(2))
    seconds: list[float] = []
    while sum(seconds) < 1 or len(seconds) < 5:
        wait()
        began = time.perf_counter()
        torch.mm(one, other)
        wait()
        seconds.append(time.perf_counter() - began)
    return 2.0 * width**3 / sorted(seconds)[len(seconds) // 2]


def main() -> int:
    """Run one command in the form that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="form", choices=["card", "t4"], default="card")
    parser.add_argument("--ceiling", type=int)
    parser.add_argument("--rows-above", type=int)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    from qlora_dpo.cli import main as run

    sys.argv = ["qlora-dpo", *asked.words]
    with like(asked.form, asked.ceiling), out_of_memory_above(asked.rows_above):
        return run(asked.words)


if __name__ == "__main__":
    sys.exit(main())
