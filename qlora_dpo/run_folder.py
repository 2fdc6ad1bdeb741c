"""The folder of a run: whose it is, what lies in it, and what it says of its base; no model is loaded."""

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import ModelError, RecipeError, RunError
from qlora_dpo.files import atomic_write
from qlora_dpo.lock import LOCK_FILE, lock_folder
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.recipe import LoadedRecipe, read_stored_recipe, resolved_toml

HOME = Path("adapters")
ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
METRICS, EVALUATION_SAMPLES = "metrics.jsonl", "evaluation_samples.jsonl"
AUDIT = "audit.json"
RUN_NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What a run may be called: it becomes a folder, a card's title and a tracker's run."""
FIRST_FILES = ("recipe.toml", "resolved.toml", AUDIT, METRICS, EVALUATION_SAMPLES)
LEFT_BY_ATTEMPTS = (*FIRST_FILES, "wandb", "tensorboard", "trackio", LOCK_FILE)


def init_run_folder(folder: Path, loaded: LoadedRecipe, *, resume: bool) -> None:
    """Make `folder` the directory of one run: its recipe as written, and with every default written out.

    Raises RunError if it holds anything already, unless the run resumes there.
    """
    _check_run_folder(folder, resume=resume)
    if not resume:
        atomic_write(folder / "recipe.toml", loaded.text)
    atomic_write(folder / "resolved.toml", resolved_toml(loaded.recipe))


def _check_run_folder(folder: Path, *, resume: bool) -> None:
    if not RUN_NAME_PATTERN.fullmatch(folder.resolve().name):
        raise RecipeError(
            f"{sanitize_text(str(folder))}: the name of a run has letters, digits, dots, - and _ only, and at most 64 of "
            "them; name another folder with -o DIR"
        )
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; name a new folder with -o DIR")
    if resume and not (folder / "checkpoints").is_dir():
        raise RunError(f"{folder}: holds no checkpoints to resume from; train without --resume")
    # what an attempt left that was killed before its first checkpoint holds nothing to lose
    # a killed write leaves its temporary name, .recipe.toml.abc
    left = [f".{name}." for name in LEFT_BY_ATTEMPTS]
    if (
        not resume
        and folder.exists()
        and any(
            each.name not in LEFT_BY_ATTEMPTS and not each.name.startswith(tuple(left)) for each in folder.iterdir()
        )
    ):
        raise RunError(f"{folder}: is not empty; name another folder with -o DIR, remove it, or go on with --resume")


@contextmanager
def exclusive_run_folder(
    folder: Path, loaded: LoadedRecipe, *, resume: bool, log: Callable[[str], None]
) -> Iterator[None]:
    """`init_run_folder` for as long as a run lasts, and let no other in: one that fails early leaves `folder` as it was.

    Raises RunError if another process is in it; `say` is told if one died there.
    """
    new = not folder.exists()
    _check_run_folder(folder, resume=resume)
    try:
        with lock_folder(folder, log):
            _check_run_folder(folder, resume=resume)  # another run may have come and gone in between
            with _rollback_on_early_failure(folder, resume=resume):
                init_run_folder(folder, loaded, resume=resume)
                yield
    except BaseException:
        if new and folder.is_dir():
            with suppress(OSError):  # it is not empty, or another run has come in
                folder.rmdir()
        raise


@contextmanager
def _rollback_on_early_failure(folder: Path, *, resume: bool) -> Iterator[None]:
    """Put back the recipe of a resumed run that fails; take away that of a run that fails before its first figure."""
    resolved = folder / "resolved.toml"
    before = resolved.read_bytes() if resume and resolved.is_file() else None
    try:
        yield
    except BaseException:
        if before is not None:
            atomic_write(resolved, before)
        elif not resume and not _has_figures(folder):
            for name in FIRST_FILES:
                (folder / name).unlink(missing_ok=True)
        raise


def _has_figures(folder: Path) -> bool:
    return (folder / METRICS).is_file() and (folder / METRICS).stat().st_size > 0


def newest_adapter(home: Path = HOME) -> Path:
    """The adapter in `home` that was saved last; RunError if there is none."""
    found = sorted(home.glob(f"*/{ADAPTER_CONFIG_NAME}"), key=lambda file: (file.stat().st_mtime, file))
    if not found:
        raise RunError(f"{home}: holds no adapter; train one first: qlora-dpo train recipes/quickstart.toml")
    return found[-1].parent


def read_run_metadata(folder: Path) -> tuple[ModelTable, dict[str, Any] | None, Recipe | None]:
    """What the folder says of its base: the model table, run.json and the resolved recipe, where they exist."""
    try:
        if (folder / "run.json").is_file() and (folder / "resolved.toml").is_file():
            recipe = read_stored_recipe(tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8")))
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            return _as_trained(recipe.model, run["base"].get("revision")), run, recipe
        config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
        return _foreign_base(config["base_model_name_or_path"], config.get("revision")), None, None
    except (ValueError, KeyError, ValidationError) as error:
        why = type(error).__name__
        raise ModelError(
            f"{folder}: its {ADAPTER_CONFIG_NAME}, run.json or resolved.toml is damaged ({why})"
        ) from error


def _as_trained(table: ModelTable, commit: str | None) -> ModelTable:
    """The base at the commit it was trained on, since a branch may have moved; that needs no network if cached."""
    return table if commit is None else table.model_copy(update={"revision": commit})


def _foreign_base(name: str, revision: str | None) -> ModelTable:
    """The base of an adapter made elsewhere, which says nothing of quantization: taken dense."""
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    return ModelTable(name=place, revision=None if Path(name).is_dir() else revision, quantization="none")
