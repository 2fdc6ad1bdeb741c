"""Checks whether a run fits in memory, and finds recipe changes with which it would, each with what it then needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_dpo.model import memory
from qlora_dpo.model.device import Device
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.planning.memory_estimate import MemoryEstimate, estimate_memory
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.memory.workload import Workload, workload_of
from qlora_dpo.training.prepare import PreparedData

MIN_MAX_LENGTH = 128
"""Smallest `data.max_length` that is suggested, in tokens: below it hardly any pair is left."""


@dataclass(frozen=True)
class MemoryFix:
    """Recipe lines with which a run fits, and the bytes that it needs with them."""

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
        """A copy of `recipe` with the change."""
        table = getattr(recipe, self.table).model_copy(update={self.key: self.value})
        return recipe.model_copy(update={self.table: table})


def assess_fit(prepared: PreparedData, recipe: Recipe, device: Device) -> tuple[MemoryEstimate, tuple[MemoryFix, ...]]:
    """Estimate the memory of a prepared run on `device`; if it does not fit, also find changes that would help."""
    workload, free = workload_of(prepared.train, prepared.heldout, recipe), memory.free_bytes(device)
    estimate = estimate_memory(prepared.source, recipe, device, workload, free)
    return estimate, () if estimate.fits else find_memory_fixes(prepared.source, recipe, device, workload, free)


def find_memory_fixes(
    source: ModelSource, recipe: Recipe, device: Device, workload: Workload, free: int
) -> tuple[MemoryFix, ...]:
    """Every single change with which `recipe` fits in `free` bytes, each as small as possible.

    If no single change is enough, the strongest ones are combined, in order, until the recipe fits; empty if it never
    does.
    """
    fixes = []
    for changes in _candidate_changes(recipe, workload):
        for change in changes:
            if (needed := _needed_bytes(source, change.apply_to(recipe), device, workload, free)) is not None:
                fixes.append(MemoryFix((change.line,), needed))
                break
    if fixes:
        return tuple(fixes)
    combined, lines = recipe, list[str]()
    for *_, strongest in _candidate_changes(recipe, workload):
        combined = strongest.apply_to(combined)
        lines.append(strongest.line)
        if (needed := _needed_bytes(source, combined, device, workload, free)) is not None:
            return (MemoryFix(tuple(lines), needed),)
    return ()


def _candidate_changes(recipe: Recipe, workload: Workload) -> Iterator[list[_RecipeChange]]:
    """For each key that can help, its values from the mildest to the strongest; keys that leave results alone first."""
    if recipe.train.gradient_checkpointing is False:
        yield [_RecipeChange("train", "gradient_checkpointing", "auto")]
    row_tokens = recipe.train.micro_batch_tokens  # "auto" is already as small as helps
    if row_tokens != "auto" and (
        smaller := list(_powers_of_two_below(min(row_tokens, workload.step_tokens), workload.max_sequence_tokens))
    ):
        yield [_RecipeChange("train", "micro_batch_tokens", tokens) for tokens in smaller]
    if recipe.model.quantization == "none":
        yield [_RecipeChange("model", "quantization", "nf4")]
    if lengths := list(_powers_of_two_below(workload.max_sequence_tokens, MIN_MAX_LENGTH)):
        yield [_RecipeChange("data", "max_length", tokens) for tokens in lengths]


def _powers_of_two_below(upper: int, lower: int) -> Iterator[int]:
    """The powers of 2 below `upper` in descending order, down to `lower`."""
    tokens = 2 ** (upper - 1).bit_length()
    while (tokens := tokens // 2) >= lower:
        yield tokens


def _needed_bytes(source: ModelSource, recipe: Recipe, device: Device, workload: Workload, free: int) -> int | None:
    """Bytes that `recipe` needs; None if it does not fit."""
    shortened = Workload(
        min(workload.max_sequence_tokens, recipe.data.max_length),
        workload.step_tokens,
        reference_tokens=workload.reference_tokens,
    )
    estimate = estimate_memory(source, recipe, device, shortened, free)
    return estimate.needed if estimate.fits else None
