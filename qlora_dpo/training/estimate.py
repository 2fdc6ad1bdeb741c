"""What a run needs of memory, by part, at the moment most is needed; no weight is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_dpo.model import budget
from qlora_dpo.model.budget import USABLE
from qlora_dpo.model.device import Device
from qlora_dpo.model.sources import Source
from qlora_dpo.preference.layout import row_sizes, rows_that_fit, why_smaller
from qlora_dpo.preference.logps import STATES_AT_ONCE
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe_reference import AdapterReference, EmaReference
from qlora_dpo.recipe_train import ROW_TOKENS, TrainTable
from qlora_dpo.training.shapes import Load, Shapes, shapes_of

RESERVE = {"cuda": 512 * 2**20, "cpu": 80 * 2**20}
"""Bytes that the libraries take before the first step: on a GPU CUDA's context and cuBLAS; on a CPU what grows beside
all tensors from a process that has read its data to one that has taken a step (benchmarks/README.md)."""
FRAGMENTATION = 0.05
"""Share of what a step makes and frees that lies in holes between blocks of other lengths (benchmarks/README.md)."""


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
    """True if a CPU has room for the linear layers in the compute dtype, so that they are converted once."""

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
    # a padded batch holds both sequences of a pair, as long as the longest
    least = 2 * load.sequence if shapes.padded else max(load.sequence, load.pair)
    parts = {
        **shapes.weights,
        "LoRA, float32": shapes.trained * 4,
        "its gradients, float32": shapes.trained * 4,
        f"optimizer state ({table.optim})": shapes.optimizer,
    }
    if isinstance(recipe.reference, AdapterReference | EmaReference):
        parts["the reference's adapter, float32"] = shapes.trained * 4
    other_form = recipe.model.quantization != "none" or device.weight_dtype != device.torch_dtype
    # as `keep_dense_if_it_fits` decides, when the weights are there
    half = (free - sum(shapes.weights.values())) * USABLE / 2
    dense = device.type == "cpu" and other_form and shapes.dense + shapes.head_copy <= half
    if device.type == "cuda" and other_form:
        parts["one layer's weights in the compute dtype"] = 2 * shapes.largest
    elif dense:
        parts[f"linear layers in {device.compute_dtype}, converted once"] = shapes.dense
    reserve = {"framework's reserve" + (", CUDA's context" if device.type == "cuda" else ""): RESERVE[device.type]}
    room = max(0, free - sum(parts.values()) - sum(reserve.values()))
    # decided for a full row, also where a step has less
    full, smaller = _rows(table, shapes, least, room)
    count, row = _recomputed(table, shapes, max(least, full), room), max(least, min(full, load.step))
    parts |= step_bytes(shapes, row, count) | reserve
    own, loading = 0, 0
    if device.type == "cpu":
        # what is read counts as the process's own as long as the file is mapped
        own, loading = budget.own_bytes(), sum(shapes.weights.values()) + shapes.file
    told = (shapes.layers, shapes.trained, shapes.parameters, row, own, loading, shapes.padded, smaller, dense)
    return Memory(parts, free, count, *told)


def step_bytes(shapes: Shapes, row: int, count: int) -> dict[str, int]:
    """What a forward and backward pass over `row` tokens takes, with `count` layers recomputed."""
    layers = shapes.layers
    share = (layers - count + bool(count)) / max(1, layers)
    recomputed = f"{count} of {layers} layers" if count else "nothing"
    step = {
        f"activations of {row:,} tokens, {recomputed} recomputed": math.ceil(
            shapes.per_token.bytes(row, layers, count) + shapes.dora_copies * share
        ),
        "backward pass of one layer, while it works": math.ceil(shapes.per_token.working * row),
        f"output head in chunks of {STATES_AT_ONCE} tokens, {shapes.vocabulary:,} words": (
            shapes.head_copy + shapes.head_tiles + row * shapes.head_token
        ),
        "reference pass, beyond what a step takes": 0,  # it keeps nothing: one layer at a time, before the step
    }
    holes = count * row * shapes.hole_token
    between = " and holes between the inputs of recomputed layers" if holes else ""
    lost = math.ceil(sum(step.values()) * FRAGMENTATION) + holes
    return step | {f"fragmentation, {FRAGMENTATION:.0%} of a step{between}": lost}


def _rows(table: TrainTable, shapes: Shapes, least: int, room: int) -> tuple[int, str]:
    """Tokens of the rows that the run would take with so many free bytes, and why they are smaller than where memory
    allows; a pair alone has `least`.
    """
    if table.micro_batch_tokens != "auto":
        return table.micro_batch_tokens, ""
    count = shapes.layers if table.gradient_checkpointing is True else 0
    *sizes, smallest = row_sizes(least)
    needs = {size: sum(step_bytes(shapes, size, count).values()) for size in sizes}
    fitting = rows_that_fit(shapes.per_token, shapes.layers, count, least, room)
    tokens = next((size for size, need in needs.items() if size <= fitting and need <= room), smallest)
    return tokens, why_smaller(tokens, needs[ROW_TOKENS], room) if tokens < ROW_TOKENS else ""


def _recomputed(table: TrainTable, shapes: Shapes, tokens: int, room: int) -> int:
    """How many layers the run would recompute with so many free bytes; more if a step has no room otherwise."""
    match table.gradient_checkpointing:
        case "auto":
            least = budget.layers_to_checkpoint(shapes.per_token, shapes.layers, tokens, room)
            counts = range(least, shapes.layers)
            return next((n for n in counts if sum(step_bytes(shapes, tokens, n).values()) <= room), shapes.layers)
        case True:
            return shapes.layers
        case False:
            return 0
