"""What `check --forecast` says of sets of pairs, and what training on them then does.

    python benchmarks/pair_forecast.py MODEL DATA OTHER_MODEL WORK OWN   # DATA holds hh/ and ultrafeedback/

For each set, in WORK: the forecast of 120 training pairs by MODEL, a run over them, its held-out results, and the
forecast of the same pairs by the trained adapter. The sets are HH, UltraFeedback, the house rules as written and, from
OWN, as recipes/on-policy.toml has them made, and three that are spoilt: HH with shuffled labels, with all rejected
answers by OTHER_MODEL, and with rejected answers that differ from the chosen ones in a word. A set whose result stands
in WORK is not measured again.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).parents[1]
RULES = HERE / "recipes" / "house_rules"
TRAIN, HELD_OUT = 120, 120
PROMPTS = 340
"""Prompts that the other model is asked."""
TURN, SHORT = "\n\nAssistant:", " (Answer in one short sentence.)"

Row = dict[str, Any]


def main() -> None:
    """Make the sets, measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("other_model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("own", type=Path)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--sets", nargs="*", help="only these")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    sets: dict[str, Callable[[], list[Row]]] = {
        "hh": lambda: hh_rows(asked.data),
        "ultrafeedback": lambda: ultrafeedback_rows(asked.data),
        "rules-written": lambda: read_rows(RULES / "train.jsonl"),
        "rules-own": lambda: read_rows(asked.own),
        "hh-shuffled": lambda: shuffled(hh_rows(asked.data)),
        "hh-other-model": lambda: other_model_rows(asked.data, asked.other_model, asked.work),
        "hh-equal": lambda: nearly_equal(hh_rows(asked.data)),
    }
    for name in asked.sets or sets:
        if not (asked.work / f"{name}.json").exists():
            measure(name, sets[name](), asked.model, asked.work, asked.learning_rate)
    print(f"{asked.model.name}, float32, learning rate {asked.learning_rate:g}, {TRAIN} pairs; torch", end=" ")
    print(f"{torch.__version__}, transformers {transformers.__version__}")
    for name in sets:
        if (asked.work / f"{name}.json").exists():
            print("\n".join(table_rows(name, json.loads((asked.work / f"{name}.json").read_text()))))


def hh_rows(data: Path) -> list[Row]:
    """HH's rows, in an order of their own."""
    with gzip.open(data / "hh" / "full-hh-style.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    return rows


def ultrafeedback_rows(data: Path) -> list[Row]:
    """UltraFeedback's training rows."""
    with gzip.open(data / "ultrafeedback" / "messages-train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def other_model_rows(data: Path, other: Path, work: Path) -> list[Row]:
    """HH's chosen answers, each with a short answer of another model as the rejected one."""
    prompts, own = work / "hh-prompts.jsonl", work / "hh-other-model.jsonl"
    if not own.exists():
        rows = [row for row in hh_rows(data) if len(row["prompt"]) < 400][:PROMPTS]
        asked = [row | {"prompt": row["prompt"].removesuffix(TURN) + SHORT + TURN} for row in rows]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        run(
            *("pairs", str(prompts), "--model", str(other), "--chosen", "chosen", "--max-new-tokens", "80"),
            *("--dtype", "fp32", "-o", str(own)),
        )
    rows = read_rows(own)
    for row in rows:
        row["prompt"][-1]["content"] = row["prompt"][-1]["content"].removesuffix(SHORT)
    return rows


def shuffled(rows: list[Row]) -> list[Row]:
    """Every second row, by a coin, with its answers exchanged."""
    coin = random.Random(1)
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if coin.random() < 0.5 else row for row in rows
    ]


def nearly_equal(rows: list[Row]) -> list[Row]:
    """The chosen answer on both sides, the rejected one without its third word."""

    def without_a_word(text: str) -> str:
        words = text.split(" ")
        return " ".join(words[:3] + words[4:])

    long_enough = [row for row in rows if len(row["chosen"].split(" ")) > 12]
    return [row | {"rejected": without_a_word(row["chosen"])} for row in long_enough]


def measure(name: str, rows: list[Row], model: Path, work: Path, rate: float) -> None:
    """Forecast, train, forecast again; all of it is kept in WORK/NAME.json."""
    file, recipe = work / f"{name}-rows.jsonl", work / f"{name}.toml"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe.write_text(
        f'[model]\nname = "{model}"\nquantization = "none"\ndtype = "fp32"\n'
        f'[data]\ntrain = "{file}"\neval_share = 0.4\nmax_length = 256\nmax_train_samples = {TRAIN}\n'
        f"max_eval_samples = {HELD_OUT}\nmax_bad_share = 0.5\n"
        f"[train]\nlearning_rate = {rate:g}\nwarmup_steps = 2\nbatch_size = 8\nlogging_steps = 5\n"
        "[samples]\nprompts = 0\n"
    )
    before = json.loads(run("check", str(recipe), "--forecast", "--json"))
    folder = work / f"{name}-run"
    run("train", str(recipe), "-o", str(folder), *(["--resume"] if folder.exists() else []))
    after = json.loads(run("data", "lint", str(recipe), "--model", str(folder), "--json"))
    results = json.loads((folder / "results.json").read_text())
    record = {"before": before["forecast"], "after": after["forecast"], "evals": results["evals"]}
    (work / f"{name}.json").write_text(json.dumps(record))


def run(*arguments: str) -> str:
    """Run a command of qlora-dpo; raises CalledProcessError if it fails."""
    print("qlora-dpo", *arguments, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "qlora_dpo", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def table_rows(name: str, record: dict[str, Any]) -> Iterator[str]:
    """The forecast before and after training, and what the run did, a line each."""
    for when in ("before", "after"):
        each = record[when]
        right, length, likely = each["ranked_right"], each["auc_length"], each["auc_likelihood"]
        yield (
            f"| {name} | {when} | {each['own']['nats_per_token']:.2f} | {each['chosen_nats']:.2f} | "
            f"{each['rejected_nats']:.2f} | {right[0]:.2f} ({right[1]:.2f}-{right[2]:.2f}) | "
            f"{length['value']:.2f} ({length['low']:.2f}-{length['high']:.2f}) | "
            f"{likely['value']:.2f} ({likely['low']:.2f}-{likely['high']:.2f}) | {each['nearly_impossible']:.2f} | "
            f"{each['alike']:.2f} | {each['separable'][0]:.2f} |"
        )
    first, last = record["evals"][0], record["evals"][-1]
    gain = last["eval_logps/chosen_per_token"] - first["eval_logps/chosen_per_token"]
    yield (
        f"| {name} | training | held-out loss {last['eval_loss']:.3f} +- {1.96 * last['eval_loss_stderr']:.3f} | "
        f"accuracy {last['eval_rewards/accuracies']:.3f} of {last['eval_pairs']} | margin "
        f"{last['eval_rewards/margins']:+.2f} | chosen {gain:+.3f} nats a token | KL {last['eval_kl']:.3f} | "
        f"vanishing {last.get('eval_vanishing', 0.0):.2f} | train loss {last.get('eval_train_loss', 0.0):.3f} |"
    )


if __name__ == "__main__":
    main()
