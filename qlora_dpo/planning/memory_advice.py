"""Which lines of a recipe would make a plan fit that does not: each tried, with what the run needs then."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_dpo.model.device import Device
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.planning.memory_estimate import estimate_memory
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.meta_model import Workload

MIN_MAX_LENGTH = 128
"""Tokens of `data.max_length` below which hardly a pair is left."""


@dataclass(frozen=True)
class MemoryFix:
    """Lines of a recipe with which it fits, and the bytes that it needs then."""

    recipe_lines: tuple[str, ...]
    needed_bytes: int


@dataclass(frozen=True)
class _RecipeChange:
    table: str
    key: str
    value: Any

    @property
    def line(self) -> str:
        """The change as a line of a recipe."""
        return f"{self.table}.{self.key} = " + (f'"{self.value}"' if isinstance(self.value, str) else str(self.value))

    def apply_to(self, recipe: Recipe) -> Recipe:
        """`recipe` with the change."""
        table = getattr(recipe, self.table).model_copy(update={self.key: self.value})
        return recipe.model_copy(update={self.table: table})


def find_memory_fixes(
    source: ModelSource, recipe: Recipe, device: Device, workload: Workload, free: int
) -> tuple[MemoryFix, ...]:
    """Every single change with which `recipe` fits, each as small as it can be.

    If there is none, the first few together that do; nothing if even all of them do not.
    """
    found = []
    for changes in _candidate_changes(recipe, workload):
        for change in changes:
            if (needed := _needed_bytes(source, change.apply_to(recipe), device, workload, free)) is not None:
                found.append(MemoryFix((change.line,), needed))
                break
    if found:
        return tuple(found)
    together, lines = recipe, list[str]()
    for *_, strongest in _candidate_changes(recipe, workload):
        together = strongest.apply_to(together)
        lines.append(strongest.line)
        if (needed := _needed_bytes(source, together, device, workload, free)) is not None:
            return (MemoryFix(tuple(lines), needed),)
    return ()


def _candidate_changes(recipe: Recipe, workload: Workload) -> Iterator[list[_RecipeChange]]:
    """For each key that can help, its values from the smallest change to the largest; first what changes no result."""
    if recipe.train.gradient_checkpointing is False:
        yield [_RecipeChange("train", "gradient_checkpointing", "auto")]
    asked = recipe.train.micro_batch_tokens  # "auto" is as small as it helps
    if asked != "auto" and (
        rows := list(_powers_of_two_below(min(asked, workload.step_tokens), workload.max_sequence_tokens))
    ):
        yield [_RecipeChange("train", "micro_batch_tokens", tokens) for tokens in rows]
    if recipe.model.quantization == "none":
        yield [_RecipeChange("model", "quantization", "nf4")]
    if lengths := list(_powers_of_two_below(workload.max_sequence_tokens, MIN_MAX_LENGTH)):
        yield [_RecipeChange("data", "max_length", tokens) for tokens in lengths]


def _powers_of_two_below(upper: int, lower: int) -> Iterator[int]:
    """The powers of 2 below `most`, down to the last that is no less than `least`."""
    tokens = 2 ** (upper - 1).bit_length()
    while (tokens := tokens // 2) >= lower:
        yield tokens


def _needed_bytes(source: ModelSource, recipe: Recipe, device: Device, workload: Workload, free: int) -> int | None:
    """Bytes that `recipe` needs; None if it does not fit."""
    shorter = Workload(
        min(workload.max_sequence_tokens, recipe.data.max_length),
        workload.step_tokens,
        reference_tokens=workload.reference_tokens,
    )
    memory = estimate_memory(source, recipe, device, shorter, free)
    return memory.needed if memory.fits else None
