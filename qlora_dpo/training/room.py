"""Judges before the first weight is read whether a run has room, and which lines of its recipe would make room."""

from qlora_dpo.data.encode import PairSet
from qlora_dpo.data.encoded import lengths, sequence_tokens
from qlora_dpo.data.lazily import joined
from qlora_dpo.model import budget
from qlora_dpo.model.device import Device
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.estimate import Memory, estimate
from qlora_dpo.training.run import Prepared
from qlora_dpo.training.shapes import Load
from qlora_dpo.training.ways import Way, ways_to_fit


def load_of(train: PairSet, heldout: PairSet, recipe: Recipe) -> Load:
    """What goes through the model at most with these pairs."""
    pairs = joined([train.encoded, heldout.encoded])
    sequence, pair = int(sequence_tokens(pairs).max()), int(lengths(pairs).sum(axis=1).max())
    return Load(sequence, recipe.train.batch_size * pair, pair)


def judged(prepared: Prepared, recipe: Recipe, device: Device) -> tuple[Memory, tuple[Way, ...]]:
    """What the run that was prepared needs here, and what would make it fit, if it does not."""
    load, free = load_of(prepared.train, prepared.heldout, recipe), budget.free_bytes(device)
    memory = estimate(prepared.source, recipe, device, load, free)
    return memory, () if memory.fits else ways_to_fit(prepared.source, recipe, device, load, free)
