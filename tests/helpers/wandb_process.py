"""A run log with real wandb in a process of its own, and a record for it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from fork_server import run_forked

TRAIN = {
    "step": 10,
    "epoch": 0.5,
    "loss": 0.6931,
    "rewards/accuracies": 0.5,
    "rewards/margins": 0.0,
    "learning_rate": 1e-5,
    "pairs_per_second": 1.94,
    "tokens_per_second": 410.2,
    "seconds": 80.0,
    "memory_bytes": 1288490188,
}

TRACKED = """
import json, pathlib, sys
from qlora_dpo.recipe.train import TrackTable
from qlora_dpo.tracking.run_log import RunLog
folder, project, start, config, *records = sys.argv[1:]
with RunLog(pathlib.Path(folder), 48, start_step=int(start), track=TrackTable(wandb=project),
             config=json.loads(config), name="quickstart") as run:
    for record in map(json.loads, records):
        (run.log_train if "loss" in record else run.log_evaluation)(record)
print("wandb" in sys.modules)
"""
OFFLINE = {"WANDB_MODE": "offline"}
SECRETS = {"HF_TOKEN": "hf_FakeFakeFakeFakeFake", "WANDB_API_KEY": "feedc0de" * 5}
CONFIG = {"model": {"name": "Qwen/Qwen2-0.5B-Instruct"}, "train": {"learning_rate": 5e-6, "max_steps": None}}


def tracked(
    folder: Path, *records: dict[str, Any], project: str = "house-rules", start: int = 0, env: dict[str, str] = OFFLINE
) -> subprocess.CompletedProcess[str]:
    """Log the records with real wandb in a process of its own, whose home is in `folder`."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    arguments = [str(folder), project, str(start), json.dumps(CONFIG), *map(json.dumps, records)]
    return run_forked(["-c", TRACKED, *arguments], cwd=folder, env={**environment, "HOME": str(home), **env})
