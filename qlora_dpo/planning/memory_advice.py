"""Which lines of a recipe would make a plan fit that does not: each tried, with what the run needs then."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlora_dpo.model.device import Device
from qlora_dpo.model.sources import Source
from qlora_dpo.planning.memory_estimate import estimate
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.meta_model import Load

SHORTEST = 128
"""Tokens of `data.max_length` below which hardly a pair is left."""


@dataclass(frozen=True)
class Way:
    """Lines of a recipe with which it fits, and the bytes that it needs then."""

    lines: tuple[str, ...]
    needed: int


@dataclass(frozen=True)
class _Change:
    table: str
    key: str
    value: Any

    @property
    def line(self) -> str:
        """The change as a line of a recipe."""
        return f"{self.table}.{self.key} = " + (f'"{self.value}"' if isinstance(self.value, str) else str(self.value))

    def of(self, recipe: Recipe) -> Recipe:
        """`recipe` with the change."""
        table = getattr(recipe, self.table).model_copy(update={self.key: self.value})
        return recipe.model_copy(update={self.table: table})


def ways_to_fit(source: Source, recipe: Recipe, device: Device, load: Load, free: int) -> tuple[Way, ...]:
    """Every single change with which `recipe` fits, each as small as it can be.

    If there is none, the first few together that do; nothing if even all of them do not.
    """
    found = []
    for changes in _changes(recipe, load):
        for change in changes:
            if (needed := _needed(source, change.of(recipe), device, load, free)) is not None:
                found.append(Way((change.line,), needed))
                break
    if found:
        return tuple(found)
    together, lines = recipe, list[str]()
    for *_, strongest in _changes(recipe, load):
        together = strongest.of(together)
        lines.append(strongest.line)
        if (needed := _needed(source, together, device, load, free)) is not None:
            return (Way(tuple(lines), needed),)
    return ()


def _changes(recipe: Recipe, load: Load) -> Iterator[list[_Change]]:
    """For each key that can help, its values from the smallest change to the largest; first what changes no result."""
    if recipe.train.gradient_checkpointing is False:
        yield [_Change("train", "gradient_checkpointing", "auto")]
    asked = recipe.train.micro_batch_tokens  # "auto" is as small as it helps
    if asked != "auto" and (rows := list(_halves(min(asked, load.step), load.sequence))):
        yield [_Change("train", "micro_batch_tokens", tokens) for tokens in rows]
    if recipe.model.quantization == "none":
        yield [_Change("model", "quantization", "nf4")]
    if lengths := list(_halves(load.sequence, SHORTEST)):
        yield [_Change("data", "max_length", tokens) for tokens in lengths]


def _halves(most: int, least: int) -> Iterator[int]:
    """The powers of 2 below `most`, down to the last that is no less than `least`."""
    tokens = 2 ** (most - 1).bit_length()
    while (tokens := tokens // 2) >= least:
        yield tokens


def _needed(source: Source, recipe: Recipe, device: Device, load: Load, free: int) -> int | None:
    """Bytes that `recipe` needs; None if it does not fit."""
    shorter = Load(min(load.sequence, recipe.data.max_length), load.step, reference=load.reference)
    memory = estimate(source, recipe, device, shorter, free)
    return memory.needed if memory.fits else None
