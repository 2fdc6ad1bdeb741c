"""Whether a checkpoint, and the best adapter that it counts on, are still what was written; without torch."""

import json
from pathlib import Path

from qlora_dpo.manifest import find_damage

STATE_FILE = "state.json"


def checkpoint_damage(folder: Path) -> str:
    """What is wrong with a checkpoint folder, in a few words; empty if every file is as its manifest says."""
    if damaged := find_damage(folder, required="state.json"):
        return damaged
    best = json.loads((folder / "state.json").read_text()).get("best")
    if best is not None and (damaged := best_adapter_damage(folder.parents[1], best)):
        return f"the best adapter so far, best-{best:06d}, is damaged: {damaged}"
    return ""


def best_adapter_dir(run_dir: Path, step: int) -> Path:
    """Where the adapter of the best evaluation lies, which was after `step`."""
    return run_dir / "checkpoints" / f"best-{step:06d}"


def best_adapter_damage(run_dir: Path, step: int) -> str:
    """What is wrong with the best adapter, in a few words; empty if nothing."""
    return find_damage(best_adapter_dir(run_dir, step), required=STATE_FILE)
