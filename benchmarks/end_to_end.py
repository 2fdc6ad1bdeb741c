"""One epoch by `qlora-dpo train`, from the start of the process to the adapter on disk, with either engine.

    python benchmarks/end_to_end.py --data TRAIN.jsonl.gz --heldout EVAL.jsonl.gz [--pairs 200] [--model FOLDER]

Both engines train on the same pairs from the same first weights; 16 pairs are held out and no samples are answered.
`qlora_dpo` runs as shipped, with an empty cache: its reference is asked in the run. `trl` runs with TRL's defaults:
micro-batch 4, gradient checkpointing, the reference asked in every step. Wall clock and the process's peak memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENGINES = {
    "qlora_dpo": {},
    # with max_length 512, 4096 tokens are 4 pairs for TRL, its default
    "trl": {"micro_batch_tokens": 4096, "gradient_checkpointing": "true"},
}


def main() -> None:
    """Measure and print."""
    asked = _arguments()
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    peaks: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for _ in range(asked.rounds):
        for engine, table in ENGINES.items():
            with tempfile.TemporaryDirectory() as work:
                taken, peak = _run(asked, engine, table, Path(work))
            seconds[engine].append(taken)
            peaks[engine].append(peak)
            print(f"{engine}: {taken:.1f} s, {peak:.1f} GiB", file=sys.stderr, flush=True)
    ours, theirs = (statistics.median(taken) for taken in seconds.values())
    print(f"{asked.pairs} pairs, one epoch, {asked.dtype}, medians of {asked.rounds} rounds")
    print("| engine | s, process start to adapter on disk | peak memory, GiB |\n|---|---|---|")
    for engine in ENGINES:
        print(f"| {engine} | {statistics.median(seconds[engine]):.1f} | {statistics.median(peaks[engine]):.1f} |")
    print(f"trl takes {theirs / ours:.2f} times as long")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="pairs to train on")
    parser.add_argument("--heldout", required=True, help="other pairs")
    parser.add_argument("--model", help="a model folder; absent: the quickstart's SmolLM2-135M")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="fp32")
    return parser.parse_args()


def _run(asked: argparse.Namespace, engine: str, table: dict[str, object], work: Path) -> tuple[float, float]:
    """Train once: seconds and GiB."""
    quickstart = Path("recipes/quickstart.toml").read_text().split("[data]")[0]
    model = f'[model]\nname = "{Path(asked.model).resolve()}"\n' if asked.model else quickstart
    keys = "\n".join(f"{key} = {value}" for key, value in table.items())
    (work / "bench.toml").write_text(
        f'{model}\ndtype = "{asked.dtype}"\n[data]\ntrain = "{Path(asked.data).resolve()}"\n'
        f'eval = "{Path(asked.heldout).resolve()}"\nmax_length = 512\nmax_train_samples = {asked.pairs}\n'
        f'max_eval_samples = 16\n[train]\nengine = "{engine}"\n{keys}\n[samples]\nprompts = 0\n'
    )
    environment = {**os.environ, "QLORA_DPO_CACHE": str(work / "cache")}
    command = [sys.executable, "-m", "qlora_dpo", "train", str(work / "bench.toml"), "-o", str(work / "run")]
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    taken = time.perf_counter() - started
    return taken, json.loads((work / "run" / "run.json").read_text())["peak_bytes"] / 2**30


if __name__ == "__main__":
    main()
