"""One base and one reading of the data for the runs of a sweep, whose recipes share [model] and [data]."""

from collections.abc import Callable, Sequence

import torch

from qlora_dpo.data.encoded import data_fingerprint
from qlora_dpo.data.progress import ProgressCallback, no_progress
from qlora_dpo.errors import RunError
from qlora_dpo.model.base_snapshot import snapshot_base
from qlora_dpo.model.device import Device
from qlora_dpo.model.memory import free_cached_memory
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.build_model import LoadedBase, load_base_for_run
from qlora_dpo.training.prepare import PreparedData, prepare_data, reuse_prepared_data

SWEEP_FINGERPRINTS = {
    "base": "the base model's weights",
    "train": "the training pairs",
    "eval": "the held-out pairs",
}


class SweepBase:
    """Loads base and data for the first of several runs, and gives them to the others.

    `fingerprints` are those of an earlier part of the same sweep; if empty, the first run fills them in, and
    `on_fingerprints` is called with them.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        fingerprints: dict[str, str],
        on_fingerprints: Callable[[dict[str, str]], None],
    ) -> None:
        self.recipes, self.fingerprints, self.on_fingerprints = recipes, fingerprints, on_fingerprints
        self.prepared: PreparedData | None = None
        self.base: LoadedBase | None = None
        self.restore: Callable[[], None] = lambda: None

    def prepare(self, recipe: Recipe, watch: ProgressCallback = no_progress) -> PreparedData:
        """The data for one run; raises RunError if base or pairs have changed since the sweep began."""
        if self.prepared is not None:
            return reuse_prepared_data(self.prepared, recipe)
        prepared = prepare_data(recipe, other_recipes=self.recipes, watch=watch)
        found = {
            "base": prepared.source.fingerprint,
            "train": data_fingerprint((prepared.train_with_rejected or prepared.train).encoded),
            "eval": data_fingerprint(prepared.heldout.encoded),
        }
        for name, what in SWEEP_FINGERPRINTS.items():
            if self.fingerprints.get(name, found[name]) != found[name]:
                raise RunError(
                    f"{what} are others than when this sweep began, so its figures could not be compared; put them "
                    "back, or begin another sweep with -o DIR"
                )
        self.fingerprints = found
        self.on_fingerprints(found)
        self.prepared = prepared
        return prepared

    def load_base(self, prepared: PreparedData, device: Device) -> LoadedBase:
        """The base for one run, without anything that the run before has attached to it."""
        if self.base is None:
            self.base = load_base_for_run(prepared, device)
            self.restore = snapshot_base(self.base.model)
        self.restore()
        free_cached_memory()  # an adapter and its base refer to each other
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self.base
