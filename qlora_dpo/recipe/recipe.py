"""The recipe as one frozen value: its tables, keys and defaults, and the reader that checks them."""

import difflib
import logging
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError, ValidationInfo, field_validator

from qlora_dpo.errors import RecipeError
from qlora_dpo.files import path_exists
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.recipe.errors import describe_errors
from qlora_dpo.recipe.former_keys import REMOVED_KEYS, describe_former_key, upgrade_stored_recipe
from qlora_dpo.recipe.model import LoraTable, ModelTable
from qlora_dpo.recipe.objective import OBJECTIVE_TABLES, Objective, ReferenceFree, Sigmoid
from qlora_dpo.recipe.reference import REFERENCE_TABLES, AdapterReference, EmaReference, ModelReference, Reference
from qlora_dpo.recipe.shipped import recipe_folders
from qlora_dpo.recipe.tables import RecipeTable, is_local_path
from qlora_dpo.recipe.train import SamplesTable, TrackTable, TrainTable
from qlora_dpo.recipe.watch import WatchTable
from qlora_dpo.redact import find_secret_line

logger = logging.getLogger(__name__)

MAX_RECIPE_BYTES = 2**16
"""A longer file is not a recipe but data or a model named by mistake, and parsing it as TOML could take long."""
MAX_ERRORS_SHOWN = 20
"""Most mistakes that one message lists."""
STORED_RECIPE_NAMES = ("resolved.toml", "best.toml")
"""Recipes with every default written out, by a run and by a sweep: an older version may have written them."""


class Recipe(RecipeTable):
    """A complete recipe. Only `[model] name` and `[data] train` have no default."""

    model: ModelTable
    lora: LoraTable = LoraTable()
    data: DataTable
    objective: Objective = Sigmoid()
    train: TrainTable = TrainTable()
    reference: Reference | None = None
    watch: WatchTable = WatchTable()
    samples: SamplesTable = SamplesTable()
    track: TrackTable | None = None

    @field_validator("reference")
    @classmethod
    def _check_reference(cls, reference: Reference | None, info: ValidationInfo) -> Reference | None:
        table, train = info.data.get("objective"), info.data.get("train")
        if reference is not None and isinstance(table, ReferenceFree):
            raise ValueError(
                f'is not read by loss_type = "{table.loss_type}", which compares with no other model; leave the table '
                "out, or choose another loss_type"
            )
        if train is not None and train.engine == "trl" and reference is not None and reference.kind != "base":
            raise ValueError(
                f'has kind = "{reference.kind}", and train.engine = "trl" knows the base alone as reference of an '
                'adapter here; leave the table out, or set train.engine = "qlora_dpo"'
            )
        return reference

    @property
    def init_from(self) -> str | None:
        """The folder of the adapter that training starts from; None for a new adapter."""
        if self.lora.init_from is None and isinstance(self.reference, AdapterReference):
            return self.reference.path
        return self.lora.init_from

    @property
    def starts_as_reference(self) -> bool:
        """True if policy and reference are equal before training: every log-ratio is 0, so the first loss is known."""
        match self.reference:
            case AdapterReference():
                return self.init_from == self.reference.path
            case ModelReference():
                return False
            case EmaReference():
                return True
            case _:
                return self.init_from is None


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe with its file, text and `--set` values."""

    recipe: Recipe
    path: Path
    text: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the run: the recipe's file name without its suffix."""
        return self.path.stem


def find_recipe(path: str) -> Path:
    """Return the recipe file at `path`, or the shipped recipe of that name; raise RecipeError if there is none."""
    try:
        file = Path(path).expanduser()
        is_file, is_folder = file.is_file(), file.is_dir()
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if is_file:
        return file
    if path and is_folder:
        raise RecipeError(f"{path}: is a folder; name a recipe file in it, for example {file / 'quickstart.toml'}")
    shipped = [home / file.name for home in recipe_folders() if (home / file.name).is_file()]
    if shipped and str(file.parent) in (".", "recipes"):
        return shipped[0]
    known = sorted({f"recipes/{known.name}" for home in recipe_folders() for known in home.glob("*.toml")})
    raise RecipeError(f"{path}: there is no such recipe; shipped with this version: {', '.join(known) or 'none'}")


def load_recipe(path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and validate the recipe at `path`, with the `--set` values `overrides` on top.

    Raises RecipeError with all mistakes at once, each with its file and line.
    """
    file = find_recipe(path)
    text, values = _read_toml(path, file)
    if file.name in STORED_RECIPE_NAMES:
        values = upgrade_stored_recipe(values, keep_changed=True)
    _check_no_secrets(path, text, overrides)
    set_by_hand = {".".join(keys) for keys in (_apply_override(values, override) for override in overrides)}
    recipe = _validate(path, text, values, overrides)
    return LoadedRecipe(_with_absolute_paths(recipe, file.resolve().parent, set_by_hand), file, text, tuple(overrides))


def read_stored_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe that a finished run of this or an older version stored; raises ValidationError if it is damaged."""
    return Recipe.model_validate(upgrade_stored_recipe(values))


def check_recipe(path: str, text: str) -> None:
    """Raise RecipeError if `text` is not a valid recipe, as `load_recipe` would for a file `path` with that text."""
    _check_no_secrets(path, text, ())
    _validate(path, text, tomllib.loads(text), ())


def _validate(path: str, text: str, values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        sentences = list(describe_errors(error, Recipe, path, text, overrides))
        hidden = len(sentences) - MAX_ERRORS_SHOWN
        more = [f"{path}: {hidden:,} more mistakes"] if hidden > 0 else []
        raise RecipeError("\n".join(sentences[:MAX_ERRORS_SHOWN] + more)) from error


def _check_no_secrets(path: str, text: str, overrides: Sequence[str]) -> None:
    """Raise RecipeError if the recipe contains a token, since it is copied into every run and its model card."""
    line = find_secret_line(text)
    place = f"{path}:{line}" if line else "--set" if any(map(find_secret_line, overrides)) else ""
    if place:
        raise RecipeError(
            f"{place}: holds what looks like a token or a password, and a recipe is copied into every run and card; "
            "take it out, and log in with `hf auth login` or set HF_TOKEN"
        )


def check_keys(keys: Sequence[str], extra_keys: Sequence[str], option: str) -> None:
    """Raise RecipeError if one of `keys`, the values of `option`, is neither a recipe's key nor one of `extra_keys`.

    Removed keys pass, since the checkpoint of an older version can differ in one of them.
    """
    tables = {name: get_args(field.annotation) or (field.annotation,) for name, field in Recipe.model_fields.items()}
    tables |= {"objective": OBJECTIVE_TABLES, "reference": REFERENCE_TABLES}
    known = [f"{name}.{key}" for name, models in tables.items() for model in models for key in _table_keys(model)]
    known += extra_keys
    for key in keys:
        if key in known or key in REMOVED_KEYS:
            continue
        if former := describe_former_key(key):
            raise RecipeError(f"{option} {key}: {former}")
        near = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(key, known, 1)
        guess = f"; did you mean {near[0]}?" if near else f"; write {' or '.join(('TABLE.KEY', *extra_keys))}"
        raise RecipeError(f"{option} {key}: a recipe has no such key{guess}")


def _table_keys(table: Any) -> Iterator[str]:
    yield from getattr(table, "model_fields", ())


def resolved_toml(recipe: Recipe) -> str:
    """The recipe with every default written out, as TOML that `load_recipe` reads back to the same value."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def _read_toml(path: str, file: Path) -> tuple[str, dict[str, Any]]:
    """The text and the TOML values of `file`, which the user called `path`."""
    try:
        if file.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path}: has {file.stat().st_size:,} bytes; a recipe is a small TOML file")
        text = file.read_text(encoding="utf-8-sig")
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: is nested too deeply to be a recipe") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: is not valid TOML: {error}") from error
    except ValueError as error:  # a number with more digits than Python reads
        raise RecipeError(f"{path}: holds a number with too many digits") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error


def _apply_override(values: dict[str, Any], assignment: str) -> list[str]:
    """Put one `--set TABLE.KEY=VALUE` into `values` and return its keys. A bare word is a string."""
    name, equals, value_text = assignment.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not equals or not all(keys):
        raise RecipeError(f"--set {assignment}: write TABLE.KEY=VALUE, for example --set lora.r=8")
    value = _parse_value(assignment, value_text.strip())
    table = values
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {assignment}: {key} is a value, not a table; write TABLE.KEY=VALUE")
    table[keys[-1]] = value
    return keys


def _parse_value(assignment: str, text: str) -> Any:
    """The TOML value in `text`; invalid TOML that does not look like a string, list or table is a bare word."""
    try:
        if "\n" in text:
            raise ValueError("it has more than one line")
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError) as error:
        if not text:
            raise RecipeError(f"--set {assignment}: the value is missing; write TABLE.KEY=VALUE") from error
        if text[0] in "\"'[{" or "\n" in text or len(text) > 4300:
            raise RecipeError(f"--set {assignment}: the value is not valid TOML: {error}") from error
        return text


def _with_absolute_paths(recipe: Recipe, home: Path, set_by_hand: set[str]) -> Recipe:
    """Make local paths absolute: those of the recipe from its folder `home`, those of `--set` from the current one."""

    def absolute(key: str, name: str) -> str:
        start = Path.cwd() if key in set_by_hand else home
        try:
            return str((start / Path(name).expanduser()).resolve())
        except RuntimeError as error:
            raise RecipeError(f"{key} is {name}, and there is no such home folder; write the full path") from error

    def absolute_if_local(key: str, name: str) -> str:
        if is_local_path(name):
            return absolute(key, name)
        if key.startswith("data.") and home != Path.cwd() and path_exists(home / name):
            logger.info(f'{key} = "{name}" names a hub data set; the folder beside the recipe is "./{name}"')
        return name

    names = {"train": recipe.data.train, "eval": recipe.data.eval}
    data: dict[str, Any] = {
        key: absolute_if_local(f"data.{key}", name) for key, name in names.items() if name is not None
    }
    if recipe.data.mix is not None:
        data["mix"] = [
            table.model_copy(update={"source": absolute_if_local("data.mix", table.source)})
            for table in recipe.data.mix
        ]
    changed: dict[str, RecipeTable] = {
        "data": recipe.data.model_copy(update=data),
    }
    model = {"name": absolute_if_local("model.name", recipe.model.name)}
    if recipe.model.chat_template is not None and recipe.model.chat_template.endswith(".jinja"):
        model["chat_template"] = absolute("model.chat_template", recipe.model.chat_template)
    changed["model"] = recipe.model.model_copy(update=model)
    if recipe.lora.init_from is not None:
        changed["lora"] = recipe.lora.model_copy(
            update={"init_from": absolute("lora.init_from", recipe.lora.init_from)}
        )
    match recipe.reference:
        case AdapterReference(path=path):
            changed["reference"] = recipe.reference.model_copy(update={"path": absolute("reference.path", path)})
        case ModelReference(name=name):
            changed["reference"] = recipe.reference.model_copy(
                update={"name": absolute_if_local("reference.name", name)}
            )
    return recipe.model_copy(update=changed)
