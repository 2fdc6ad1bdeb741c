"""A description of the machine and of what follows from it, to paste into a bug report; nothing tells whose it is."""

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
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.model import device, memory
from qlora_dpo.redact import redact_secrets

REPORTED_PACKAGES = (
    *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl", "tokenizers", "safetensors"),
    *("huggingface_hub", "numpy", "triton", "wandb"),
)
REPORTED_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WANDB_MODE")
"""Variables of the environment that change what a run does and hold no names."""
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Capability:
    """Whether this machine does something, and how that is known."""

    what: str
    yes: bool
    why: str


@dataclass(frozen=True)
class MachineInfo:
    """Hardware, packages and verdicts."""

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
        """A block to paste, in fences of Markdown."""
        told = [
            f"qlora-dpo    {self.version}, Python {self.python}, {self.system}",
            f"processor    {self.processor}",
            f"memory       {self.memory_bytes / 2**30:.1f} GiB, {self.free_bytes / 2**30:.1f} GiB free",
            *(f"gpu          {each}" for each in self.cards or ("none",)),
            *(f"{each.what:<12} {'yes' if each.yes else 'no'}: {each.why}" for each in self.verdicts),
            *(f"{name:<16} {number}" for name, number in self.packages.items()),
            *(f"{name}={value}" for name, value in self.switches.items()),
            *(f"warning      {each}" for each in self.warnings),
        ]
        return [redact_secrets(line) for line in ("```text", *told, "```")]

    def to_dict(self) -> dict[str, Any]:
        """The same as one object."""
        return asdict(self)


def collect_machine_info() -> MachineInfo:
    """Look at this machine."""
    here = device.select_device()
    cards = tuple(map(_describe_gpu, range(torch.cuda.device_count())))
    return MachineInfo(
        version=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=_describe_processor(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        free_bytes=memory.free_bytes(here),
        cards=cards,
        packages={name: _installed_version(name) for name in REPORTED_PACKAGES},
        switches={name: os.environ[name] for name in REPORTED_VARIABLES if name in os.environ},
        verdicts=tuple(_probe_capabilities(here)),
        warnings=tuple(_version_warnings()),
    )


def _describe_processor() -> str:
    """Model, cores and what matters of its instructions."""
    able = torch.cpu.get_capabilities()
    known = {"avx2": "AVX2", "avx512_f": "AVX512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
    has = [words for name, words in known.items() if able.get(name)]
    return (
        f"{_processor_model_name()}, {os.cpu_count()} cores, {', '.join(has) or 'none of ' + ', '.join(known.values())}"
    )


def _processor_model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.machine()


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    size = properties.total_memory / 2**30
    return f"{properties.name}, capability ({properties.major}, {properties.minor}), {size:.1f} GiB"


def _probe_capabilities(here: device.Device) -> Iterator[Capability]:
    yield Capability("compute", True, f"{here.compute_dtype}, {here.dtype_reason}")
    native = here.triton if here.type == "cuda" else device.cpu_has_bf16()
    yield Capability("native bf16", native, "asked of the GPU" if here.type == "cuda" else "asked of the CPU")
    yield _probe_four_bit(here)
    yield Capability("triton", here.triton, "capability (8, 0) and up" if here.triton else "needs capability (8, 0)")
    yield Capability("attention", True, f"{here.attention}: {here.attention_reason}")


def _probe_four_bit(here: device.Device) -> Capability:
    """Quantize a small weight to NF4 and read it back: normal numbers lose about 9 % of their L2 norm."""
    try:
        import bitsandbytes as bnb

        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(here.torch_device)
        codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = float((bnb.functional.dequantize_4bit(codes, state) - weight).norm() / weight.norm())
    except (ImportError, RuntimeError, ValueError, QloraDpoError) as problem:
        return Capability(
            "4-bit", False, f"bitsandbytes fails: {(str(problem).splitlines() or [type(problem).__name__])[0]}"
        )
    return Capability("4-bit", error < 0.15, f"NF4 gives a weight back with an error of {error:.1%}")


def _installed_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _version_warnings() -> Iterator[str]:
    """Packages that are missing or outside of the versions that this release is made for."""
    try:
        needed = metadata.requires("qlora_dpo") or []
    except metadata.PackageNotFoundError:
        return  # run from its folder, without being installed
    for each in map(Requirement, needed):
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        found = _installed_version(each.name)
        if found == NOT_INSTALLED:
            yield f"{each.name} is not installed; it needs {each.specifier}"
        elif not each.specifier.contains(found, prereleases=True):
            yield f"{each.name} {found} is not {each.specifier}, which is what was tested"
