"""All that a resume needs, in safetensors and JSON: written whole, listed with SHA-256, read only if it verifies."""

import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from qlora_dpo.training.checkpoint.integrity import checkpoint_damage
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states

SAVE_TOTAL_LIMIT = 2
MAX_SMALL_FILE_BYTES = 2**20
"""Bytes of everything in a checkpoint that is not a tensor, at most."""
# keys that may differ between the two parts of a run without changing what a step does
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
"""Keys that may name a file or folder: what lies there has a fingerprint, so it may lie elsewhere the next time."""
ROW_TOKENS_KEY = "train.micro_batch_tokens"
REFERENCE_FILE = "reference.safetensors"
"""Where a checkpoint keeps the weights of a reference that moves."""


@dataclass
class SinceEval:
    """Training pairs since the last evaluation: how many, their loss, and how many had hardly a gradient."""

    pairs: int = 0
    loss: float = 0.0
    vanished: int = 0

    def add(self, losses: Sequence[float]) -> None:
        """Count some pairs by their losses."""
        self.pairs += len(losses)
        self.loss += math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan


@dataclass
class TrainState:
    """Where a run stands: its step, what it was asked to do, and the evaluations so far."""

    step: int
    recipe: dict[str, Any]
    fingerprints: dict[str, str]
    """SHA-256 of base, tokenizer, template, both sets of pairs, and of the adapters or the model that lora.init_from
    and [reference] name, under the names that --allow knows."""
    evals: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    num_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    row_tokens: int | None = None
    """Tokens of a row that were chosen for `train.micro_batch_tokens = "auto"`, or found to fit after memory ran out;
    None while a number in the recipe does."""
    margin_mean: float = 0.0
    """The running mean of margins, in nats, that beta-DPO compares a step's margins with."""
    first_slope: float = 0.0
    """How much log-probabilities moved the loss of a pair in the first step, on average."""
    since_eval: SinceEval = field(default_factory=SinceEval)
    signs: list[dict[str, Any]] = field(default_factory=list)
    """Signs of trouble that were told: step, name and sentence."""
    best: int | None = None
    """The step of the best evaluation, where its adapter is kept."""
    stopped: str = ""
    """Why the run ended before its last step; empty if it did not."""
    stopped_by_sign: bool = False
    scheduler: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    counters: list[dict[str, float]] = field(default_factory=list)
    """What a schedule-free optimizer counts, by group of parameters."""

    def counts(self) -> list[float]:
        """What is counted in every step, pair by pair."""
        since = self.since_eval
        return [self.num_tokens, self.first_slope, since.pairs, since.loss, since.vanished]

    def set_counts(self, counts: Sequence[float]) -> None:
        """Put back what `counts` gives."""
        tokens, self.first_slope, pairs, loss, vanished = counts
        self.num_tokens, self.since_eval = int(tokens), SinceEval(int(pairs), loss, int(vanished))

    @property
    def has_stepped(self) -> bool:
        """True once a step has changed the adapter: not all steps so far were skipped."""
        return self.step > self.skipped_steps

    def count_skipped(self, skipped: bool) -> None:
        """Count the step just taken: was it skipped, since its scaled gradient overflowed?"""
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0


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
    """Write `checkpoints/step-NNNNNN` with adapter, optimizer moments (`optimized`: its state by parameter) and random
    states, and with the weights of a `moving` reference; keep the newest two.

    Raises SourceError if the disk has no room for it, RunError if a tensor is not finite; then nothing has changed.
    """
    folder = checkpoint_dir(run_dir, state.step)
    parameters = trainable_parameters(model)
    adapter, moments = _to_cpu(parameters), _to_cpu(_optimizer_tensors(parameters, optimizer_state))
    reference = _to_cpu(ema_reference or {})
    if bad := nonfinite_names(adapter | moments):
        raise RunError(f"{folder}: not written, since {bad[0]} is not finite; lower train.learning_rate")
    tensors = [*adapter.values(), *moments.values(), *reference.values()]
    check_disk_space(folder, MAX_SMALL_FILE_BYTES + sum(tensor.nbytes for tensor in tensors))
    with atomic_folder(folder) as temporary:
        save_file(adapter, temporary / "adapter.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        save_file(get_rng_states(), temporary / "random.safetensors")
        if reference:
            save_file(reference, temporary / REFERENCE_FILE)
        write_json(temporary / "state.json", asdict(state))
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
    kept = [folder for folder in sorted(home.glob("step-*"), reverse=True) if not checkpoint_damage(folder)][
        :SAVE_TOTAL_LIMIT
    ]
    for old in {*home.glob("step-*"), *home.glob(".step-*")} - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return kept


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
    values = json.loads((folder / "state.json").read_text())
    rows = values.get("row_tokens") or values.get("recipe", {}).get("train", {}).get("micro_batch_tokens")
    return rows if isinstance(rows, int) else None


def load_checkpoint(
    folder: Path,
    current: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    allowed_changes: Collection[str] = (),
) -> TrainState:
    """Put the checkpoint into model and optimizer and return its state, with what is `asked` from here on.

    Raises RunError with the keys that differ if the checkpoint belongs to another recipe, base or data than `asked`,
    unless they are `allowed`, and if its tensors do not fit the adapter.
    """
    try:
        values = json.loads((folder / "state.json").read_text())
        state = TrainState(**values | {"since_eval": SinceEval(**values.get("since_eval", {}))})
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
    if {name: value.shape for name, value in saved.items()} != {name: each.shape for name, each in parameters.items()}:
        raise RunError(f"{folder}: its adapter has other layers or ranks than [lora] asks for; put [lora] back")
    moments = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, value in saved.items():
            parameters[name].copy_(value)
    for name, parameter in parameters.items():
        own = {key.partition("|")[0]: value for key, value in moments.items() if key.partition("|")[2] == name}
        if own:
            optimizer.state[parameter] = {
                key: _to_optimizer_storage(optimizer, parameter, key, value) for key, value in own.items()
            }
    set_rng_states(load_file(folder / "random.safetensors"))
    if current.row_tokens is not None:
        state.row_tokens = current.row_tokens
    elif _flatten(state.recipe).get(ROW_TOKENS_KEY) == "auto" != _flatten(current.recipe).get(ROW_TOKENS_KEY):
        state.row_tokens = None  # a number that is allowed to take the place of "auto"
    state.recipe, state.fingerprints = current.recipe, current.fingerprints
    return state


def _to_optimizer_storage(optimizer: Any, parameter: nn.Parameter, key: str, value: Tensor) -> Tensor:
    """A part of a saved optimizer state, where this optimizer keeps it."""
    match key:
        case "step":
            return value
        case "state1" | "state2":  # bitsandbytes' moments, which a paged optimizer keeps in memory that it can page out
            held: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
            return held
        case _:
            return value.to(parameter.device)


def load_ema_reference(folder: Path, ema_reference: Mapping[str, Tensor]) -> None:
    """Put the weights that a moving reference had in the checkpoint into `moving`; RunError if it has none that fit."""
    saved = load_file(folder / REFERENCE_FILE) if (folder / REFERENCE_FILE).is_file() else {}
    if {name: value.shape for name, value in saved.items()} != {
        name: each.shape for name, each in ema_reference.items()
    }:
        raise RunError(f"{folder}: holds no reference of this adapter's shape; put [reference] and [lora] back")
    for name, value in saved.items():
        ema_reference[name].copy_(value)


def _resume_differences(state: TrainState, current: TrainState) -> dict[str, str]:
    """How what is asked differs from what the checkpoint was made by, by the name under which --allow knows it."""
    was, now = _flatten(upgrade_stored_recipe(state.recipe, keep_changed=True)), _flatten(current.recipe)
    if now.get(ROW_TOKENS_KEY) == "auto":
        was[ROW_TOKENS_KEY] = "auto"  # it goes on in the rows that there were
    changed = {
        key: f"{key} was {was.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in sorted(was.keys() | now.keys())
        if _without_local_path(key, was.get(key)) != _without_local_path(key, now.get(key))
        and not key.startswith(MUTABLE_KEYS)
    }
    return changed | {
        name: what
        for name, what in FINGERPRINT_LABELS.items()
        if state.fingerprints.get(name) != current.fingerprints.get(name)
    }


def _flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, keys in recipe.items() for key, value in keys.items()}


def _without_local_path(key: str, value: Any) -> Any:
    """The value of a key, without where on this machine it lies."""
    if key not in PATH_KEYS:
        return value
    if isinstance(value, list):
        return [{**each, "source": _without_local_path(key, each.get("source"))} for each in value]
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
