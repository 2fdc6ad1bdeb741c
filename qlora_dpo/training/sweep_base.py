"""One base and one reading of the data for several runs, whose recipes have the same [model] and [data]."""

import gc
from collections.abc import Callable, Sequence

import torch

from qlora_dpo.data.progress import ProgressCallback, no_progress
from qlora_dpo.errors import RunError
from qlora_dpo.model.base_snapshot import snapshot_base
from qlora_dpo.model.device import Device
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.run import (
    Base,
    PreparedData,
    data_fingerprint,
    load_base_for_run,
    prepare_data,
    reuse_prepared_data,
)

SWEEP_FINGERPRINT_LABELS = {
    "base": "the base model's weights",
    "train": "the training pairs",
    "eval": "the held-out pairs",
}


class SweepBase:
    """Loads and reads for the first of several runs, and gives the same to the others.

    `fingerprints` are those that an earlier part of the same sweep had; empty, the first run fills them in. `tell` is
    called with them then.
    """

    def __init__(
        self, recipes: Sequence[Recipe], fingerprints: dict[str, str], on_fingerprints: Callable[[dict[str, str]], None]
    ) -> None:
        self.recipes, self.fingerprints, self.on_fingerprints = recipes, fingerprints, on_fingerprints
        self.prepared: PreparedData | None = None
        self.base: Base | None = None
        self.restore_base: Callable[[], None] = lambda: None

    def prepare(self, recipe: Recipe, watch: ProgressCallback = no_progress) -> PreparedData:
        """What `run.prepare` gives; RunError if base or pairs are others than those of the runs before."""
        if self.prepared is not None:
            return reuse_prepared_data(self.prepared, recipe)
        prepared = prepare_data(recipe, other_recipes=self.recipes, watch=watch)
        found = {
            "base": prepared.source.fingerprint,
            "train": data_fingerprint((prepared.train_with_rejected or prepared.train).encoded),
            "eval": data_fingerprint(prepared.heldout.encoded),
        }
        for name, what in SWEEP_FINGERPRINT_LABELS.items():
            if self.fingerprints.get(name, found[name]) != found[name]:
                raise RunError(
                    f"{what} are others than when this sweep began, so its figures could not be compared; put them "
                    "back, or begin another sweep with -o DIR"
                )
        self.fingerprints = found
        self.on_fingerprints(found)
        self.prepared = prepared
        return prepared

    def load(self, prepared: PreparedData, recipe: Recipe, device: Device, log: Callable[[str], None]) -> Base:
        """What `run.load_for` gives, free of what the run before has put on it."""
        if self.base is None:
            self.base = load_base_for_run(prepared, recipe, device, log)
            self.restore_base = snapshot_base(self.base.model)
        self.restore_base()
        gc.collect()  # an adapter and its base refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self.base
