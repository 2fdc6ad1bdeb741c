"""Our loop against stock `trl.DPOTrainer`: pairs per second on the same recipe, in turn.

    python benchmarks/engines.py [ROUNDS]     # prints medians and their ratio

Each round runs `recipes/quickstart.toml` for a few steps with either engine, from the same first weights, on the same
pairs in the same order. The first logged step warms up and is left out. TRL asks the reference in every step, this
project before the first one; its seconds per pair are printed beside and counted in the second ratio.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 9


def main(rounds: int) -> None:
    """Run, compare and print."""
    seconds: dict[str, list[float]] = {"qlora_dpo": [], "trl": []}
    reference: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        for turn in range(rounds):
            for engine, taken in seconds.items():
                folder = Path(work, f"{engine}-{turn}")
                command = ["train", "recipes/quickstart.toml", "--max-steps", str(STEPS), "-o", str(folder)]
                changes = [f"train.engine={engine}", "samples.prompts=0", "data.max_eval_samples=1"]
                settings = [part for change in changes for part in ("--set", change)]
                subprocess.run(
                    [sys.executable, "-m", "qlora_dpo", *command, *settings], check=True, capture_output=True
                )
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                train = [line for line in lines if line["kind"] == "train"]
                taken.append((train[-1]["seconds"] - train[0]["seconds"]) / ((STEPS - 1) * 8))
                run = json.loads((folder / "run.json").read_text())
                if run["reference_pairs_computed"]:
                    reference.append(run["seconds"]["reference"] / run["reference_pairs_computed"])
    ours, theirs = (statistics.median(taken) for taken in seconds.values())
    print(f"medians of {rounds} rounds, {STEPS - 1} steps of 8 pairs each, in seconds per pair")
    print(f"qlora_dpo {ours:.3f}, trl {theirs:.3f}: ratio {theirs / ours:.2f}")
    if reference:
        once = statistics.median(reference)
        print(f"the reference once: {once:.3f}; ratio with it, for one epoch {theirs / (ours + once):.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
