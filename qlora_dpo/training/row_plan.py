"""How many tokens a row has, how many layers are recomputed and what is kept beside: one decision, by the bytes that a
step takes, for `check` and for `train`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qlora_dpo.model.device import Device
from qlora_dpo.model.memory import USABLE
from qlora_dpo.preference.pack import STATES_AT_ONCE
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import AdapterReference, EmaReference
from qlora_dpo.recipe.train import ROW_TOKENS, TrainTable
from qlora_dpo.training.meta_model import Shapes

FRAGMENTATION = 0.05
"""Share of what a step makes and frees that lies in holes between blocks of other lengths (benchmarks/README.md)."""
LARGER = 8
"""How many times larger than a step's the rows of the reference pass may be on a GPU."""


@dataclass(frozen=True)
class RowPlan:
    """Tokens of a row, and how many of the layers are recomputed in its backward pass."""

    tokens: int
    recomputed: int
    why: str = ""
    """Where these tokens come from, if neither from the recipe nor from ample memory."""


def choose_rows(shapes: Shapes, table: TrainTable, longest: int, free: int, before: int | None = None) -> RowPlan:
    """The largest rows of which a step fits in `free` bytes, and as few recomputed layers as it needs for that.

    Rows are halved before a layer is recomputed, down to the `longest` pair alone, which goes through whole. A part of
    the run `before` this one has had rows of so many tokens, which then stay.
    """
    tokens, why = table.row_tokens, ""
    if before is not None:
        tokens, why = before, f"rows of {before:,} tokens, as before"
    elif table.micro_batch_tokens == "auto":
        tokens, why = _fitting(shapes, table, longest, free)
    count = _recomputed(shapes, table.gradient_checkpointing, max(tokens, longest), free)
    return RowPlan(tokens, count, why)


def decisions(shapes: Shapes, table: TrainTable, rows: RowPlan, longest: int, free: int) -> list[str]:
    """What was decided where so many bytes are free, in sentences."""
    tokens, layers = max(rows.tokens, longest), shapes.layers
    needs = f"a backward pass over {tokens:,} tokens needs {needed(shapes, tokens, 0) / 2**30:.1f} GiB"
    what = f"{rows.recomputed} of {layers} layers are" if rows.recomputed else "nothing is"
    says = "" if table.gradient_checkpointing == "auto" else ", as the recipe says"
    return [
        *([rows.why] if rows.why else []),
        f"{needs}, {free / 2**30:.1f} GiB are free: {what} recomputed{says}",
    ]


def _fitting(shapes: Shapes, table: TrainTable, longest: int, free: int) -> tuple[int, str]:
    count = shapes.layers if table.gradient_checkpointing is True else 0
    *sizes, smallest = row_sizes(longest)
    # if none fit, the smallest: then more layers are recomputed
    tokens = next((size for size in sizes if _fits(shapes, size, count, free)), smallest)
    if tokens >= ROW_TOKENS:
        return tokens, ""
    return tokens, (
        f"rows of {tokens:,} tokens, since {ROW_TOKENS:,} would need {needed(shapes, ROW_TOKENS, count) / 2**30:.1f} "
        f"GiB, and of {free / 2**30:.1f} GiB left for a step {free * USABLE / 2**30:.1f} are planned with"
    )


def row_sizes(longest: int) -> Iterator[int]:
    """Tokens of a row from `ROW_TOKENS` down, each half of the one before.

    The last is as long as the `longest` pair alone, which goes through the model whole: smaller rows keep no less.
    """
    yield (tokens := ROW_TOKENS)
    while tokens > longest:
        yield (tokens := max(tokens // 2, longest))


def _recomputed(shapes: Shapes, wanted: bool | Literal["auto"], tokens: int, free: int) -> int:
    """How many layers are recomputed: as the recipe says, or as few as have to be; all if none is enough."""
    if wanted != "auto":
        return shapes.layers if wanted else 0
    return next((count for count in range(shapes.layers) if _fits(shapes, tokens, count, free)), shapes.layers)


def _fits(shapes: Shapes, tokens: int, count: int, free: int) -> bool:
    return needed(shapes, tokens, count) <= free * USABLE


def needed(shapes: Shapes, tokens: int, count: int) -> int:
    """Bytes that a step takes of which so many tokens go through the model at once, with `count` layers recomputed."""
    return sum(step_bytes(shapes, tokens, count).values())


def step_bytes(shapes: Shapes, tokens: int, count: int) -> dict[str, int]:
    """The same by part. What does not grow with the tokens has parts of its own, if there is any."""
    layers = shapes.layers
    recomputed = f"{count} of {layers} layers" if count else "nothing"
    working = math.ceil(shapes.per_token.working * tokens)
    constant = {"the output head in the compute dtype": shapes.head_copy}
    step = {
        f"activations of {tokens:,} tokens, {recomputed} recomputed": math.ceil(
            shapes.per_token.bytes(tokens, layers, count)
        ),
        "backward pass of one layer, while it works": working,
        **{part: size for part, size in constant.items() if size},
        # its tiles are gone when the first layer's backward pass begins
        f"output head in chunks of {STATES_AT_ONCE} tokens, {shapes.vocabulary:,} words, beyond that": (
            max(0, shapes.head_tiles - working) + tokens * shapes.head_token
        ),
    }
    holes = count * tokens * shapes.hole_token
    between = " and holes between the inputs of recomputed layers" if holes else ""
    lost = math.ceil(sum(step.values()) * FRAGMENTATION) + holes
    return step | {f"fragmentation, {FRAGMENTATION:.0%} of a step{between}": lost}


def reference_bytes(shapes: Shapes, tokens: int) -> int:
    """Bytes that a pass without gradients takes over so many tokens: nothing is kept, a layer works at a time."""
    body = math.ceil(tokens * (shapes.per_token.forward + shapes.head_token))
    return math.ceil((body + shapes.head_copy + shapes.head_tiles) * (1 + FRAGMENTATION))


def reference_rows(shapes: Shapes, rows: RowPlan, longest: int, device: Device) -> int:
    """Tokens of the rows of the reference pass: on a GPU up to eight times more, as many as a step's bytes hold.

    A CPU gains nothing from larger rows, which leave its cache (benchmarks/README.md).
    """
    if device.type == "cpu":
        return rows.tokens
    held = needed(shapes, max(rows.tokens, longest), rows.recomputed) - reference_bytes(shapes, 0)
    of_token = (shapes.per_token.forward + shapes.head_token) * (1 + FRAGMENTATION)
    return max(rows.tokens, min(LARGER * rows.tokens, int(held / of_token)))


def adapter_bytes(shapes: Shapes, recipe: Recipe) -> dict[str, int]:
    """Bytes by part of the adapter and of all that training keeps for it."""
    numbers = shapes.trained * 4
    held = isinstance(recipe.reference, AdapterReference | EmaReference)
    return {
        "LoRA, float32": numbers,
        "its gradients, float32": numbers,
        f"optimizer state ({recipe.train.optim})": shapes.optimizer,
        **({"the reference's adapter, float32": numbers} if held else {}),
    }


def left_for_dense(shapes: Shapes, table: TrainTable, longest: int, free: int, device: Device) -> int:
    """Bytes that the linear layers may take in the compute dtype beside their stored form, so that they are converted
    once; `free` are those beside base and adapter.

    On a GPU what a step in full rows leaves of them, so that no row is smaller and no layer recomputed for it. A CPU
    gains nothing from larger rows and much from this: half of them.
    """
    if device.type == "cpu":
        return int(free * USABLE / 2)
    count = shapes.layers if table.gradient_checkpointing is True else 0
    step = needed(shapes, max(table.row_tokens, longest), count)
    return max(0, int(free * USABLE) - step + shapes.head_copy)  # the head's copy is one of those weights


def converted_bytes(shapes: Shapes, recipe: Recipe, device: Device) -> int:
    """Bytes of a layer's weights while they are converted in each visit; 0 if they are stored in the compute dtype."""
    other_form = recipe.model.quantization != "none" or device.weight_dtype != device.torch_dtype
    return 2 * shapes.largest if other_form else 0
