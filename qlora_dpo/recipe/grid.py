"""A grid of recipes: one recipe, some of its keys with several values each, and every combination of them."""

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
"""Characters that the name of a run may have."""
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
"""Keys that the points of a grid share, by how they begin, and what each point would need otherwise."""
SHORT_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "batch_size": "batch",
    "lr_scheduler_type": "schedule",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "modules",
}
"""What long keys are called in the names of points, which stand in the first column of tables."""
SAMPLING_KEYS = ("data.max_train_samples", "data.max_eval_samples", "max_samples or weight in [[data.mix]]")


@dataclass(frozen=True)
class SweepAxis:
    """A key of the recipe and the values that it takes."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class GridPoint:
    """One combination: its name, which is that of its folder, what it sets, and the recipe that comes of it."""

    name: str
    values: Mapping[str, Any]
    loaded: LoadedRecipe

    @property
    def description(self) -> str:
        """What it sets, as one would write it: `objective.beta = 0.1, lora.r = 8`."""
        return ", ".join(f"{key} = {to_toml(value)}" for key, value in self.values.items())

    @property
    def set_options(self) -> tuple[str, ...]:
        """The same for `--set`."""
        return tuple(f"{key}={to_toml(value)}" for key, value in self.values.items())


def parse_axes(over: Sequence[str]) -> tuple[SweepAxis, ...]:
    """The axes that `--over KEY=[VALUE, ...]` asks for; raises RecipeError for what is none."""
    if not over:
        raise RecipeError("a sweep needs a key with several values: --over objective.beta=[0.05, 0.1, 0.3]")
    found = tuple(map(_parse_axis, over))
    keys = [axis.key for axis in found]
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
    return found


def expand_grid(recipe_file: str, sets: Sequence[str], over: Sequence[SweepAxis]) -> list[GridPoint]:
    """Every combination of the values in `over`, the last axis fastest, with `--set` values below.

    Raises RecipeError for a combination that is no recipe, and for one that cannot share base and pairs.
    """
    for axis in over:
        if any(each.partition("=")[0].strip() == axis.key for each in sets):
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
            return "{ " + ", ".join(f"{json.dumps(key)} = {to_toml(each)}" for key, each in value.items()) + " }"
        case float():
            short = f"{value:g}"
            return short if float(short) == value and not short.lstrip("-").isdigit() else repr(value)
        case _:
            return str(value)


def describe_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a stored recipe or grid and the present one, a few words for each key."""
    one, other = dict(_flatten(upgrade_stored_recipe(was, keep_changed=True))), dict(_flatten(now))
    return [
        f"{key} was {_display_value(one, key)}, is {_display_value(other, key)}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
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
    """The recipe of one combination; a mistake in it is told as one of `--over`."""
    own = [f"{key}={to_toml(value)}" for key, value in values.items()]
    try:
        loaded = load_recipe(recipe_file, (*sets, *own))
    except RecipeError as error:
        told = str(error)
        for each in own:
            told = told.replace(f"--set {each}:", f"--over {each}:")
        raise RecipeError(told) from error
    _check_shareable(loaded.recipe, values)
    return loaded


def _check_shareable(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Raise RecipeError for a recipe whose runs cannot have the same base or the same pairs."""
    if recipe.train.engine == "trl":
        raise RecipeError(
            'train.engine is "trl", which wants a base loaded anew for each run; sweep with "qlora_dpo", or see '
            "docs/sweeps.md for one process a run"
        )
    data = recipe.data
    mixed = any(each.weight or each.max_samples for each in data.mix or ())
    if "train.seed" in values and (data.max_train_samples or data.max_eval_samples or mixed):
        raise RecipeError(
            f"--over train.seed: pairs are drawn with it here ({', '.join(SAMPLING_KEYS)}), so each run would have "
            "others; leave out those keys, or begin a sweep for each seed: --set train.seed=VALUE -o DIR"
        )


def name_points(over: Sequence[SweepAxis], combinations: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder name for each combination: `02_beta-0.1_lr-1e-05`. Its number keeps it apart when cut."""
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
    """`value` in the characters that a folder's name may have."""
    text = value if isinstance(value, str) else to_toml(value).replace("e+", "e")  # 1e+30 is not to read as 1e-30
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "none"


def _flatten(tables: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def _display_value(values: Mapping[str, Any], key: str) -> str:
    return to_toml(values[key]) if key in values else "absent"
