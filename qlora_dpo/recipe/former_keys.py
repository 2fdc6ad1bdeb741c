"""Keys that recipes of older versions had: what became of each one, and how a stored recipe that has them is read."""

from collections.abc import Mapping
from typing import Any

REMOVED_KEYS: dict[str, tuple[Any, str]] = {
    "watch.displacement_nats": (0.25, "is now the constant 0.25 nats per token"),
    "watch.kl_nats": (0.5, "is now the constant 0.5 nats per token"),
    "watch.length_correlation": (0.8, "is now the constant 0.8"),
    "watch.vanishing_share": (0.5, "is now the constant 0.5"),
    "watch.skipped_share": (0.1, "is now the constant 0.1"),
    "samples.show": (3, "is gone: the first 3 prompts are shown, and samples.jsonl has all of them"),
    "train.early_stopping_threshold": (0.0, "is gone: any improvement counts"),
    "reference.double_quant": (True, "is gone: the scales of an NF4 reference are always quantized a second time"),
    "objective.beta_end": (None, "is gone: beta stays the same for the whole run"),
}
"""Removed keys, each with the value that the program now always uses (None: absent) and what to tell the user."""

RENAMED_KEYS = {"objective.losses": "loss_weights", "objective.alpha": "alphapo_alpha"}
"""Renamed keys, each with its new name in the same table."""


def describe_former_key(name: str) -> str:
    """The sentence about `name` (TABLE.KEY), a key that a recipe no longer has; empty if there was no such key."""
    table, _, key = name.partition(".")
    if name in REMOVED_KEYS:
        return f'[{table}] no longer has the key "{key}", which {REMOVED_KEYS[name][1]}; leave it out'
    if name in RENAMED_KEYS:
        return f'[{table}] no longer has the key "{key}": it is now called {table}.{RENAMED_KEYS[name]}, as in TRL'
    return ""


def upgrade_stored_recipe(values: Mapping[str, Any], *, keep_changed: bool = False) -> dict[str, Any]:
    """The tables of a recipe that an older version stored (resolved.toml, state.json), in today's keys.

    Renamed keys get their new names and removed keys are dropped. With `keep_changed`, a removed key stays if its value
    is not the one that the program now always uses, so that a comparison or the recipe's reader can report it.
    """
    return {
        name: _upgrade_table(name, table, keep_changed) if isinstance(table, Mapping) else table
        for name, table in values.items()
    }


def _upgrade_table(name: str, table: Mapping[str, Any], keep_changed: bool) -> dict[str, Any]:
    upgraded = {}
    for key, value in table.items():
        full_name = f"{name}.{key}"
        if full_name in REMOVED_KEYS and (not keep_changed or value == REMOVED_KEYS[full_name][0]):
            continue
        upgraded[RENAMED_KEYS.get(full_name, key)] = value
    return upgraded
