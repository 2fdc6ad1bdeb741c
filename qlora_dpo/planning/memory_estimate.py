"""What a run needs of memory, by part, at the moment most is needed; no weight is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_dpo.model import memory
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference.objective import needs_reference
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import EmaReference, ModelReference
from qlora_dpo.training.meta_model import ModelFootprint, Workload, measure_footprint
from qlora_dpo.training.row_plan import (
    RowPlan,
    adapter_bytes,
    choose_row_plan,
    conversion_bytes,
    dense_weight_budget,
    reference_bytes,
    reference_row_tokens,
    step_bytes,
)

RESERVED_BYTES = {"cuda": 512 * 2**20, "cpu": 80 * 2**20}
"""Bytes that the libraries take before the first step: on a GPU CUDA's context and cuBLAS; on a CPU what grows beside
all tensors from a process that has read its data to one that has taken a step (benchmarks/README.md)."""
REFERENCE_PASS_EXTRA = "reference pass, beyond what a step takes"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part at the moment most are needed, in the order in which they are told."""

    bytes_by_part: Mapping[str, int]
    free_bytes: int
    """Bytes that a run can have on the device."""
    recomputed_layers: int
    """Layers whose activations the backward pass computes again."""
    num_layers: int
    trainable_parameters: int
    """Parameters of the adapter."""
    base_parameters: int
    """Parameters of the base."""
    row_tokens: int
    """Tokens that go through the model at once, at most."""
    process_bytes: int = 0
    """Bytes that the process held before: Python, its libraries and the data, all of it no longer free. 0 on a GPU."""
    loading_bytes: int = 0
    """Bytes on top of `own` while the weights are read, the mapped file included; it is given back when asked for."""
    padding_reason: str = ""
    """Why pairs would go through the model in padded batches; empty if in packed rows."""
    smaller_rows_reason: str = ""
    """Why rows would be smaller than where memory allows; empty if they are not, or if the recipe says how large."""
    caches_dequantized: bool = False
    """True if there is room for the linear layers in the compute dtype, so that they are converted once."""

    @property
    def peak_bytes(self) -> int:
        """Bytes that the system counts for the process at most, or that lie on the GPU."""
        return self.process_bytes + max(self.loading_bytes, self.needed)

    @property
    def needed(self) -> int:
        """Bytes of all parts."""
        return sum(self.bytes_by_part.values())

    @property
    def fits(self) -> bool:
        """True if all parts are there at once."""
        return self.needed <= self.free_bytes


def estimate_memory(
    source: ModelSource, recipe: Recipe, device: Device, workload: Workload, free_bytes: int
) -> MemoryEstimate:
    """What the recipe needs on `device`, of which `free` bytes are free.

    Raises ModelError for a config that transformers does not know, and RecipeError for an adapter that does not fit.
    """
    shapes, table = measure_footprint(source, recipe, device, workload), recipe.train
    least = workload.longest_pair_tokens(padded=bool(shapes.padding_reason))
    parts = {**shapes.weight_bytes, **adapter_bytes(shapes, recipe)}
    reserve = {
        "framework's reserve" + (", CUDA's context" if device.type == "cuda" else ""): RESERVED_BYTES[device.type]
    }
    room = max(0, free_bytes - sum(parts.values()) - sum(reserve.values()))
    converted = conversion_bytes(shapes, recipe, device)
    left = dense_weight_budget(shapes, table, least, room, device)
    dense = bool(converted) and shapes.dense_bytes + shapes.head_copy_bytes <= left and not processes.is_sharded()
    if dense:
        beside = {f"linear layers in {device.compute_dtype}, converted once": shapes.dense_bytes}
    else:
        beside = {"one layer's weights in the compute dtype": converted} if converted else {}
    # decided for a full row, also where a step has less
    rows = choose_row_plan(shapes, table, least, max(0, room - sum(beside.values())))
    row = max(least, min(rows.tokens, workload.step_tokens))
    step = step_bytes(shapes, row, rows.recomputed_layers)
    parts |= (
        beside
        | step
        | {REFERENCE_PASS_EXTRA: _reference_extra_bytes(sum(step.values()), shapes, recipe, rows, workload, device)}
        | reserve
    )
    own, loading = 0, 0
    if device.type == "cpu":
        # what is read counts as the process's own as long as the file is mapped
        own, loading = memory.rss_bytes(), sum(shapes.weight_bytes.values()) + shapes.file_bytes
    told = (
        shapes.num_layers,
        shapes.num_trainable,
        shapes.num_parameters,
        row,
        own,
        loading,
        shapes.padding_reason,
        rows.reason,
        dense,
    )
    return MemoryEstimate(parts, free_bytes, rows.recomputed_layers, *told)


def _reference_extra_bytes(
    step: int, shapes: ModelFootprint, recipe: Recipe, rows: RowPlan, load: Workload, device: Device
) -> int:
    """Bytes that the reference pass takes more than a step; 0 if it is computed along with steps, by another model that
    is gone by then, or not at all.
    """
    if not needs_reference(recipe.objective) or isinstance(recipe.reference, EmaReference | ModelReference):
        return 0
    tokens = reference_row_tokens(shapes, rows, load.longest_pair_tokens(padded=bool(shapes.padding_reason)), device)
    return max(0, reference_bytes(shapes, min(tokens, load.reference_tokens or tokens)) - step)
