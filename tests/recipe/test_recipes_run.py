"""Every shipped recipe runs: two steps on the tiny model, on rows of the shape it is for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_sandbox
import pytest
import tiny_run
from accelerate.state import AcceleratorState

from qlora_dpo.cli import main
from qlora_dpo.recipe import load_recipe
from qlora_dpo.recipe.reference import AdapterReference
from qlora_dpo.recipe.shipped import shipped_recipes

pytestmark = tiny_run.LIBRARIES_WARN

Row = dict[str, Any]


def user(row: Row) -> Row:
    return {"role": "user", "content": row["prompt"].removesuffix("\n\nAssistant:").rpartition("Human: ")[2]}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text.strip()}


def plain(row: Row) -> Row:
    return {"prompt": user(row)["content"], "chosen": row["chosen"], "rejected": row["rejected"]}


def chats(row: Row) -> Row:
    """As HuggingFaceH4/ultrafeedback_binarized has them."""
    return {
        "prompt": user(row)["content"],
        "chosen": [user(row), assistant(row["chosen"])],
        "rejected": [user(row), assistant(row["rejected"])],
        "score_chosen": 8.0,
        "score_rejected": 5.0,
    }


def labelled(row: Row) -> Row:
    """As trl-lib/kto-mix-14k has them."""
    good = len(row["chosen"]) % 2 == 0
    answer = row["chosen"] if good else row["rejected"]
    return {"prompt": [user(row)], "completion": [assistant(answer)], "label": good}


def house_rules(row: Row) -> Row:
    return {
        "prompt": [user(row)],
        "chosen": [assistant(row["chosen"])],
        "rejected": [assistant(row["rejected"])],
        "kind": "everyday",
    }


def messages(row: Row) -> Row:
    return {"messages": [user(row), assistant(row["chosen"])]}


def hh(row: Row) -> Row:
    return row


SHAPES: dict[str, Callable[[Row], Row]] = {
    "Dahoas/full-hh-rlhf": hh,
    "HuggingFaceH4/ultrafeedback_binarized": chats,
    "trl-lib/kto-mix-14k": labelled,
    "train.jsonl": house_rules,
    "own.jsonl": house_rules,
    "my-pairs.jsonl": plain,
    "my-chats.jsonl": messages,
}
FIRST_LOSS = {"sigmoid": 0.693147, "ipo": 2500.0, "kto": 0.5}


ONE_SOURCE = [name for name in shipped_recipes() if name != "multi-dataset"]
"""The recipe of a mixture runs in data/test_mixture.py."""


@pytest.mark.parametrize("name", ONE_SOURCE)
def test_a_shipped_recipe_runs_two_steps(name: str, empty_folder: Path) -> None:
    before = load_recipe(str(shipped_recipes()[name])).recipe
    named = before.data.train_description
    shape = SHAPES[Path(named).name if named.startswith("/") else named]
    for file, rows in (("train.jsonl", cli_sandbox.rows(12)), ("held.jsonl", cli_sandbox.rows(4, 12))):
        Path(file).write_text("".join(json.dumps(shape(row)) + "\n" for row in rows), encoding="utf-8")
    base = ["--model", tiny_run.source().name, "--data", "train.jsonl"]
    assert main(["init", "r.toml", "--template", name, *base]) == 0
    settings = ["data.eval=held.jsonl", "train.batch_size=4", "samples.prompts=1", "samples.max_new_tokens=2"]
    settings += ["reference.path=adapters/started"] if isinstance(before.reference, AdapterReference) else []
    options = ["--max-steps", "2", *(word for each in settings for word in ("--set", each))]
    if isinstance(before.reference, AdapterReference):  # what it goes on from
        assert main(["init", "s.toml", "--template", "hh-sft", *base]) == 0
        first = [word for each in settings[:-1] for word in ("--set", each)]
        assert main(["train", "s.toml", "--max-steps", "1", "-o", "adapters/started", *first]) == 0
        AcceleratorState._reset_state(True)
    assert main(["train", "r.toml", *options]) == 0
    results = json.loads(Path("adapters/r/results.json").read_text(encoding="utf-8"))
    assert [each["step"] for each in results["evals"]] == [0, 2]
    first = results["evals"][0]
    assert results["pairs"] == {"train": 12, "eval": 4}
    assert ("eval_rewards/accuracies" in first) == (shape is not messages)
    if before.objective.loss_type in FIRST_LOSS:
        assert first["eval_preference_loss"] == pytest.approx(FIRST_LOSS[before.objective.loss_type], abs=1e-3)


def test_supervised_tuning_says_nothing_of_rejected_answers_until_they_are_evaluated(empty_folder: Path) -> None:
    test_a_shipped_recipe_runs_two_steps("hh-sft", empty_folder)
    lines = [json.loads(line) for line in Path("adapters/r/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sorted(name for name in line if "rejected" in name) for line in lines if line["kind"] == "train"] == [
        [],
        [],
    ]
    assert all(line["rewards/chosen"] == -line["loss"] for line in lines if line["kind"] == "train")
