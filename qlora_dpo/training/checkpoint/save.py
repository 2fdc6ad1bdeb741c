"""All that a resume needs, in safetensors and JSON: written whole, listed with SHA-256, read only if it verifies."""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_dpo.errors import RunError
from qlora_dpo.files import atomic_folder, check_disk_space, write_json
from qlora_dpo.manifest import write_manifest
from qlora_dpo.model.lora import nonfinite_names, trainable_parameters
from qlora_dpo.recipe.former_keys import upgrade_stored_recipe
from qlora_dpo.recipe.tables import is_local_path
from qlora_dpo.training.checkpoint.best import prune_best
from qlora_dpo.training.checkpoint.integrity import STATE_FILE, checkpoint_damage
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states
from qlora_dpo.training.checkpoint.state import TrainState

SAVE_TOTAL_LIMIT = 2
MAX_SMALL_FILE_BYTES = 2**20
"""Upper bound on the bytes in a checkpoint that are not tensors."""
# keys that may change on resume, since they do not change what a step does
MUTABLE_KEYS = (
    *("train.max_steps", "train.logging_steps", "train.eval_steps", "train.save_steps"),
    *("train.early_stopping_patience", "train.early_stopping_threshold", "watch."),
    *("data.max_bad_share", "samples.", "track."),
)

FINGERPRINT_LABELS = {
    "base": "the base model's weights",
    "tokenizer": "the tokenizer",
    "template": "the chat template",
    "pairs": "the training pairs",
    "heldout": "the held-out pairs",
    "init_from": "the adapter that training starts from",
    "reference": "the reference's weights",
}
PATH_KEYS = (
    *("model.name", "data.train", "data.eval", "data.mix"),
    *("lora.init_from", "reference.path", "reference.name"),
)
"""Keys that may name a file or folder. Its content has a fingerprint, so it may lie elsewhere on resume."""
ROW_TOKENS_KEY = "train.micro_batch_tokens"
REFERENCE_FILE = "reference.safetensors"
"""The file in a checkpoint with the weights of an EMA reference."""


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    run_dir: Path,
    state: TrainState,
    model: nn.Module,
    optimizer_state: Mapping[nn.Parameter, Mapping[str, Any]],
    ema_reference: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `checkpoints/step-NNNNNN` and keep the newest two checkpoints.

    It holds the adapter, the optimizer's moments (`optimizer_state`, by parameter), the random states, and the weights
    of an EMA reference. Raises SourceError if the disk has no space for it, and RunError if a tensor is not finite; in
    both cases nothing has changed.
    """
    folder = checkpoint_dir(run_dir, state.step)
    parameters = trainable_parameters(model)
    adapter, moments = _to_cpu(parameters), _to_cpu(_optimizer_tensors(parameters, optimizer_state))
    reference = _to_cpu(ema_reference or {})
    if nonfinite := nonfinite_names(adapter | moments):
        raise RunError(f"{folder}: not written, since {nonfinite[0]} is not finite; lower train.learning_rate")
    tensors = [*adapter.values(), *moments.values(), *reference.values()]
    check_disk_space(folder, MAX_SMALL_FILE_BYTES + sum(tensor.nbytes for tensor in tensors))
    with atomic_folder(folder) as temporary:
        save_file(adapter, temporary / "adapter.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        save_file(get_rng_states(), temporary / "random.safetensors")
        if reference:
            save_file(reference, temporary / REFERENCE_FILE)
        write_json(temporary / STATE_FILE, asdict(state))
        write_manifest(temporary, temporary.iterdir())
        if folder.exists():  # a resume has skipped it, since it is damaged
            shutil.rmtree(folder)
    damaged = checkpoint_damage(folder)
    if damaged:
        raise RunError(f"{folder}: was not written as it should be: {damaged}; check the disk")
    prune_best(folder.parent, _prune_checkpoints(folder.parent), state.best)
    return folder


def _prune_checkpoints(home: Path) -> list[Path]:
    """Keep the newest two checkpoints that verify, and nothing that a kill left half-written; returns those kept."""
    folders = sorted(home.glob("step-*"), reverse=True)
    kept = [folder for folder in folders if not checkpoint_damage(folder)][:SAVE_TOTAL_LIMIT]
    for old in {*home.glob("step-*"), *home.glob(".step-*")} - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return kept


def has_valid_checkpoint(folder: Path) -> bool:
    """True if a run can go on from a checkpoint in `folder`, which need not exist."""
    if not folder.is_dir():
        return False
    try:
        newest_valid(folder)
        return True
    except RunError:
        return False


def newest_valid(run_dir: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not; RunError if none does."""
    skipped: list[str] = []
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        damaged = checkpoint_damage(folder)
        if not damaged:
            return folder, skipped
        skipped.append(f"{folder}: skipped, since {damaged}")
    raise RunError(
        "; ".join([*skipped, f"{run_dir}: holds no checkpoint to resume from; train without --resume and with -o DIR"])
    )


def saved_row_tokens(folder: Path) -> int | None:
    """Tokens of a row in which the run of a verified checkpoint goes on to the same bytes; None if it does not say."""
    values = json.loads((folder / STATE_FILE).read_text())
    rows = values.get("row_tokens") or values.get("recipe", {}).get("train", {}).get("micro_batch_tokens")
    return rows if isinstance(rows, int) else None


def load_checkpoint(
    folder: Path,
    current: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    allowed_changes: Collection[str] = (),
) -> TrainState:
    """Load the checkpoint into model and optimizer, and return its state with the recipe of `current`.

    Raises RunError, naming the keys, if the checkpoint was made with another recipe, base or data than `current`,
    except for `allowed_changes`; also if its tensors do not fit the adapter.
    """
    try:
        values = json.loads((folder / STATE_FILE).read_text())
        state = TrainState.from_json(values)
    except TypeError as error:
        raise RunError(f"{folder}: was saved by another version of qlora_dpo; go on with that one") from error
    changed = {key: how for key, how in _resume_differences(state, current).items() if key not in allowed_changes}
    if changed:
        options = " ".join(f"--allow {key}" for key in changed)
        raise RunError(
            f"{folder}: belongs to another run; changed since: {'; '.join(changed.values())}; put it back, or go on "
            f"with {options}"
        )
    parameters, saved = trainable_parameters(model), load_file(folder / "adapter.safetensors")
    if {name: value.shape for name, value in saved.items()} != {
        name: parameter.shape for name, parameter in parameters.items()
    }:
        raise RunError(f"{folder}: its adapter has other layers or ranks than [lora] asks for; put [lora] back")
    moments = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
    for name, parameter in parameters.items():
        saved_moments = {key.partition("|")[0]: moments[key] for key in moments if key.partition("|")[2] == name}
        if saved_moments:
            optimizer.state[parameter] = {
                key: _to_optimizer_storage(optimizer, parameter, key, value) for key, value in saved_moments.items()
            }
    set_rng_states(load_file(folder / "random.safetensors"))
    if current.row_tokens is not None:
        state.row_tokens = current.row_tokens
    elif _flatten(state.recipe).get(ROW_TOKENS_KEY) == "auto" != _flatten(current.recipe).get(ROW_TOKENS_KEY):
        state.row_tokens = None  # the recipe's number was allowed to replace "auto"
    state.recipe, state.fingerprints, state.template_date = current.recipe, current.fingerprints, current.template_date
    return state


def _to_optimizer_storage(optimizer: Any, parameter: nn.Parameter, key: str, value: Tensor) -> Tensor:
    """One tensor of a saved optimizer state, on the device and in the kind of memory this optimizer keeps it in."""
    match key:
        case "step":
            return value
        case "state1" | "state2":  # bitsandbytes' moments, which a paged optimizer keeps in memory that it can page out
            buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
            return buffer
        case _:
            return value.to(parameter.device)


def load_ema_reference(folder: Path, ema_reference: Mapping[str, Tensor]) -> None:
    """Copy the EMA reference of a checkpoint into `ema_reference`; raises RunError if it has none of that shape."""
    saved = load_file(folder / REFERENCE_FILE) if (folder / REFERENCE_FILE).is_file() else {}
    if {name: value.shape for name, value in saved.items()} != {
        name: weight.shape for name, weight in ema_reference.items()
    }:
        raise RunError(f"{folder}: holds no reference of this adapter's shape; put [reference] and [lora] back")
    for name, value in saved.items():
        ema_reference[name].copy_(value)


def _resume_differences(state: TrainState, current: TrainState) -> dict[str, str]:
    """What differs between a checkpoint and the current run, one phrase per difference, by its name for --allow."""
    was, now = _flatten(upgrade_stored_recipe(state.recipe, keep_changed=True)), _flatten(current.recipe)
    if now.get(ROW_TOKENS_KEY) == "auto":
        was[ROW_TOKENS_KEY] = "auto"  # the run goes on with the checkpoint's row size
    changed = {
        key: f"{key} was {was.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in sorted(was.keys() | now.keys())
        if _without_local_path(key, was.get(key)) != _without_local_path(key, now.get(key))
        and not key.startswith(MUTABLE_KEYS)
    }
    dates = ""
    if state.template_date != current.template_date:
        dated, dated_now = state.template_date or "another date", current.template_date or "none"
        dates = f", into which the chat template writes the date ({dated} then, {dated_now} now)"
    return changed | {
        name: label + (dates if name in ("pairs", "heldout") else "")
        for name, label in FINGERPRINT_LABELS.items()
        if state.fingerprints.get(name) != current.fingerprints.get(name)
    }


def _flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, keys in recipe.items() for key, value in keys.items()}


def _without_local_path(key: str, value: Any) -> Any:
    """The value with local paths masked."""
    if key not in PATH_KEYS:
        return value
    if isinstance(value, list):
        return [{**source, "source": _without_local_path(key, source.get("source"))} for source in value]
    return "a local path" if isinstance(value, str) and (is_local_path(value) or Path(value).is_absolute()) else value


def _to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(
    parameters: Mapping[str, nn.Parameter], optimizer_state: Mapping[nn.Parameter, Mapping[str, Any]]
) -> dict[str, Tensor]:
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer_state.get(parameter, {}).items():
            moments[f"{key}|{name}"] = torch.as_tensor(value)
    return moments
