"""Reading many HH-like pairs: rows per second and peak memory, first with an empty cache and then with a full one.

    python benchmarks/reading.py --data full-hh-style.jsonl.gz --tokenizer FOLDER [--rows 160000]

The rows of `--data` (columns prompt, chosen, rejected) are repeated, each time with other prompts, until there are
enough. Each reading is a process of its own, which reads the training part as `qlora-dpo train` does.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Make the rows, read them twice, print a table."""
    asked = _arguments()
    if asked.read:
        print(json.dumps(_read(asked.data, asked.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work, "rows.jsonl")
        _make(asked.data, asked.rows, rows)
        print(f"{asked.rows:,} rows, {rows.stat().st_size / 1e6:,.0f} MB")
        print("| reading | pairs used | s | rows/s | CPU s | memory before, MiB | peak, MiB |")
        print("|---|---|---|---|---|---|---|")
        for name in ("first", "again, from the cache"):
            told = _in_a_process(rows, asked.tokenizer, Path(work, "cache"))
            print(
                f"| {name} | {told['used']:,} | {told['seconds']:.1f} | {told['rows'] / told['seconds']:,.0f} "
                f"| {told['cpu']:.1f} | {told['before'] / 2**20:,.0f} | {told['peak'] / 2**20:,.0f} |",
                flush=True,
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="JSON lines, plain or .gz")
    parser.add_argument("--tokenizer", required=True, help="a folder with a tokenizer and its chat template")
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _make(data: Path, count: int, target: Path) -> None:
    """Write `count` rows; from the second time on, a row's first question begins with a number."""
    text = gzip.decompress(data.read_bytes()) if data.suffix == ".gz" else data.read_bytes()
    rows = [json.loads(line) for line in text.splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            again, row = number // len(rows), rows[number % len(rows)]
            prompt = row["prompt"].replace("\n\nHuman: ", f"\n\nHuman: {again}: ", 1) if again else row["prompt"]
            file.write(json.dumps({**row, "prompt": prompt}, ensure_ascii=False) + "\n")


def _in_a_process(rows: Path, tokenizer: str, cache: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--read", "--data", str(rows), "--tokenizer", tokenizer]
    environment = {**os.environ, "QLORA_DPO_CACHE": str(cache)}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    told: dict[str, float] = json.loads(done.stdout)
    return told


def _read(data: Path, tokenizer: str) -> dict[str, float]:
    """Read all pairs in this process; imports and the tokenizer are there before the clock starts."""
    from transformers import AutoTokenizer

    from qlora_dpo.data.encode import load_pairs
    from qlora_dpo.recipe.data import DataTable

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    before, started, cpu = _peak(), time.perf_counter(), time.process_time()
    held = load_pairs(DataTable(train=str(data), eval="./none.jsonl"), "train", loaded, seed=0)
    seconds = time.perf_counter() - started
    return {
        "rows": held.audit.rows,
        "used": held.audit.used,
        "seconds": seconds,
        "cpu": time.process_time() - cpu,
        "before": before,
        "peak": _peak(),
    }


def _peak() -> int:
    """The most memory the process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
