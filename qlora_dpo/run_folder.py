"""A run's folder: claim it, read its metadata, find the newest one; no model is loaded."""

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
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
from qlora_dpo.recipe.tables import is_local_path

Record = Mapping[str, Any]
"""A JSON object that a run writes: a line of metrics.jsonl or samples.jsonl, or a whole file such as run.json."""

ADAPTERS_DIR = Path("adapters")
ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
METRICS, EVALUATION_SAMPLES = "metrics.jsonl", "evaluation_samples.jsonl"
AUDIT = "audit.json"
RUN_NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Valid names of a run; the name becomes a folder, a card's title and a tracker's run."""
FILES_BEFORE_TRAINING = ("recipe.toml", "resolved.toml", AUDIT, METRICS, EVALUATION_SAMPLES)
"""What a run writes before its first step."""
DISPOSABLE_NAMES = (*FILES_BEFORE_TRAINING, "wandb", "tensorboard", "trackio", LOCK_FILE)
"""What an attempt without a checkpoint leaves behind; a new run may start beside it."""


def init_run_folder(folder: Path, loaded: LoadedRecipe, *, resume: bool) -> None:
    """Make `folder` the directory of a run: write its recipe as given, and with all defaults as resolved.toml.

    Raises RunError if the folder is not empty, unless the run resumes there.
    """
    _check_run_folder(folder, resume=resume)
    if not resume:
        atomic_write(folder / "recipe.toml", loaded.text)
    atomic_write(folder / "resolved.toml", resolved_toml(loaded.recipe))


def _check_run_folder(folder: Path, *, resume: bool) -> None:
    if not RUN_NAME_PATTERN.fullmatch(folder.resolve().name):
        raise RecipeError(
            f"{sanitize_text(str(folder))}: the name of a run has letters, digits, dots, - and _ only, and at most 64 "
            "of them; name another folder with -o DIR"
        )
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; name a new folder with -o DIR")
    if resume and not (folder / "checkpoints").is_dir():
        raise RunError(f"{folder}: holds no checkpoints to resume from; train without --resume")
    if not resume and folder.exists() and any(not _is_disposable(path) for path in folder.iterdir()):
        raise RunError(f"{folder}: is not empty; name another folder with -o DIR, remove it, or go on with --resume")


def _is_disposable(path: Path) -> bool:
    """True for what is left of an attempt that was killed before its first checkpoint: there is nothing to lose."""
    # A killed write leaves its temporary name, as in .recipe.toml.abc
    return path.name in DISPOSABLE_NAMES or path.name.startswith(tuple(f".{name}." for name in DISPOSABLE_NAMES))


@contextmanager
def exclusive_run_folder(
    folder: Path, loaded: LoadedRecipe, *, resume: bool, log: Callable[[str], None]
) -> Iterator[None]:
    """Initialise `folder` and lock it while this is open; a run that fails early leaves it as it was.

    Raises RunError if another process holds it. `log` receives a sentence if the last holder died.
    """
    new = not folder.exists()
    _check_run_folder(folder, resume=resume)
    try:
        with lock_folder(folder, log):
            _check_run_folder(folder, resume=resume)  # another run may have started and ended meanwhile
            with _rollback_on_early_failure(folder, resume=resume):
                init_run_folder(folder, loaded, resume=resume)
                yield
    except BaseException:
        if new and folder.is_dir():
            with suppress(OSError):  # not empty, or in use by another run
                folder.rmdir()
        raise


@contextmanager
def _rollback_on_early_failure(folder: Path, *, resume: bool) -> Iterator[None]:
    """On failure restore the recipe of a resumed run, and remove the files of a run without logged metrics."""
    resolved = folder / "resolved.toml"
    before = resolved.read_bytes() if resume and resolved.is_file() else None
    try:
        yield
    except BaseException:
        if before is not None:
            atomic_write(resolved, before)
        elif not resume and not _has_metrics(folder):
            for name in FILES_BEFORE_TRAINING:
                (folder / name).unlink(missing_ok=True)
        raise


def _has_metrics(folder: Path) -> bool:
    return (folder / METRICS).is_file() and (folder / METRICS).stat().st_size > 0


def newest_adapter(home: Path = ADAPTERS_DIR) -> Path:
    """The adapter in `home` that was saved last; raises RunError if there is none."""
    configs = sorted(home.glob(f"*/{ADAPTER_CONFIG_NAME}"), key=lambda file: (file.stat().st_mtime, file))
    if not configs:
        raise RunError(f"{home}: holds no adapter; train one first: qlora-dpo train recipes/quickstart.toml")
    return configs[-1].parent


def find_model_folder(target: str | None) -> Path | None:
    """The folder of the adapter or full model `target`, None for a hub name; the newest adapter if `target` is None.

    Raises RecipeError if it is neither, or cannot be read. No model library is imported.
    """
    if target is None:
        return newest_adapter()
    try:
        folder = Path(target).expanduser()
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            return folder
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise RecipeError(f"{folder}: is neither an adapter ({ADAPTER_CONFIG_NAME}) nor a model (config.json)")
            return folder
    except (OSError, RuntimeError) as error:  # a name beyond 255 bytes, a folder of others, an unknown ~user
        if " " not in target:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RecipeError(
                f"{_shortened(target)}: cannot be read ({reason}); name a folder that you may read"
            ) from error
    if any(letter.isspace() for letter in target.strip()):
        raise RecipeError(
            f'"{_shortened(target)}": there is no such folder; if that is a question, pipe it in: echo "..." | '
            "qlora-dpo chat"
        )
    if target.count("/") == 1 and not target.startswith((".", "~", "/", "adapters/", "merged/")):
        return None
    raise RecipeError(f"{_shortened(target)}: there is no such folder; name an adapter, a merged model or a hub model")


def _shortened(text: str) -> str:
    """The start of a long text, on one line."""
    line = sanitize_text(" ".join(text.split()))
    return line if len(line) <= 100 else f"{line[:100]}..."


def read_run_metadata(
    folder: Path, base_model: str | None = None
) -> tuple[ModelTable, dict[str, Any] | None, Recipe | None]:
    """The folder's [model] table, run.json and resolved recipe; the last two are None for an adapter made elsewhere.

    `base_model`, a folder or a hub name, takes the place of the base that the folder names. Raises ModelError if the
    files are damaged, or name no base and `base_model` is None.
    """
    try:
        if (folder / "run.json").is_file() and (folder / "resolved.toml").is_file():
            recipe = read_stored_recipe(tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8")))
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            table = _at_revision(recipe.model, run["base"].get("revision"))
            return (table if base_model is None else _with_base(table, base_model)), run, recipe
        config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        if base_model is None and isinstance(name, str) and name.strip():
            return _foreign_base(name, revision if isinstance(revision, str) else None), None, None
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ModelError(
            f"{folder}: its {ADAPTER_CONFIG_NAME}, run.json or resolved.toml is damaged ({type(error).__name__})"
        ) from error
    if base_model is None:
        raise ModelError(
            f"{folder}: its {ADAPTER_CONFIG_NAME} names no base (base_model_name_or_path is {json.dumps(name)}); say "
            "which model it was trained on with --base-model PATH or --base-model OWNER/NAME"
        )
    return _foreign_base(base_model, None), None, None


def _at_revision(table: ModelTable, revision: str | None) -> ModelTable:
    """The base at the commit it was trained on, since a branch may have moved; needs no network if it is cached."""
    return table if revision is None else table.model_copy(update={"revision": revision})


def _with_base(table: ModelTable, base_model: str) -> ModelTable:
    """`table` for the same model at another place, loaded in the same quantization."""
    other = _foreign_base(base_model, None)
    return table.model_copy(update={"name": other.name, "revision": None, "sha256": None})


def _foreign_base(name: str, revision: str | None) -> ModelTable:
    """The base of an adapter made elsewhere, whose config does not name a quantization: loaded unquantized."""
    if name.startswith("pypi:"):
        raise RecipeError(f"{name}: only a recipe can pin a PyPI package; name a folder or a hub model as the base")
    path = Path(name).expanduser()
    # A name with more slashes than a hub's is the path of a folder that is gone
    if path.is_dir() or name.count("/") > 1 or is_local_path(name):
        return ModelTable(name=str(path.resolve()), quantization="none")
    return ModelTable(name=name, revision=revision or None, quantization="none")
