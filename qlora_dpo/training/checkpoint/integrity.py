"""Whether a checkpoint, and the best adapter it refers to, are still as they were written; needs no torch."""

import json
from pathlib import Path

from qlora_dpo.manifest import find_damage

STATE_FILE = "state.json"


def checkpoint_damage(folder: Path) -> str:
    """What is damaged in a checkpoint folder, in a few words; empty if every file matches its manifest."""
    if damaged := find_damage(folder, required="state.json"):
        return damaged
    best = json.loads((folder / "state.json").read_text()).get("best")
    if best is not None and (damaged := best_adapter_damage(folder.parents[1], best)):
        return f"the best adapter so far, best-{best:06d}, is damaged: {damaged}"
    return ""


def best_adapter_dir(run_dir: Path, step: int) -> Path:
    """The folder of the best adapter, whose evaluation was after `step`."""
    return run_dir / "checkpoints" / f"best-{step:06d}"


def best_adapter_damage(run_dir: Path, step: int) -> str:
    """What is damaged in the best adapter, in a few words; empty if nothing is."""
    return find_damage(best_adapter_dir(run_dir, step), required=STATE_FILE)
