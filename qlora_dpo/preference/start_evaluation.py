"""The evaluation before training, kept beside the reference's log-probabilities for later runs that start alike.

A policy that starts as its reference gives the same figures whatever the learning rate, the rank and the seed are, so a
second run of a recipe, or the next run of a sweep, need not wait for them.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from qlora_dpo.data.encoded import EncodedPair, data_fingerprint
from qlora_dpo.preference.objective import LossColumns
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import EmaReference

FORMAT = 1
"""Raised when an evaluation has other figures than before."""


def start_evaluation_file(
    cache_folder: Path, recipe: Recipe, heldout: Sequence[EncodedPair], columns: LossColumns
) -> Path | None:
    """Where the evaluation of these held-out pairs is kept in a reference's cache folder, whose name tells the model.

    None if the policy starts as another model than its reference, and for a moving reference, which has no cache: it
    starts as the policy, and so as whatever adapter training starts from.
    """
    if not recipe.starts_as_reference or isinstance(recipe.reference, EmaReference):
        return None
    values = {name: value.tolist() for name, value in vars(columns).items() if value is not None}
    tables = [table.model_dump(mode="json") for table in (recipe.objective, recipe.reference) if table is not None]
    # DoRA computes the same output in another way, which rounds differently
    key = json.dumps([FORMAT, data_fingerprint(heldout), values, tables, recipe.lora.use_dora], sort_keys=True)
    return cache_folder / f"evaluation-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
