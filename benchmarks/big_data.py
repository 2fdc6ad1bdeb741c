"""A large data set from its recipe to the first step: seconds, peak memory, and a reference pass that is killed.

    python benchmarks/big_data.py --data full-hh-style.jsonl.gz --model FOLDER [--pairs 160000] [--tiny] [--only start]

The rows of `--data` (columns prompt, chosen, rejected) are repeated until there are enough, and in each turn of each
row one word is another one, so that hardly two turns are the same. `start` runs `qlora-dpo train --max-steps 1` with an
empty cache and with a full one; `memory` does so with a tenth of the pairs; `killed` runs a recipe of two epochs, whose
reference is asked about all pairs beforehand, and ends it by SIGKILL at random moments until the pass is through;
`host` counts what a process does beside the model to lay out rows.
"""

import argparse
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PARTS = ("start", "memory", "killed", "host")
HELD_OUT = 32
RECIPE = """
[model]
name = "{model}"

[data]
train = "{train}"
eval = "{heldout}"
max_length = 512

[train]
num_train_epochs = {epochs}
logging_steps = 1

[samples]
prompts = 1
max_new_tokens = 8
"""


def main() -> None:
    """Make the rows, run the parts that are asked for, print a table of each."""
    asked = _arguments()
    with tempfile.TemporaryDirectory(dir=asked.work) as folder:
        work = Path(folder)
        model = _tiny(asked.model, work / "tiny") if asked.tiny else asked.model.resolve()
        whole = Data(work / "whole", model, asked.pairs)
        whole.make(asked.data)
        if "start" in asked.only:
            _start(whole, ("cold", "warm"))
        if "memory" in asked.only:
            tenth = Data(work / "tenth", model, asked.pairs // 10)
            tenth.make(asked.data)
            _start(tenth, ("cold", "warm"))
        if "killed" in asked.only:
            _killed(whole, asked.seconds, asked.kills)
        if "host" in asked.only:
            _host(whole)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="JSON lines, plain or .gz")
    parser.add_argument("--model", required=True, type=Path, help="a folder with a model and its chat template")
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--tiny", action="store_true", help="a random model of width 64 with the model's tokenizer")
    parser.add_argument("--only", default=",".join(PARTS), type=lambda words: words.split(","), help="of " + str(PARTS))
    parser.add_argument("--seconds", type=float, default=120, help="a part of the killed pass takes up to so long")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder for what is made; it is removed at the end")
    return parser.parse_args()


@dataclass(frozen=True)
class Data:
    """Rows, recipes and a cache of their own in a folder."""

    folder: Path
    model: Path
    pairs: int

    def make(self, data: Path) -> None:
        """Write rows and recipes."""
        self.folder.mkdir()
        text = gzip.decompress(data.read_bytes()) if data.suffix == ".gz" else data.read_bytes()
        rows = [json.loads(line) for line in text.splitlines()]
        for name, count, seed in (("train", self.pairs, 0), ("heldout", HELD_OUT, 1)):
            _write(rows, count, random.Random(seed), self.folder / f"{name}.jsonl")
        for epochs in (1, 2):
            names = {name: self.folder / f"{name}.jsonl" for name in ("train", "heldout")}
            recipe = RECIPE.format(model=self.model, epochs=epochs, **names)
            (self.folder / f"epochs-{epochs}.toml").write_text(recipe)
        size = (self.folder / "train.jsonl").stat().st_size
        print(f"\n{self.pairs:,} rows, {size / 1e6:,.0f} MB", flush=True)

    def train(self, epochs: int, *options: str) -> "subprocess.Popen[str]":
        """Start `qlora-dpo train` on the recipe."""
        recipe, output = self.folder / f"epochs-{epochs}.toml", self.folder / f"run-{time.monotonic_ns()}"
        return subprocess.Popen(
            [sys.executable, "-m", "qlora_dpo", "train", str(recipe), "-o", str(output), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "QLORA_DPO_CACHE": str(self.folder / "cache")},
        )


WORD = re.compile(r"\b[a-z]{4,9}\b")


def _write(rows: list[dict[str, str]], count: int, draw: random.Random, target: Path) -> None:
    """Write `count` rows; in each turn of each, one word of four to nine letters is another row's."""
    words = sorted({word for row in rows for word in WORD.findall(row["prompt"])})

    def perturbed(turn: str) -> str:
        places = list(WORD.finditer(turn))
        if not places:
            return f"{turn} {draw.choice(words)} {draw.choice(words)}"
        place = draw.choice(places)
        return f"{turn[: place.start()]}{draw.choice(words)} {draw.choice(words)}{turn[place.end() :]}"

    with target.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            # every second part is a speaker, "\n\nHuman:" or "\n\nAssistant:"
            parts = re.split(r"(\n\n(?:Human|Assistant):)", row["prompt"])
            prompt = "".join(perturbed(part) if part.strip() and n % 2 == 0 else part for n, part in enumerate(parts))
            made = {"prompt": prompt, "chosen": perturbed(row["chosen"]), "rejected": perturbed(row["rejected"])}
            file.write(json.dumps(made, ensure_ascii=False) + "\n")


def _start(data: Data, names: tuple[str, ...]) -> None:
    """From the command to the first step, once with each name; the first time with an empty cache."""
    print("| pairs | cache | read, s | step 0, s | step 1, s | CPU s by step 1 | longest silence, s | peak, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        seconds, silence, peak = _until_the_first_step(data.train(1, "--max-steps", "1"))
        told = " | ".join(f"{seconds[line]:.1f}" for line in ("read", "step 0", "step 1", "CPU"))
        print(f"| {data.pairs:,} | {name} | {told} | {silence:.1f} | {peak / 2**20:,.0f} |", flush=True)


def _until_the_first_step(run: "subprocess.Popen[str]") -> tuple[dict[str, float], float, int]:
    """Seconds from now until some lines were told, the longest time without a line, and the peak memory in bytes."""
    began = last = time.monotonic()
    seconds, silence, told = dict[str, float](), 0.0, list[str]()
    for line in run.stderr or ():
        now = time.monotonic()
        told.append(line)
        if "step 1" not in seconds:
            silence, last = max(silence, now - last), now
        for start, name in (("layout:", "read"), ("step 0/", "step 0"), ("step 1/", "step 1")):
            if line.startswith(start):
                seconds.setdefault(name, now - began)
        if "step 1" in seconds and "CPU" not in seconds:
            used = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            seconds["CPU"] = sum(map(int, used)) / os.sysconf("SC_CLK_TCK")
    _, status, usage = os.wait4(run.pid, 0)
    run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode != 0:
        raise SystemExit("".join(told[-5:]))
    return seconds, silence, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _killed(data: Data, seconds: float, kills: int) -> None:
    """Kill the reference pass at random moments, let it end, and count its answers and those that are there twice."""
    print("| part | ended by | s | pairs known | answers written | of them twice | peak, MiB |")
    print("|---|---|---|---|---|---|---|")
    draw = random.Random(0)
    for part in range(1, kills + 2):
        run, began = data.train(2, "--max-steps", str(-(-data.pairs // 16) + 1)), time.monotonic()
        limit = draw.uniform(0.2, 1) * seconds if part <= kills else float("inf")
        ended = _ends(run, limit)
        _, _, usage = os.wait4(run.pid, 0)
        known, written = _answers(data.folder / "cache" / "reference")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(
            f"| {part} | {ended} | {time.monotonic() - began:.0f} | {known:,} | {written:,} | {written - known:,} "
            f"| {peak / 2**20:,.0f} |",
            flush=True,
        )


def _ends(run: "subprocess.Popen[str]", limit: float) -> str:
    """Kill `run` `limit` seconds after its reference pass has begun, or when its first step is logged; says which."""
    began, end = time.monotonic(), float("inf")
    os.set_blocking(run.stderr.fileno(), False)  # type: ignore[union-attr]
    text = ""
    while time.monotonic() < end:
        with suppress(BlockingIOError):
            text += os.read(run.stderr.fileno(), 2**16).decode(errors="replace")  # type: ignore[union-attr]
        if "memory:" in text and end == float("inf"):
            end = time.monotonic() + limit
        if "\nstep 1/" in text:
            run.kill()
            return f"its first step, {time.monotonic() - began:.0f} s after the command"
        if run.poll() is not None:
            raise SystemExit(text[-2000:])
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    return f"SIGKILL {limit:.1f} s after loading"


def _host(data: Data) -> None:
    """CPU seconds to take pairs from the cache and lay them out as packed rows, as each step does."""
    from transformers import AutoTokenizer

    from qlora_dpo.data.encode import load_pairs
    from qlora_dpo.preference.pack import Packing, collate, micro_batches
    from qlora_dpo.recipe.data import DataTable
    from qlora_dpo.recipe.train import TrainTable
    from qlora_dpo.training.data_order import make_data_order

    os.environ["QLORA_DPO_CACHE"] = str(data.folder / "cache")
    table = DataTable(train=str(data.folder / "train.jsonl"), eval="./none.jsonl", max_length=512)
    pairs = load_pairs(table, "train", AutoTokenizer.from_pretrained(data.model), 42).encoded
    plan, packing = make_data_order(len(pairs), TrainTable()), Packing(2048, 0, "spans")
    plan.batch_indices(1)
    began, count, positions = time.process_time(), 0, 0
    for step in range(1, 201):
        some = [pairs[index] for index in plan.batch_indices(step)]
        for group in micro_batches(some, packing):
            batch = collate([some[place] for place in group], packing)
            count, positions = count + batch.pairs, positions + batch.input_ids_BL.numel()
    seconds = time.process_time() - began
    print("| pairs | positions a pair | CPU ms a pair |\n|---|---|---|")
    print(f"| {count:,} | {positions / count:.0f} | {1000 * seconds / count:.2f} |", flush=True)


def _answers(folder: Path) -> tuple[int, int]:
    """How many pairs are known to the stores below `folder`, and how many answers were written for them."""
    from safetensors.numpy import load_file

    from qlora_dpo.preference.logp_journal import JOURNAL_SUFFIX, decode_records

    known, written = set[bytes](), 0
    for file in folder.glob("*/*"):
        if file.suffix == JOURNAL_SUFFIX:
            found = [digest.ljust(32, b"\0") for digest in decode_records(file.read_bytes()).digest_P.tolist()]
        else:
            found = [digest.tobytes() for digest in load_file(file)["digest"]]
        known |= set(found)
        written += len(found)
    return len(known), written


def _tiny(model: Path, target: Path) -> Path:
    """A random Llama of width 64 with the tokenizer of `model`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    words.save_pretrained(target)
    return target


if __name__ == "__main__":
    main()
