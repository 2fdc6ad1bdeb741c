"""Judges before the first weight is read whether a run has room, and which lines of its recipe would make room."""

from qlora_dpo.model.device import Device
from qlora_dpo.model.memory import free_bytes
from qlora_dpo.planning.memory_advice import Way, ways_to_fit
from qlora_dpo.planning.memory_estimate import Memory, estimate
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.meta_model import load_of
from qlora_dpo.training.run import Prepared


def judged(prepared: Prepared, recipe: Recipe, device: Device) -> tuple[Memory, tuple[Way, ...]]:
    """What the run that was prepared needs here, and what would make it fit, if it does not."""
    load, free = load_of(prepared.train, prepared.heldout, recipe), free_bytes(device)
    memory = estimate(prepared.source, recipe, device, load, free)
    return memory, () if memory.fits else ways_to_fit(prepared.source, recipe, device, load, free)
