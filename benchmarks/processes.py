"""How far the run of several processes is from that of one: losses and adapter, and what each process holds.

    python benchmarks/processes.py recipes/quickstart.toml [--steps 6] [--processes 1,2,4]

Each run is `qlora-dpo train RECIPE --processes N` in float32, in a folder that is removed at the end. Its wall seconds
are those of processes that share this machine's cores, so on a machine without GPUs they say little.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def main() -> None:
    """Run, compare with the first, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--processes", default="1,2,4")
    asked = parser.parse_args()
    print("| processes | adapter, relative L2 distance | losses, largest difference | loss, first and last | s |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        first: dict[str, Any] | None = None
        for count in map(int, asked.processes.split(",")):
            found = _run(asked.recipe, asked.steps, count, Path(work, f"with-{count}"))
            first = first or found
            losses = found["losses"]
            apart = max(abs(one - other) for one, other in zip(losses, first["losses"], strict=True))
            distance = float((found["adapter"] - first["adapter"]).norm() / first["adapter"].norm())
            ends = f"{losses[0]:.6f}, {losses[-1]:.6f}"
            print(f"| {count} | {distance:.1e} | {apart:.1e} | {ends} | {found['seconds']:.0f} |", flush=True)


def _run(recipe: str, steps: int, count: int, folder: Path) -> dict[str, Any]:
    """Train; all weights of the adapter in one vector, and the losses of all steps and evaluations."""
    own = ["--set", "model.dtype=fp32", "--set", "train.logging_steps=1", "--set", "samples.prompts=1"]
    command = [sys.executable, "-m", "qlora_dpo", "train", recipe, "--max-steps", str(steps), "-o", str(folder), *own]
    began = time.monotonic()
    several = ["--processes", str(count)] if count > 1 else []
    subprocess.run([*command, *several], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    weights = load_file(folder / "adapter_model.safetensors")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "adapter": torch.cat([weights[name].flatten().double() for name in sorted(weights)]),
        "losses": [record.get("loss", record.get("eval_loss")) for record in records if record["kind"] != "sign"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
