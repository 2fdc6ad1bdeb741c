"""Describes this machine and what it can do, without private data, to paste into a bug report."""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from qlora_dpo import __version__
from qlora_dpo.errors import QloraDpoError, first_line
from qlora_dpo.model import memory
from qlora_dpo.model.device import Device, cpu_has_bf16, select_device
from qlora_dpo.redact import redact_secrets

REPORTED_PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl", "tokenizers", "safetensors"),
    *("huggingface_hub", "numpy", "triton", "wandb"),
)
REPORTED_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WANDB_MODE")
"""Environment variables that affect a run and hold nothing private."""
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Capability:
    """Whether this machine supports something, and how that was determined."""

    what: str
    yes: bool
    why: str


@dataclass(frozen=True)
class MachineInfo:
    """Hardware, packages and capabilities."""

    version: str
    python: str
    system: str
    processor: str
    memory_bytes: int
    free_bytes: int
    cards: tuple[str, ...]
    packages: dict[str, str]
    switches: dict[str, str]
    verdicts: tuple[Capability, ...]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """Lines of a fenced Markdown block to paste."""
        lines = [
            f"qlora-dpo    {self.version}, Python {self.python}, {self.system}",
            f"processor    {self.processor}",
            f"memory       {self.memory_bytes / 2**30:.1f} GiB, {self.free_bytes / 2**30:.1f} GiB free",
            *(f"gpu          {card}" for card in self.cards or ("none",)),
            *(f"{verdict.what:<12} {'yes' if verdict.yes else 'no'}: {verdict.why}" for verdict in self.verdicts),
            *(f"{name:<16} {version}" for name, version in self.packages.items()),
            *(f"{name}={value}" for name, value in self.switches.items()),
            *(f"warning      {warning}" for warning in self.warnings),
        ]
        return [redact_secrets(line) for line in ("```text", *lines, "```")]

    def to_dict(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return asdict(self)


def collect_machine_info() -> MachineInfo:
    """Examine this machine."""
    device = select_device()
    cards = tuple(map(_describe_gpu, range(torch.cuda.device_count())))
    return MachineInfo(
        version=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=_describe_processor(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free_bytes=memory.free_bytes(device),
        cards=cards,
        packages={name: _installed_version(name) for name in REPORTED_PACKAGES},
        switches={name: os.environ[name] for name in REPORTED_VARIABLES if name in os.environ},
        verdicts=tuple(_probe_capabilities(device)),
        warnings=tuple(_version_warnings()),
    )


def _describe_processor() -> str:
    """Model, number of cores and relevant instruction sets."""
    capabilities = torch.cpu.get_capabilities()
    known = {"avx2": "AVX2", "avx512_f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    present = ", ".join(label for name, label in known.items() if capabilities.get(name))
    instructions = present or f"none of {', '.join(known.values())}"
    return f"{_processor_model_name()}, {os.cpu_count()} cores, {instructions}"


def _processor_model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    size = properties.total_memory / 2**30
    return f"{properties.name}, capability ({properties.major}, {properties.minor}), {size:.1f} GiB"


def _probe_capabilities(device: Device) -> Iterator[Capability]:
    yield Capability("compute", True, f"{device.compute_dtype}, {device.dtype_reason}")
    native = device.triton if device.type == "cuda" else cpu_has_bf16()
    yield Capability("native bf16", native, f"reported by the {'GPU' if device.type == 'cuda' else 'CPU'}")
    yield _probe_four_bit(device)
    yield Capability(
        "triton", device.triton, "capability (8, 0) and up" if device.triton else "needs capability (8, 0)"
    )
    yield Capability("attention", True, f"{device.attention}: {device.attention_reason}")


def _probe_four_bit(device: Device) -> Capability:
    """Quantize a small weight to NF4 and back; for normally distributed values the error is about 9 % of the norm."""
    try:
        import bitsandbytes as bnb

        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device.torch_device)
        codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = float((bnb.functional.dequantize_4bit(codes, state) - weight).norm() / weight.norm())
    except (ImportError, RuntimeError, ValueError, QloraDpoError) as problem:
        return Capability("4-bit", False, f"bitsandbytes fails: {first_line(problem)}")
    return Capability("4-bit", error < 0.15, f"NF4 reproduces a weight with an error of {error:.1%}")


def _installed_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _version_warnings() -> Iterator[str]:
    """Packages that are missing, or whose versions were not tested with this release."""
    try:
        requirements = metadata.requires("qlora_dpo") or []
    except metadata.PackageNotFoundError:
        return  # run from its folder, without being installed
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _installed_version(requirement.name)
        if version == NOT_INSTALLED:
            yield f"{requirement.name} is not installed; qlora_dpo needs {requirement.specifier}"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} was not tested; the tested versions are {requirement.specifier}"
