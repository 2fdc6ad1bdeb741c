"""One base and one reading of the data for several runs, whose recipes have the same [model] and [data]."""

import gc
from collections.abc import Callable, Sequence

import torch

from qlora_dpo.data.progress import Watch, unwatched
from qlora_dpo.errors import RunError
from qlora_dpo.model.base_snapshot import remember
from qlora_dpo.model.device import Device
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.run import Base, Prepared, data_fingerprint, load_for, prepare, prepare_again

FINGERPRINTS = {
    "base": "the base model's weights",
    "train": "the training pairs",
    "eval": "the held-out pairs",
}


class Shared:
    """Loads and reads for the first of several runs, and gives the same to the others.

    `fingerprints` are those that an earlier part of the same sweep had; empty, the first run fills them in. `tell` is
    called with them then.
    """

    def __init__(
        self, recipes: Sequence[Recipe], fingerprints: dict[str, str], tell: Callable[[dict[str, str]], None]
    ) -> None:
        self.recipes, self.fingerprints, self.tell = recipes, fingerprints, tell
        self.prepared: Prepared | None = None
        self.base: Base | None = None
        self.put_back: Callable[[], None] = lambda: None

    def prepare(self, recipe: Recipe, watch: Watch = unwatched) -> Prepared:
        """What `run.prepare` gives; RunError if base or pairs are others than those of the runs before."""
        if self.prepared is not None:
            return prepare_again(self.prepared, recipe)
        prepared = prepare(recipe, others=self.recipes, watch=watch)
        found = {
            "base": prepared.source.fingerprint,
            "train": data_fingerprint((prepared.both_answers or prepared.train).encoded),
            "eval": data_fingerprint(prepared.heldout.encoded),
        }
        for name, what in FINGERPRINTS.items():
            if self.fingerprints.get(name, found[name]) != found[name]:
                raise RunError(
                    f"{what} are others than when this sweep began, so its figures could not be compared; put them "
                    "back, or begin another sweep with -o DIR"
                )
        self.fingerprints = found
        self.tell(found)
        self.prepared = prepared
        return prepared

    def load(self, prepared: Prepared, recipe: Recipe, device: Device, say: Callable[[str], None]) -> Base:
        """What `run.load_for` gives, free of what the run before has put on it."""
        if self.base is None:
            self.base = load_for(prepared, recipe, device, say)
            self.put_back = remember(self.base.model)
        self.put_back()
        gc.collect()  # an adapter and its base refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self.base
