"""What the plan says that training takes, against what it took: runs of two steps, each in a process of its own.

    python benchmarks/memory_plan.py --data FILE --short FILE MODEL...   # prints a table; it stands in README.md

Each MODEL is a model folder. FILE holds dialogues long enough to be cut to every `data.max_length`; each optimizer
step is one of them, in a row of its own. --short holds a few short ones, to be held out, as every real data set has
them: a run is proved on its shortest pairs. Linux only: the peak is that of the process's resident bytes, mapped files
included.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20
RECIPE = """
[model]
name = "{model}"
quantization = "{quantization}"
[data]
train = "{data}"
eval = "{short}"
max_length = {length}
overlong = "cut_prompt"
max_train_samples = 2
max_eval_samples = 8
[train]
batch_size = 1
micro_batch_tokens = {length}
gradient_checkpointing = {checkpointing}
[samples]
prompts = 0
"""


def main() -> None:
    """Run every combination and print a row for each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--short", required=True, type=Path)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--planned-only", action="store_true", help="plan, and leave the runs out")
    asked = parser.parse_args()
    print("| model | weights | recomputed | max_length | row, tokens | plan, MiB | measured, MiB | plan / measured |")
    print("|---|---|---|---|---|---|---|---|")
    ways = itertools.product(asked.models, ("nf4", "none"), ("false", "true"), sorted(asked.lengths))
    for model, quantization, checkpointing, length in ways:
        text = RECIPE.format(
            model=model.resolve(),
            quantization=quantization,
            data=asked.data.resolve(),
            short=asked.short.resolve(),
            length=length,
            checkpointing=checkpointing,
        )
        with tempfile.TemporaryDirectory() as work:
            Path(work, "r.toml").write_text(text, encoding="utf-8")
            found = json.loads(_run(work, "check", "r.toml", "--json").stdout)["memory"]
            peak = 0
            if not asked.planned_only:
                _run(work, "train", "r.toml", "-o", "run")
                peak = json.loads(Path(work, "run", "run.json").read_text(encoding="utf-8"))["peak_bytes"]
        plan, what = found["peak_bytes"], "all layers" if checkpointing == "true" else "nothing"
        print(
            f"| {model.name} | {quantization} | {what} | {length:,} | {found['row_tokens']:,} | {plan / MIB:,.0f} | "
            f"{peak / MIB:,.0f} | {plan / peak if peak else 0:.2f} |",
            flush=True,
        )


def _run(work: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "qlora_dpo", *words]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return done


if __name__ == "__main__":
    main()
