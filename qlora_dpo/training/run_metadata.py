"""run.json: enough to repeat a run and to judge its figures."""

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_dpo import __version__
from qlora_dpo.data.encoded import data_fingerprint
from qlora_dpo.data.pair_origin import read_origin
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.recipe import Recipe
from qlora_dpo.redact import redact_secrets
from qlora_dpo.training.prepare import reference_metadata
from qlora_dpo.training.run import TrainingResult

_VERSIONED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl")


def build_run_metadata(
    outcome: TrainingResult, recipe: Recipe, device: Device, folder: Path, command: str
) -> dict[str, Any]:
    """The whole of run.json."""
    prepared = outcome.prepared
    return {
        "name": folder.resolve().name,
        "status": "stopped" if outcome.state.stopped else "finished",
        **({"stopped": outcome.state.stopped} if outcome.state.stopped else {}),
        "adapter_step": outcome.state.adapter_step,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact_secrets(command),
        "versions": {
            "qlora_dpo": __version__,
            "python": platform.python_version(),
            **_installed_versions(),
        },
        "git_commit": _git_commit(),
        "seed": recipe.train.seed,
        "engine": recipe.train.engine,
        "row_tokens": outcome.state.row_tokens or recipe.train.row_tokens,
        "processes": processes.world_size(),
        **({"sharing": processes.sharding_strategy()} if processes.sharding_strategy() else {}),
        "device": {
            "type": device.type,
            "name": device.name,
            "compute_dtype": device.compute_dtype,
            "dtype_reason": device.dtype_reason,
            "attention": device.attention,
            "attention_reason": device.attention_reason,
        },
        "base": {
            "name": prepared.source.name,
            "hub_id": prepared.source.hub_id,
            "revision": prepared.source.revision,
            "fingerprint": prepared.source.fingerprint,
            "note": prepared.source.note,
            "quantization": recipe.model.quantization,
            "double_quant": recipe.model.double_quant,
        },
        "tokenizer": prepared.tokenizer_fingerprints,
        "data": {
            "train": recipe.data.train_description,
            "eval": recipe.data.eval or recipe.data.train_description,
            "fingerprint_train": data_fingerprint(prepared.train.encoded),
            "fingerprint_eval": data_fingerprint(prepared.heldout.encoded),
            "train_pairs": len(prepared.train.encoded),
            "eval_pairs": len(prepared.heldout.encoded),
            **({"origin": origin} if (origin := read_origin(recipe.data.train)) is not None else {}),
        },
        **reference_metadata(recipe, prepared.reference_spec),
        "reference_pairs_computed": outcome.reference_pairs_computed,
        "steps": outcome.state.step,
        "num_tokens": outcome.state.num_tokens,
        "seconds": round_seconds(outcome.seconds),
        "peak_bytes": outcome.peak_bytes,
    }


def round_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds by part and in total, to hundredths."""
    return {name: round(value, 2) for name, value in {**seconds, "total": sum(seconds.values())}.items()}


@cache  # each is parsed from a file of some ten kB
def _installed_versions() -> dict[str, str]:
    return {package: version(package) for package in _VERSIONED_PACKAGES}


def _git_commit() -> str | None:
    """The commit of the checkout that this code runs from, if it is one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
