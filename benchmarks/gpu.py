"""The acceptance run on a CUDA card, each sub-command in less than ten minutes; benchmarks/README.md has them all.

    python benchmarks/gpu.py train --as t4 -o gpu.md          # a table is printed and appended to gpu.md
    python benchmarks/gpu.py train --device cpu --tiny        # the same code on a small model, to see that it runs

Models, tokenizer and rows are generated; nothing is read from a network. `--as t4` makes the card like a T4 as far as
that goes: fp16, its kernels, 15 GiB. What has to hold and does not makes the exit code 1; a missed target of speed does
not.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import gpu_card
import torch
from gpu_table import Report

from qlora_dpo.cli.startup.quiet import quiet_libraries

WHAT: dict[str, tuple[str, int, int]] = {
    "train": ("a run, the same stopped and resumed, and its planned memory beside the measured", 16, 512),
    "variants": ("short runs in int8, dense, with DoRA, recomputation and 8-bit AdamW", 16, 512),
    "ceiling": ("a run under less memory than it plans with: rows halve", 16, 512),
    "commands": ("eval, compare, merge, chat and serve with a fresh adapter", 16, 512),
    "speed": ("a step against TRL's, by time and memory", 16, 512),
    "memory": ("the peak of a step whose pairs are all as long as may be", 16, 512),
    "profile": ("what a step's time goes to, how often the host waits, MFU", 128, 512),
    "decode": ("single tokens through fused 4-bit, dequantized and dense weights", 1, 512),
    "kernels": ("cuDNN's attention, sums in fp16 and Triton on and off", 16, 512),
    "several": ("processes with a card each beside one: DDP, FSDP2", 16, 512),
    "all": ("most of it, one after another, which takes more than an hour", 16, 512),
}
"""What each sub-command does, and its pairs a step and longest sequence."""
ALL = (
    ("train", "--as", "t4"),
    ("train", "--as", "card"),
    ("variants", "--as", "t4"),
    ("variants", "--as", "card"),
    ("ceiling",),
    ("commands", "--as", "t4"),
    ("commands", "--as", "card"),
    ("speed", "--as", "t4"),
    ("speed", "--as", "card"),
    ("speed", "--as", "card", "--batch", "4"),
    ("speed", "--as", "card", "--length", "1024"),
    ("speed", "--as", "card", "--shape", "1.5b"),
    ("speed", "--as", "card", "--shape", "7b", "--rounds", "3"),
    ("memory", "--as", "t4"),
    ("profile", "--as", "card"),
    ("profile", "--as", "t4"),
    ("decode",),
    ("kernels",),
    ("several",),
)
"""What `all` runs, one after another, each in a process of its own."""


def main() -> int:
    """Do what is asked for and return the exit code."""
    quiet_libraries()
    asked = _parser().parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --tiny shows that the benchmark runs")
    if asked.device == "cpu" and torch.cuda.is_available():
        raise SystemExit("there is a CUDA device; CUDA_VISIBLE_DEVICES= hides it")
    if asked.what == "all":
        return _all(asked)
    report = Report(asked.output)
    report.begin(gpu_card.words_for_the_machine(asked.commit))
    with ExitStack() as stack:
        models = asked.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models.mkdir(parents=True, exist_ok=True)
        work = stack.enter_context(tempfile.TemporaryDirectory(dir=models, prefix="runs-"))
        _run(asked, report, Path(work).resolve(), models.resolve())
    return report.end()


def _run(asked: argparse.Namespace, report: Report, work: Path, models: Path) -> None:
    # here, so that a wrong word is told at once
    import gpu_commands
    import gpu_profile
    import gpu_questions
    import gpu_runs
    import gpu_speed

    place = gpu_runs.Place(work, models, asked.form, asked.batch)
    shape = "tiny" if asked.tiny else asked.shape
    longest = min(asked.length, 256) if asked.tiny else asked.length
    form, batch, rounds = asked.form, asked.batch, asked.rounds
    match asked.what:
        case "train":
            gpu_runs.train(place, report, shape, longest)
        case "variants":
            gpu_runs.variants(place, report, shape, longest, asked.only or list(gpu_runs.VARIANTS))
        case "ceiling":
            gpu_runs.ceiling(place, report, shape, longest)
        case "commands":
            gpu_commands.commands(place, report, shape, longest)
        case "several":
            gpu_commands.several(place, report, shape, longest, asked.processes)
        case "speed":
            gpu_speed.speed(models, form, report, shape, longest, batch, rounds)
        case "memory":
            gpu_speed.memory(models, form, report, shape, batch)
        case "profile":
            gpu_profile.run(models, form, report, shape, longest, batch, asked.rows or gpu_speed.LONG_ROWS, asked.trace)
        case "decode":
            gpu_questions.decode(models, form, report, shape, 8 if asked.tiny else 64)
        case "kernels":
            gpu_questions.kernels(models, form, report, shape, longest, batch, rounds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (told, batch, length) in WHAT.items():
        each = several.add_parser(name, help=told, description=told)
        each.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
        each.add_argument("--tiny", action="store_true", help="a model of two layers and short rows")
        each.add_argument(
            "--as", dest="form", choices=["card", "t4"], default="card", help="the card as it is, or a T4"
        )
        each.add_argument("--shape", choices=["0.5b", "1.5b", "7b"], default="0.5b", help="Qwen2's shape [0.5b]")
        each.add_argument("--length", type=int, default=length, help=f"longest sequence in tokens [{length}]")
        each.add_argument("--batch", type=int, default=batch, help=f"pairs a step [{batch}]")
        each.add_argument("--rounds", type=int, default=5, help="times that each step is timed [5]")
        each.add_argument("--work", type=Path, metavar="DIR", help="keep the models there for the next command")
        each.add_argument("-o", dest="output", type=Path, metavar="FILE", help="append what is printed to FILE")
        each.add_argument("--commit", help="commit of the code, where there is no git")
        if name == "variants":
            each.add_argument("--only", nargs="+", metavar="NAME", help="these of them alone, as the table names them")
        if name == "several":
            each.add_argument("--processes", type=int, default=2)
        if name == "profile":
            each.add_argument("--rows", type=int, help="tokens of a row [16384]")
            each.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for a browser")
    return parser


def _all(asked: argparse.Namespace) -> int:
    """Run every command in turn, each in a process of its own; the exit code is 1 if one of them failed."""
    given = ["--device", asked.device, *["--tiny"] * asked.tiny]
    for name, value in (("--work", asked.work), ("-o", asked.output), ("--commit", asked.commit)):
        given += [name, str(value)] if value is not None else []
    failed = []
    for words in ALL:
        small = ["--rounds", "1", "--batch", "4"] if asked.tiny else []
        command = [sys.executable, str(Path(__file__).resolve()), *words, *given, *small]
        if subprocess.run(command, check=False).returncode:
            failed.append(" ".join(words))
    print(f"failed: {'; '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
