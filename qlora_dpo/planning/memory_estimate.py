"""What a run needs of memory, by part, at the moment most is needed; no weight is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_dpo.model import memory
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.sources import Source
from qlora_dpo.preference.objective import needs_reference
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import EmaReference, ModelReference
from qlora_dpo.training.meta_model import Load, Shapes, shapes_of
from qlora_dpo.training.row_plan import (
    RowPlan,
    adapter_bytes,
    choose_rows,
    converted_bytes,
    left_for_dense,
    reference_bytes,
    reference_rows,
    step_bytes,
)

RESERVE = {"cuda": 512 * 2**20, "cpu": 80 * 2**20}
"""Bytes that the libraries take before the first step: on a GPU CUDA's context and cuBLAS; on a CPU what grows beside
all tensors from a process that has read its data to one that has taken a step (benchmarks/README.md)."""
BEYOND_A_STEP = "reference pass, beyond what a step takes"


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment most are needed, in the order in which they are told."""

    parts: Mapping[str, int]
    free: int
    """Bytes that a run can have on the device."""
    recomputed: int
    """Layers whose activations the backward pass computes again."""
    layers: int
    trained: int
    """Parameters of the adapter."""
    weights: int
    """Parameters of the base."""
    row: int
    """Tokens that go through the model at once, at most."""
    own: int = 0
    """Bytes that the process held before: Python, its libraries and the data, all of it no longer free. 0 on a GPU."""
    loading: int = 0
    """Bytes on top of `own` while the weights are read, the mapped file included; it is given back when asked for."""
    padded: str = ""
    """Why pairs would go through the model in padded batches; empty if in packed rows."""
    smaller: str = ""
    """Why rows would be smaller than where memory allows; empty if they are not, or if the recipe says how large."""
    dense: bool = False
    """True if there is room for the linear layers in the compute dtype, so that they are converted once."""

    @property
    def peak(self) -> int:
        """Bytes that the system counts for the process at most, or that lie on the GPU."""
        return self.own + max(self.loading, self.needed)

    @property
    def needed(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """True if all parts are there at once."""
        return self.needed <= self.free


def estimate(source: Source, recipe: Recipe, device: Device, load: Load, free: int) -> Memory:
    """What the recipe needs on `device`, of which `free` bytes are free.

    Raises ModelError for a config that transformers does not know, and RecipeError for an adapter that does not fit.
    """
    shapes, table = shapes_of(source, recipe, device, load), recipe.train
    least = load.alone(padded=bool(shapes.padded))
    parts = {**shapes.weights, **adapter_bytes(shapes, recipe)}
    reserve = {"framework's reserve" + (", CUDA's context" if device.type == "cuda" else ""): RESERVE[device.type]}
    room = max(0, free - sum(parts.values()) - sum(reserve.values()))
    converted = converted_bytes(shapes, recipe, device)
    left = left_for_dense(shapes, table, least, room, device)
    dense = bool(converted) and shapes.dense + shapes.head_copy <= left and not processes.sharded()
    if dense:
        beside = {f"linear layers in {device.compute_dtype}, converted once": shapes.dense}
    else:
        beside = {"one layer's weights in the compute dtype": converted} if converted else {}
    # decided for a full row, also where a step has less
    rows = choose_rows(shapes, table, least, max(0, room - sum(beside.values())))
    row = max(least, min(rows.tokens, load.step))
    step = step_bytes(shapes, row, rows.recomputed)
    parts |= beside | step | {BEYOND_A_STEP: _beyond(sum(step.values()), shapes, recipe, rows, load, device)} | reserve
    own, loading = 0, 0
    if device.type == "cpu":
        # what is read counts as the process's own as long as the file is mapped
        own, loading = memory.own_bytes(), sum(shapes.weights.values()) + shapes.file
    told = (shapes.layers, shapes.trained, shapes.parameters, row, own, loading, shapes.padded, rows.why, dense)
    return Memory(parts, free, rows.recomputed, *told)


def _beyond(step: int, shapes: Shapes, recipe: Recipe, rows: RowPlan, load: Load, device: Device) -> int:
    """Bytes that the reference pass takes more than a step; 0 if it is computed along with steps, by another model that
    is gone by then, or not at all.
    """
    if not needs_reference(recipe.objective) or isinstance(recipe.reference, EmaReference | ModelReference):
        return 0
    tokens = reference_rows(shapes, rows, load.alone(padded=bool(shapes.padded)), device)
    return max(0, reference_bytes(shapes, min(tokens, load.reference or tokens)) - step)
