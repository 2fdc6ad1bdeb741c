"""Judges before the first weight is read whether a run has room, and which lines of its recipe would make room."""

from qlora_dpo.model.device import Device
from qlora_dpo.model.memory import free_bytes
from qlora_dpo.planning.memory_advice import MemoryFix, find_memory_fixes
from qlora_dpo.planning.memory_estimate import MemoryEstimate, estimate_memory
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.meta_model import workload_of
from qlora_dpo.training.prepare import PreparedData


def assess_fit(prepared: PreparedData, recipe: Recipe, device: Device) -> tuple[MemoryEstimate, tuple[MemoryFix, ...]]:
    """What the run that was prepared needs here, and what would make it fit, if it does not."""
    load, free = workload_of(prepared.train, prepared.heldout, recipe), free_bytes(device)
    memory = estimate_memory(prepared.source, recipe, device, load, free)
    return memory, () if memory.fits else find_memory_fixes(prepared.source, recipe, device, load, free)
