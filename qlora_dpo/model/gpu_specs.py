"""Memory and compute capability of common GPUs, for planning a run on a GPU that is not in this machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSpec:
    """The properties of a GPU that decide how a run is executed on it."""

    name: str
    capability: tuple[int, int]
    total_bytes: int


MIB = 2**20
GPU_SPECS = {
    # memory in MiB as nvidia-smi shows it, with ECC if that is the default; CUDA 13 does not support less than sm_75
    "t4": GpuSpec("Tesla T4", (7, 5), 15_360 * MIB),
    "rtx2080ti": GpuSpec("GeForce RTX 2080 Ti", (7, 5), 11_264 * MIB),
    "rtx3060": GpuSpec("GeForce RTX 3060", (8, 6), 12_288 * MIB),
    "rtx3090": GpuSpec("GeForce RTX 3090", (8, 6), 24_576 * MIB),
    "rtx4060": GpuSpec("GeForce RTX 4060", (8, 9), 8_188 * MIB),
    "rtx4090": GpuSpec("GeForce RTX 4090", (8, 9), 24_564 * MIB),
    "rtx5090": GpuSpec("GeForce RTX 5090", (12, 0), 32_607 * MIB),
    "a10": GpuSpec("A10", (8, 6), 23_028 * MIB),
    "a10g": GpuSpec("A10G", (8, 6), 23_028 * MIB),
    "l4": GpuSpec("L4", (8, 9), 23_034 * MIB),
    "l40s": GpuSpec("L40S", (8, 9), 46_068 * MIB),
    "a100-40gb": GpuSpec("A100 40GB", (8, 0), 40_960 * MIB),
    "a100": GpuSpec("A100 80GB", (8, 0), 81_920 * MIB),
    "h100": GpuSpec("H100 80GB", (9, 0), 81_559 * MIB),
    "h200": GpuSpec("H200", (9, 0), 143_771 * MIB),
}
GPU_SPECS |= {"3090": GPU_SPECS["rtx3090"], "4090": GPU_SPECS["rtx4090"]}  # their short names
