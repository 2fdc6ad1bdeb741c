"""Tokens per row and how many layers are recomputed: one decision, by the bytes of a step, for `check` and `train`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qlora_dpo.model.device import Device
from qlora_dpo.model.memory import USABLE_FRACTION
from qlora_dpo.preference.pack import STATES_PER_CHUNK
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import AdapterReference, EmaReference
from qlora_dpo.recipe.train import DEFAULT_ROW_TOKENS, TrainTable
from qlora_dpo.training.memory.footprint import ModelFootprint
from qlora_dpo.training.memory.workload import Workload

MAX_REFERENCE_ROW_FACTOR = 8
"""How many times larger than a step's rows those of the reference pass may be on a GPU."""


@dataclass(frozen=True)
class RowPlan:
    """Tokens per row, and how many layers are recomputed in the backward pass."""

    tokens: int
    recomputed_layers: int
    reason: str = ""
    """Why the row has this size, if neither the recipe says so nor memory is ample."""


def choose_row_plan(
    footprint: ModelFootprint, table: TrainTable, longest: int, free: int, resumed_row_tokens: int | None = None
) -> RowPlan:
    """The largest rows with which a step fits into `free` bytes, and as few recomputed layers as that needs.

    Rows are halved, down to the tokens of the `longest` pair, before a layer is recomputed: a pair is never split. A
    resumed run keeps `resumed_row_tokens`.
    """
    tokens, why = table.row_tokens, ""
    if resumed_row_tokens is not None:
        tokens, why = resumed_row_tokens, f"rows of {resumed_row_tokens:,} tokens, as before"
    elif table.micro_batch_tokens == "auto":
        tokens, why = _largest_fitting_rows(footprint, table, longest, free)
    count = _count_recomputed(footprint, table.gradient_checkpointing, max(tokens, longest), free)
    return RowPlan(tokens, count, why)


def describe_row_plan(
    footprint: ModelFootprint, table: TrainTable, rows: RowPlan, longest: int, free: int
) -> list[str]:
    """The decision in sentences, with `free` bytes available."""
    tokens, layers = max(rows.tokens, longest), footprint.num_layers
    needs = f"a backward pass over {tokens:,} tokens needs {total_step_bytes(footprint, tokens, 0) / 2**30:.1f} GiB"
    what = f"{rows.recomputed_layers} of {layers} layers are" if rows.recomputed_layers else "nothing is"
    says = "" if table.gradient_checkpointing == "auto" else ", as the recipe says"
    return [
        *([rows.reason] if rows.reason else []),
        f"{needs}, {free / 2**30:.1f} GiB are free: {what} recomputed{says}",
    ]


def _largest_fitting_rows(footprint: ModelFootprint, table: TrainTable, longest: int, free: int) -> tuple[int, str]:
    count = footprint.num_layers if table.gradient_checkpointing is True else 0
    *sizes, smallest = row_token_candidates(longest)
    # if none fit, the smallest: then more layers are recomputed
    tokens = next((size for size in sizes if _step_fits(footprint, size, count, free)), smallest)
    if tokens >= DEFAULT_ROW_TOKENS:
        return tokens, ""
    full_row = total_step_bytes(footprint, DEFAULT_ROW_TOKENS, count)
    return tokens, (
        f"rows of {tokens:,} tokens, since {DEFAULT_ROW_TOKENS:,} would need {full_row / 2**30:.1f} GiB, and of "
        f"{free / 2**30:.1f} GiB left for a step {free * USABLE_FRACTION / 2**30:.1f} are planned with"
    )


def largest_row_tokens(rows: RowPlan, workload: Workload, longest: int) -> int:
    """Tokens of a step's largest row: a full one, unless a step has fewer tokens or its `longest` pair more."""
    return max(longest, min(rows.tokens, workload.step_tokens))


def row_token_candidates(longest: int) -> Iterator[int]:
    """Row sizes from `DEFAULT_ROW_TOKENS` down, each half of the one before.

    The last holds the `longest` pair alone, which is never split, so smaller rows would save nothing.
    """
    yield (tokens := DEFAULT_ROW_TOKENS)
    while tokens > longest:
        yield (tokens := max(tokens // 2, longest))


def _count_recomputed(
    footprint: ModelFootprint, gradient_checkpointing: bool | Literal["auto"], tokens: int, free: int
) -> int:
    """How many layers are recomputed: as the recipe says, else as few as make the step fit, or all."""
    if gradient_checkpointing != "auto":
        return footprint.num_layers if gradient_checkpointing else 0
    return next(
        (count for count in range(footprint.num_layers) if _step_fits(footprint, tokens, count, free)),
        footprint.num_layers,
    )


def _step_fits(footprint: ModelFootprint, tokens: int, count: int, free: int) -> bool:
    return total_step_bytes(footprint, tokens, count) <= free * USABLE_FRACTION


def total_step_bytes(footprint: ModelFootprint, tokens: int, count: int) -> int:
    """Bytes of a step with rows of `tokens` tokens and `count` recomputed layers."""
    return sum(step_bytes(footprint, tokens, count).values())


def step_bytes(footprint: ModelFootprint, tokens: int, count: int) -> dict[str, int]:
    """`total_step_bytes` by part; what does not grow with the tokens has parts of its own."""
    layers = footprint.num_layers
    recomputed = f"{count} of {layers} layers" if count else "nothing"
    working = math.ceil(footprint.activations.working * tokens)
    constant = {"the output head in the compute dtype": footprint.head_copy_bytes}
    step = {
        f"activations of {tokens:,} tokens, {recomputed} recomputed": math.ceil(
            footprint.activations.bytes(tokens, layers, count)
        ),
        "backward pass of one layer, while it works": working,
        **{part: size for part, size in constant.items() if size},
        # its tiles are gone when the first layer's backward pass begins
        f"output head in chunks of {STATES_PER_CHUNK} tokens, {footprint.vocab_size:,} words, beyond that": (
            max(0, footprint.head_tile_bytes - working) + tokens * footprint.head_bytes_per_token
        ),
    }
    holes = count * tokens * footprint.fragmentation_bytes_per_token
    between = " and holes between the inputs of recomputed layers" if holes else ""
    lost = math.ceil(sum(step.values()) * footprint.fragmentation) + holes
    return step | {f"fragmentation, {footprint.fragmentation:.0%} of a step{between}": lost}


def reference_bytes(footprint: ModelFootprint, tokens: int) -> int:
    """Bytes of a pass without gradients over `tokens` tokens: one layer at a time, nothing saved."""
    body = math.ceil(tokens * (footprint.activations.forward + footprint.head_bytes_per_token))
    return math.ceil((body + footprint.head_copy_bytes + footprint.head_tile_bytes) * (1 + footprint.fragmentation))


def reference_row_tokens(footprint: ModelFootprint, rows: RowPlan, longest: int, device: Device) -> int:
    """Tokens per row of the reference pass: on a GPU up to eight times a step's, as many as its bytes hold.

    A CPU gains nothing from larger rows, which no longer fit its cache (benchmarks/README.md).
    """
    if device.type == "cpu":
        return rows.tokens
    step = total_step_bytes(footprint, max(rows.tokens, longest), rows.recomputed_layers)
    available = step - reference_bytes(footprint, 0)
    per_token = (footprint.activations.forward + footprint.head_bytes_per_token) * (1 + footprint.fragmentation)
    return max(rows.tokens, min(MAX_REFERENCE_ROW_FACTOR * rows.tokens, int(available / per_token)))


def adapter_bytes(footprint: ModelFootprint, recipe: Recipe) -> dict[str, int]:
    """Bytes of the adapter, its gradients and its optimizer state, by part."""
    weights = footprint.num_trainable * 4
    has_reference_copy = isinstance(recipe.reference, AdapterReference | EmaReference)
    return {
        "LoRA, float32": weights,
        "its gradients, float32": weights,
        f"optimizer state ({recipe.train.optim})": footprint.optimizer_state_bytes,
        **({"the reference's adapter, float32": weights} if has_reference_copy else {}),
    }


def dense_weight_budget(footprint: ModelFootprint, table: TrainTable, longest: int, free: int, device: Device) -> int:
    """Bytes that dense copies of the quantized linear layers may take, so that each is converted only once.

    `free` bytes are left beside base and adapter. On a GPU the copies get what a step with full rows leaves, so that no
    row is smaller and no layer recomputed for their sake. A CPU gains nothing from larger rows and much from dense
    copies, which get half.
    """
    if device.type == "cpu":
        return int(free * USABLE_FRACTION / 2)
    count = footprint.num_layers if table.gradient_checkpointing is True else 0
    step = total_step_bytes(footprint, max(table.row_tokens, longest), count)
    # a step counts the copy of the head, which is one of these weights
    return max(0, int(free * USABLE_FRACTION) - step + footprint.head_copy_bytes)


def conversion_bytes(footprint: ModelFootprint, recipe: Recipe, device: Device) -> int:
    """Bytes of one layer's weights while they are converted at each use; 0 if they are stored in the compute dtype."""
    other_form = recipe.model.quantization != "none" or device.weight_dtype != device.torch_dtype
    return 2 * footprint.largest_layer_bytes if other_form else 0
