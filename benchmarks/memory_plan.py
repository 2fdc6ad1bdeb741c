"""What the plan says that training takes, against what it took: runs of two steps, each in a process of its own.

    python benchmarks/memory_plan.py --data FILE --short FILE MODEL...   # prints a table; it stands in README.md
    python benchmarks/memory_plan.py --data FILE --short FILE --gpu t4 a10 MODEL...   # plans for cards, runs nothing

Each MODEL is a model folder, for a card without weights if need be. FILE holds dialogues long enough to be cut to every
`data.max_length`; each optimizer step is one of them, in a row of its own. --short holds a few short ones, to be held
out, as every real data set has them: a run is proved on its shortest pairs. Linux only: the peak is that of the
process's resident bytes, mapped files included.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MIB = 2**20
STEP = ("activations", "backward pass", "DoRA", "the output head", "output head", "fragmentation")
"""How the parts of a plan begin that a step takes."""
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
    parser.add_argument("--gpu", nargs="+", default=[], metavar="CARD", help="plan for these cards as hh.toml trains")
    asked = parser.parse_args()
    if asked.gpu:
        _for_cards(asked)
        return
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


def _for_cards(asked: argparse.Namespace) -> None:
    """Print what `check` plans with rows, recomputed layers and dense weights as memory allows, 16 pairs a step."""
    print(
        "| model | card | max_length | row, tokens | recomputed | kept dense, GiB | weights, GiB | a step, GiB "
        "| plan, GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model, card, length in itertools.product(asked.models, asked.gpu, sorted(asked.lengths)):
        text = RECIPE.format(
            model=model.resolve(),
            quantization="nf4",
            data=asked.data.resolve(),
            short=asked.short.resolve(),
            length=length,
            checkpointing='"auto"',
        ).replace("batch_size = 1", "batch_size = 16")
        text = text.replace(f"micro_batch_tokens = {length}", 'micro_batch_tokens = "auto"').replace("= 2\n", "= 64\n")
        with tempfile.TemporaryDirectory() as work:
            Path(work, "r.toml").write_text(text, encoding="utf-8")
            found = json.loads(_run(work, "check", "r.toml", "--gpu", card, "--json").stdout)["memory"]
        parts = found["parts"]
        dense = sum(size for part, size in parts.items() if part.startswith("linear layers in"))
        step = sum(size for part, size in parts.items() if part.startswith(STEP))
        weights = sum(size for part, size in parts.items() if part.startswith(("4-bit", "embeddings")))
        shown = " | ".join(f"{size / 2**30:.2f}" for size in (dense, weights, step, found["needed_bytes"]))
        row, recomputed = found["row_tokens"], f"{found['recomputed_layers']} of {found['layers']}"
        print(f"| {model.name} | {card} | {length:,} | {row:,} | {recomputed} | {shown} |", flush=True)


def _run(work: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "qlora_dpo", *words]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return done


if __name__ == "__main__":
    main()
