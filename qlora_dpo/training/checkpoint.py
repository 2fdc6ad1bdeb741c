"""All that a resume needs, in safetensors and JSON: written whole, listed with SHA-256, read only if it verifies."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_dpo.errors import RunError
from qlora_dpo.files import sha256_of, whole_folder, write_json
from qlora_dpo.model.lora import trainable

KEPT = 2
MANIFEST = "manifest.json"
# keys that may differ between the two parts of a run without changing what a step does
FREE_KEYS = ("train.max_steps", "train.logging_steps", "train.eval_steps", "train.save_steps", "samples.", "track.")


@dataclass
class State:
    """Where a run stands: its step, what it was asked to do, and the evaluations so far."""

    step: int
    recipe: dict[str, Any]
    base_fingerprint: str
    data_fingerprint: str
    evals: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    num_tokens: int = 0
    scheduler: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(run_dir: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write `checkpoints/step-NNNNNN` with adapter, optimizer moments and random states; keep the newest two."""
    folder = run_dir / "checkpoints" / f"step-{state.step:06d}"
    parameters = trainable(model)
    with whole_folder(folder) as temporary:
        save_file(_on_cpu(parameters), temporary / "adapter.safetensors")
        save_file(_moments(parameters, optimizer), temporary / "optimizer.safetensors")
        save_file(_random_states(), temporary / "random.safetensors")
        write_json(temporary / "state.json", asdict(state))
        files = sorted(temporary.iterdir())
        write_json(
            temporary / MANIFEST,
            {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files},
        )
    damaged = verify(folder)
    if damaged:
        raise RunError(f"{folder}: was not written as it should be: {damaged}; check the disk")
    for old in sorted(folder.parent.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return folder


def verify(folder: Path) -> str:
    """What is wrong with a checkpoint folder, in a few words; empty if every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, expected in manifest.items():
            if (folder / name).stat().st_size != expected["bytes"]:
                return f"{name} has not its size"
            if sha256_of(folder / name) != expected["sha256"]:
                return f"{name} has not its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return "" if "state.json" in manifest else "state.json is not in the manifest"


def newest_valid(run_dir: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not; RunError if none does."""
    skipped: list[str] = []
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        damaged = verify(folder)
        if not damaged:
            return folder, skipped
        skipped.append(f"{folder}: skipped, since {damaged}")
    raise RunError(
        "; ".join([*skipped, f"{run_dir}: holds no checkpoint to resume from; train without --resume and with -o DIR"])
    )


def load_checkpoint(folder: Path, asked: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Put the checkpoint into model and optimizer and return its state.

    Raises RunError with the keys that differ if the checkpoint belongs to another recipe, base or data than `asked`.
    """
    state = State(**json.loads((folder / "state.json").read_text()))
    if changed := _differences(state, asked):
        raise RunError(f"{folder}: belongs to another run; changed since: {'; '.join(changed)}")
    parameters, moments = trainable(model), load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for name, value in load_file(folder / "adapter.safetensors").items():
            parameters[name].copy_(value)
    for name, parameter in parameters.items():
        own = {key: moments[f"{key}|{name}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
        }
    random = load_file(folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return state


def _differences(state: State, asked: State) -> list[str]:
    was, now = _flat(state.recipe), _flat(asked.recipe)
    changed = [
        f"{key} was {was.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not key.startswith(FREE_KEYS)
    ]
    if state.base_fingerprint != asked.base_fingerprint:
        changed.append("the base model's weights")
    if state.data_fingerprint != asked.data_fingerprint:
        changed.append("the training pairs")
    return changed


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for table, keys in recipe.items() for key, value in keys.items()}


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _moments(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            moments[f"{key}|{name}"] = value
    return _on_cpu(moments)


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
