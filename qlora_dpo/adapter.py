"""The adapter directory: claim one for a run, save an adapter into it, find the newest, and open what was saved."""

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qlora_dpo.data.dialogue import printable
from qlora_dpo.errors import ModelError, RecipeError, RunError
from qlora_dpo.files import write_whole
from qlora_dpo.lock import LOCK, held
from qlora_dpo.manifest import MANIFEST, damage, write_manifest
from qlora_dpo.model import base, copies, device, sources
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import names_not_finite
from qlora_dpo.model.sources import Source
from qlora_dpo.recipe import LoadedRecipe, Recipe, resolved_text
from qlora_dpo.recipe_model import ModelTable

HOME = Path("adapters")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
METRICS, EVALUATION_SAMPLES = "metrics.jsonl", "evaluation_samples.jsonl"
AUDIT = "audit.json"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What a run may be called: it becomes a folder, a card's title and a tracker's run."""
FIRST_FILES = ("recipe.toml", "resolved.toml", AUDIT, METRICS, EVALUATION_SAMPLES)
LEFT_BY_ATTEMPTS = (*FIRST_FILES, "wandb", "tensorboard", "trackio", LOCK)


@dataclass
class Opened:
    """A model that is ready to answer, and what is known of it. `run` and `recipe` are None for a foreign model."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: Device
    source: Source
    folder: Path | None = None
    run: dict[str, Any] | None = None
    recipe: Recipe | None = None


def claim(folder: Path, loaded: LoadedRecipe, *, resume: bool) -> None:
    """Make `folder` the directory of one run: its recipe as written, and with every default written out.

    Raises RunError if it holds anything already, unless the run resumes there.
    """
    _insist_on_room(folder, resume=resume)
    if not resume:
        write_whole(folder / "recipe.toml", loaded.text)
    write_whole(folder / "resolved.toml", resolved_text(loaded.recipe))


def _insist_on_room(folder: Path, *, resume: bool) -> None:
    if not NAME.fullmatch(folder.resolve().name):
        raise RecipeError(
            f"{printable(str(folder))}: the name of a run has letters, digits, dots, - and _ only, and at most 64 of "
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
def claimed(folder: Path, loaded: LoadedRecipe, *, resume: bool, say: Callable[[str], None]) -> Iterator[None]:
    """`claim` for as long as a run lasts, and let no other in: one that fails early leaves `folder` as it was.

    Raises RunError if another process is in it; `say` is told if one died there.
    """
    new = not folder.exists()
    _insist_on_room(folder, resume=resume)
    try:
        with held(folder, say):
            _insist_on_room(folder, resume=resume)  # another run may have come and gone in between
            with _undone_if_it_fails_early(folder, resume=resume):
                claim(folder, loaded, resume=resume)
                yield
    except BaseException:
        if new and folder.is_dir():
            with suppress(OSError):  # it is not empty, or another run has come in
                folder.rmdir()
        raise


@contextmanager
def _undone_if_it_fails_early(folder: Path, *, resume: bool) -> Iterator[None]:
    """Put back the recipe of a resumed run that fails; take away that of a run that fails before its first figure."""
    resolved = folder / "resolved.toml"
    before = resolved.read_bytes() if resume and resolved.is_file() else None
    try:
        yield
    except BaseException:
        if before is not None:
            write_whole(resolved, before)
        elif not resume and not _has_figures(folder):
            for name in FIRST_FILES:
                (folder / name).unlink(missing_ok=True)
        raise


def _has_figures(folder: Path) -> bool:
    return (folder / METRICS).is_file() and (folder / METRICS).stat().st_size > 0


def save_adapter(folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Write adapter and tokenizer in PEFT's and transformers' own formats, and a manifest of them.

    Without adapter_config.json, which goes first and comes last, the folder counts as none: it never holds a mixture of
    two adapters. Raises RunError if a weight is not finite.
    """
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    if bad := names_not_finite(weights):
        raise RunError(f"{folder}: no adapter was written, since {bad[0]} is not finite; lower train.learning_rate")
    config = model.peft_config["default"]
    config.base_model_name_or_path = source.hub_id or str(source.folder)
    config.revision = source.revision
    with TemporaryDirectory(dir=folder, prefix=".saving.") as work:
        model.save_pretrained(work, save_embedding_layers=False)
        tokenizer.save_pretrained(work)
        Path(work, "README.md").unlink(missing_ok=True)
        files = sorted(Path(work).iterdir(), key=lambda each: each.name == CONFIG)
        for name in (CONFIG, MANIFEST):
            (folder / name).unlink(missing_ok=True)
        for file in files:
            write_whole(folder / file.name, file.read_bytes())
    write_manifest(folder, [folder / file.name for file in files])


def newest(home: Path = HOME) -> Path:
    """The adapter in `home` that was saved last; RunError if there is none."""
    found = sorted(home.glob(f"*/{CONFIG}"), key=lambda file: (file.stat().st_mtime, file))
    if not found:
        raise RunError(f"{home}: holds no adapter; train one first: qlora-dpo train recipes/quickstart.toml")
    return found[-1].parent


def open_model(target: str | None, dtype: str = "auto") -> Opened:
    """Open an adapter folder, a model folder or a hub name; None is the newest adapter.

    Raises RecipeError if there is no such thing, ModelError if it cannot be loaded or does not fit its base.
    """
    folder = newest() if target is None else Path(target).expanduser()
    if (folder / CONFIG).is_file():
        return open_adapter(folder, dtype)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RecipeError(f"{folder}: is neither an adapter ({CONFIG}) nor a model (config.json)")
        return _open_dense(ModelTable(name=str(folder.resolve()), quantization="none"), dtype, folder)
    if target is not None and target.count("/") == 1 and not target.startswith((".", "~", "/", "adapters/", "merged/")):
        return _open_from_hub(target, dtype)
    raise RecipeError(f"{target}: there is no such folder; name an adapter, a merged model or a hub model")


def _open_from_hub(name: str, dtype: str) -> Opened:
    """Open a model or, with its base, an adapter that lies on a hub."""
    folder = sources.download(name, also=["resolved.toml"])
    if not (folder / CONFIG).is_file():
        return _open_dense(ModelTable(name=name, revision=folder.name, quantization="none"), dtype, None)
    opened = open_adapter(folder, dtype)
    opened.folder = Path(name)  # what it is called: the folder in the cache is named by a hash
    return opened


def open_adapter(folder: Path, dtype: str = "auto") -> Opened:
    """Open the base as it was trained on, with the adapter of `folder`; raise ModelError if either has changed."""
    table, run, recipe = described(folder)
    here = device.choose(dtype)  # type: ignore[arg-type]
    source = sources.fetch(table)
    if run is not None:
        _insist_on_the_base_of(run, table, source, folder)
    if (folder / MANIFEST).is_file() and (folder / WEIGHTS).is_file() and (damaged := damage(folder, needed=WEIGHTS)):
        raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or train again with --resume")
    model = base.load_base(source, table, here)
    own = (folder / "tokenizer.json").is_file()
    tokenizer = base.load_tokenizer(Source(source.name, folder if own else source.folder, ""))
    # not the tokenizer's own, which another release of transformers may build in another way
    trained = (run or {}).get("tokenizer", {}).get("template")
    if trained and trained != base.tokenizer_fingerprints(tokenizer)["template"]:
        raise ModelError(
            f"{folder}: its chat template is another than it was trained with; take chat_template.jinja from a backup"
        )
    return Opened(attach_saved(model, folder), tokenizer, here, source, folder, run, recipe)


def _insist_on_the_base_of(run: dict[str, Any], table: ModelTable, source: Source, folder: Path) -> None:
    """Raise ModelError if the adapter of `run` was trained on other weights, or on weights quantized in another way."""
    trained = run["base"]
    if source.fingerprint != trained["fingerprint"]:
        raise ModelError(f"{folder}: was trained on other weights of {source.name} than are there now")
    for key in ("quantization", "double_quant"):
        if trained.get(key, getattr(table, key)) != getattr(table, key):
            raise ModelError(
                f"{folder}: was trained with model.{key} = {json.dumps(trained[key])}, and its resolved.toml says "
                f"{json.dumps(getattr(table, key))}; put that back"
            )


def attach_saved(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Attach the adapter of `folder` to its base, in evaluation mode, and check that every tensor found its place."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
        peft = PeftModel.from_pretrained(model, folder)
        _restore_copies(peft, folder)
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: has no {WEIGHTS}{_converted(folder)}") from error
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if sizes := re.search(r"size mismatch for (\S+):", str(error)):
            raise ModelError(
                f"{folder}: was made for a base of another size: {printable(sizes[1])} does not fit this one; name the "
                f"right base as base_model_name_or_path in {CONFIG}"
            ) from error
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{folder}: the adapter cannot be attached to its base: {printable(first)}") from error
    if misplaced := saved ^ set(get_peft_model_state_dict(peft, save_embedding_layers=False)):
        raise ModelError(
            f"{folder}: {len(misplaced)} tensors do not fit the base, for example {printable(min(misplaced))}"
        )
    return peft.eval()


def _restore_copies(peft: PeftModel, folder: Path) -> None:
    """Give whole copies the float32 values that were trained: PEFT has rounded them to the dtype of the base."""
    trained = copies.whole(peft)
    if trained:
        for module in trained.values():
            module.float()
        set_peft_model_state_dict(peft, load_file(folder / WEIGHTS))
        copies.keep_output_dtypes(peft)


def _converted(folder: Path) -> str:
    """How to make a pickled adapter readable, if there is one: it is never unpickled here."""
    pickled = next((file.name for ending in ("*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(ending))), None)
    if pickled is None:
        return ""
    return (
        f", and {pickled} is pickled, which can run code and is not read; if you trust it, convert it: python -c "
        f"\"import torch, safetensors.torch as s; s.save_file(torch.load('{pickled}', weights_only=True), "
        f"'{WEIGHTS}')\" in that folder"
    )


def described(folder: Path) -> tuple[ModelTable, dict[str, Any] | None, Recipe | None]:
    """What the folder says of its base: the model table, run.json and the resolved recipe, where they exist."""
    try:
        if (folder / "run.json").is_file() and (folder / "resolved.toml").is_file():
            recipe = Recipe.model_validate(tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8")))
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            return _as_trained(recipe.model, run["base"].get("revision")), run, recipe
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return _foreign_base(config["base_model_name_or_path"], config.get("revision")), None, None
    except (ValueError, KeyError, ValidationError) as error:
        why = type(error).__name__
        raise ModelError(f"{folder}: its {CONFIG}, run.json or resolved.toml is damaged ({why})") from error


def _as_trained(table: ModelTable, commit: str | None) -> ModelTable:
    """The base at the commit it was trained on, since a branch may have moved; that needs no network if cached."""
    return table if commit is None else table.model_copy(update={"revision": commit})


def _foreign_base(name: str, revision: str | None) -> ModelTable:
    """The base of an adapter made elsewhere, which says nothing of quantization: taken dense."""
    place = str(Path(name).resolve()) if Path(name).is_dir() else name
    return ModelTable(name=place, revision=None if Path(name).is_dir() else revision, quantization="none")


def _open_dense(table: ModelTable, dtype: str, folder: Path | None) -> Opened:
    here = device.choose(dtype)  # type: ignore[arg-type]
    source = sources.fetch(table)
    return Opened(base.load_base(source, table, here), base.load_tokenizer(source), here, source, folder)
