"""A grid of recipes: one recipe with every combination of several values for some of its keys."""

import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe import Recipe, load_recipe
from qlora_dpo.recipe.former_keys import describe_former_key, upgrade_stored_recipe
from qlora_dpo.recipe.recipe import LoadedRecipe, check_keys

MAX_NAME_LENGTH = 64
"""Most characters of a run's name."""
NEEDS_OTHER_BASE = "would need another base"
NEEDS_OTHER_PAIRS = "would need other pairs, held-out ones too, and figures of different pairs cannot be compared"
NO_EFFECT = "changes no figure of a run"
UNSWEEPABLE_KEYS = {
    "model.": NEEDS_OTHER_BASE,
    "data.": NEEDS_OTHER_PAIRS,
    "samples.": NO_EFFECT,
    "track.": NO_EFFECT,
    "train.engine": "would need another base, as TRL wants it loaded",
    "train.metric_for_best_model": "decides what is best, so it must be one for all",
    **{
        f"reference.{key}": "would need another model beside the base"
        for key in ("name", "revision", "sha256", "quantization")
    },
}
"""Keys, by prefix, that all points of a grid share, each with the reason."""
SHORT_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "batch_size": "batch",
    "lr_scheduler_type": "schedule",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "modules",
}
"""Abbreviations of long keys in the names of points, which are the first column of tables."""
SAMPLING_KEYS = ("data.max_train_samples", "data.max_eval_samples", "max_samples or weight in [[data.mix]]")


@dataclass(frozen=True)
class SweepAxis:
    """A key of the recipe and its values."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class GridPoint:
    """One combination: its name, which is its folder's too, the values that it sets, and the resulting recipe."""

    name: str
    values: Mapping[str, Any]
    loaded: LoadedRecipe

    @property
    def description(self) -> str:
        """The values in TOML: `objective.beta = 0.1, lora.r = 8`."""
        return ", ".join(f"{key} = {to_toml(value)}" for key, value in self.values.items())

    @property
    def set_options(self) -> tuple[str, ...]:
        """The values as arguments of `--set`."""
        return tuple(f"{key}={to_toml(value)}" for key, value in self.values.items())


def parse_axes(over: Sequence[str]) -> tuple[SweepAxis, ...]:
    """The axes of `--over KEY=[VALUE, ...]` options; raises RecipeError if one is invalid."""
    if not over:
        raise RecipeError("a sweep needs a key with several values: --over objective.beta=[0.05, 0.1, 0.3]")
    axes = tuple(map(_parse_axis, over))
    keys = [axis.key for axis in axes]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise RecipeError(f"--over {twice}: is given twice; write all its values in one list")
    check_keys(keys, extra_keys=(), option="--over")
    for key in keys:
        if former := describe_former_key(key):
            raise RecipeError(f"--over {key}: {former}")
        for start, why in UNSWEEPABLE_KEYS.items():
            if key.startswith(start):
                raise RecipeError(
                    f"--over {key}: a sweep has one base and one set of pairs for all its runs, and this key {why}; "
                    f"leave it out, or begin a sweep for each value: --set {key}=VALUE -o DIR"
                )
    return axes


def expand_grid(recipe_file: str, sets: Sequence[str], over: Sequence[SweepAxis]) -> list[GridPoint]:
    """Every combination of the values of `over`, on top of the `--set` values; the last axis varies fastest.

    Raises RecipeError for a combination that is not a valid recipe or cannot share base and pairs with the others.
    """
    for axis in over:
        if any(assignment.partition("=")[0].strip() == axis.key for assignment in sets):
            raise RecipeError(f"{axis.key}: stands in --set and in --over; leave one out")
    combinations = [
        {axis.key: value for axis, value in zip(over, values, strict=True)}
        for values in itertools.product(*(axis.values for axis in over))
    ]
    names = name_points(over, combinations)
    return [
        GridPoint(name, values, _load_point(recipe_file, sets, values))
        for name, values in zip(names, combinations, strict=True)
    ]


def to_toml(value: Any) -> str:
    """`value` on one line of TOML."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list():
            return f"[{', '.join(map(to_toml, value))}]"
        case dict():
            return "{ " + ", ".join(f"{json.dumps(key)} = {to_toml(item)}" for key, item in value.items()) + " }"
        case float():
            short = f"{value:g}"
            return short if float(short) == value and not short.lstrip("-").isdigit() else repr(value)
        case _:
            return str(value)


def describe_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which a stored recipe or grid differs from the present one, each with both values."""
    before, after = dict(_flatten(upgrade_stored_recipe(was, keep_changed=True))), dict(_flatten(now))
    return [
        f"{key} was {_display_value(before, key)}, is {_display_value(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _parse_axis(text: str) -> SweepAxis:
    key, equals, listed = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise RecipeError(f"--over {text}: write TABLE.KEY=[VALUE, VALUE], as in --over lora.r=[8, 16]")
    try:
        if "\n" in listed:
            raise ValueError("it has more than one line")
        values = tomllib.loads(f"value = {listed}")["value"]
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"--over {text}: the values are not valid TOML: {error}; write a list, strings in double quotes"
        ) from error
    if not isinstance(values, list) or not values:
        raise RecipeError(f"--over {text}: must be a list that is not empty: --over {key}=[{listed.strip('[]')}]")
    if twice := next((value for number, value in enumerate(values) if value in values[:number]), None):
        raise RecipeError(f"--over {text}: has the value {to_toml(twice)} twice; leave one out")
    return SweepAxis(key, tuple(values))


def _load_point(recipe_file: str, sets: Sequence[str], values: Mapping[str, Any]) -> LoadedRecipe:
    """The recipe of one combination; an error message about one of its values names `--over`."""
    assignments = [f"{key}={to_toml(value)}" for key, value in values.items()]
    try:
        loaded = load_recipe(recipe_file, (*sets, *assignments))
    except RecipeError as error:
        message = str(error)
        for assignment in assignments:
            message = message.replace(f"--set {assignment}:", f"--over {assignment}:")
        raise RecipeError(message) from error
    _check_shareable(loaded.recipe, values)
    return loaded


def _check_shareable(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Raise RecipeError for a point of the grid that would need a base or pairs of its own."""
    if recipe.train.engine == "trl":
        raise RecipeError(
            'train.engine is "trl", which wants a base loaded anew for each run; sweep with "qlora_dpo", or see '
            "docs/sweeps.md for one process a run"
        )
    data = recipe.data
    mixed = any(table.weight or table.max_samples for table in data.mix or ())
    if "train.seed" in values and (data.max_train_samples or data.max_eval_samples or mixed):
        raise RecipeError(
            f"--over train.seed: pairs are drawn with it here ({', '.join(SAMPLING_KEYS)}), so each run would have "
            "others; leave out those keys, or begin a sweep for each seed: --set train.seed=VALUE -o DIR"
        )


def name_points(over: Sequence[SweepAxis], combinations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder name for each combination: `02_beta-0.1_lr-1e-05`. The number keeps a truncated name unique."""
    last = {axis.key: axis.key.rpartition(".")[2] for axis in over}
    short = {key: SHORT_NAMES.get(name, name) for key, name in last.items()}
    for key, name in short.items():
        if list(short.values()).count(name) > 1:
            short[key] = key
    width = len(str(len(combinations)))
    return [
        "_".join([f"{number:0{width}}", *(f"{short[key]}-{_filename_safe(value)}" for key, value in values.items())])[
            :MAX_NAME_LENGTH
        ].rstrip("-_.")
        for number, values in enumerate(combinations, 1)
    ]


def _filename_safe(value: Any) -> str:
    """`value` with the characters that a folder's name may have."""
    text = value if isinstance(value, str) else to_toml(value).replace("e+", "e")  # so that 1e+30 does not become 1e-30
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "none"


def _flatten(tables: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def _display_value(values: Mapping[str, Any], key: str) -> str:
    return to_toml(values[key]) if key in values else "absent"
