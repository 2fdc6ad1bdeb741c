"""Estimates the peak memory of a run, by part, without loading any weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.malloc import rss_bytes
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference.objective import needs_reference
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import EmaReference, ModelReference
from qlora_dpo.training.memory.footprint import ModelFootprint, measure_footprint
from qlora_dpo.training.memory.row_plan import (
    RowPlan,
    adapter_bytes,
    choose_row_plan,
    conversion_bytes,
    dense_weight_budget,
    largest_row_tokens,
    reference_bytes,
    reference_row_tokens,
    step_bytes,
)
from qlora_dpo.training.memory.workload import Workload

RESERVED_BYTES = {"cuda": 512 * 2**20, "cpu": 80 * 2**20}
"""Bytes that the libraries take before the first step: on a GPU, CUDA's context and cuBLAS; on a CPU, the growth that
is not tensors between having read the data and having taken a step (benchmarks/README.md)."""
REFERENCE_EXTRA_PART = "reference pass, beyond what a step takes"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part at peak memory, in the order in which they are shown."""

    bytes_by_part: Mapping[str, int]
    free_bytes: int
    """Bytes of the device that a run can use."""
    recomputed_layers: int
    """Layers whose activations are recomputed in the backward pass."""
    num_layers: int
    trainable_parameters: int
    """Parameters of the adapter."""
    base_parameters: int
    """Parameters of the base."""
    row_tokens: int
    """Largest number of tokens in one forward pass."""
    process_bytes: int = 0
    """Bytes that the process already holds: Python, libraries and data, not part of `free_bytes`. 0 on a GPU."""
    loading_bytes: int = 0
    """Bytes beyond `process_bytes` while weights are read, including the mapped file, which the system can reclaim."""
    padding_reason: str = ""
    """Why the pairs would be padded batches; empty for packed rows."""
    smaller_rows_reason: str = ""
    """Why rows would be smaller than the default; empty if they are not, or if the recipe sets their size."""
    unplanned_reason: str = ""
    """Why `bytes_by_part` has no step and no reference pass: what these take is measured by the run itself; empty if
    everything is planned."""
    caches_dequantized: bool = False
    """True if the linear layers fit in the compute dtype, so that they are dequantized only once."""

    @property
    def peak_bytes(self) -> int:
        """Peak of the process's resident memory on a CPU, or of what lies on the GPU."""
        return self.process_bytes + max(self.loading_bytes, self.needed)

    @property
    def needed(self) -> int:
        """Sum of all parts, in bytes."""
        return sum(self.bytes_by_part.values())

    @property
    def fits(self) -> bool:
        """True if all parts fit in the free bytes at once."""
        return self.needed <= self.free_bytes


def estimate_memory(
    source: ModelSource, recipe: Recipe, device: Device, workload: Workload, free_bytes: int
) -> MemoryEstimate:
    """Estimate what the recipe needs on `device`, where `free_bytes` are free.

    Raises ModelError for a config that transformers does not know, and RecipeError for an adapter that does not fit
    the model.
    """
    footprint, table = measure_footprint(source, recipe, device, workload), recipe.train
    longest = workload.longest_pair_tokens(padded=bool(footprint.padding_reason))
    parts = {**footprint.weight_bytes, **adapter_bytes(footprint, recipe)}
    reserve = {
        "framework's reserve" + (", CUDA's context" if device.type == "cuda" else ""): RESERVED_BYTES[device.type]
    }
    headroom = max(0, free_bytes - sum(parts.values()) - sum(reserve.values()))
    converted = conversion_bytes(footprint, recipe, device)
    dense_budget = dense_weight_budget(footprint, table, longest, headroom, device)
    fits_dense = footprint.dense_bytes + footprint.head_copy_bytes <= dense_budget
    caches_dequantized = bool(converted) and fits_dense and not processes.is_sharded()
    if caches_dequantized:
        conversion = {f"linear layers in {device.compute_dtype}, converted once": footprint.dense_bytes}
    else:
        conversion = {"one layer's weights in the compute dtype": converted} if converted else {}
    # decided for a full row, even if a step has fewer tokens
    rows = choose_row_plan(footprint, table, longest, max(0, headroom - sum(conversion.values())))
    row_tokens = largest_row_tokens(rows, workload, longest)
    if not footprint.unplanned_reason:
        step = step_bytes(footprint, row_tokens, rows.recomputed_layers)
        extra = _reference_extra_bytes(sum(step.values()), footprint, recipe, rows, workload, device)
        conversion |= step | {REFERENCE_EXTRA_PART: extra}
    parts |= conversion | reserve
    process_bytes, loading_bytes = 0, 0
    if device.type == "cpu":
        # pages of a mapped file count towards the process as long as it is mapped
        process_bytes = rss_bytes()
        loading_bytes = sum(footprint.weight_bytes.values()) + footprint.file_bytes
    return MemoryEstimate(
        bytes_by_part=parts,
        free_bytes=free_bytes,
        recomputed_layers=rows.recomputed_layers,
        num_layers=footprint.num_layers,
        trainable_parameters=footprint.num_trainable,
        base_parameters=footprint.num_parameters,
        row_tokens=row_tokens,
        process_bytes=process_bytes,
        loading_bytes=loading_bytes,
        padding_reason=footprint.padding_reason,
        smaller_rows_reason=rows.reason,
        unplanned_reason=footprint.unplanned_reason,
        caches_dequantized=caches_dequantized,
    )


def _reference_extra_bytes(
    step: int, footprint: ModelFootprint, recipe: Recipe, rows: RowPlan, workload: Workload, device: Device
) -> int:
    """Bytes that the reference pass takes beyond a step's.

    0 if the reference is computed during steps, by another model that is freed before training, or not at all.
    """
    if not needs_reference(recipe.objective) or isinstance(recipe.reference, EmaReference | ModelReference):
        return 0
    longest = workload.longest_pair_tokens(padded=bool(footprint.padding_reason))
    tokens = reference_row_tokens(footprint, rows, longest, device)
    return max(0, reference_bytes(footprint, min(tokens, workload.reference_tokens or tokens)) - step)
