"""Supervised tuning on questions and answers, from the command line to the merged model; DPO that goes on from it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState

from qlora_dpo.adapter import open_adapter
from qlora_dpo.cli import main
from qlora_dpo.data.encode import load_pairs
from qlora_dpo.recipe.train import TrainTable
from qlora_dpo.training.data_order import make_data_order

pytestmark = tiny_run.LIBRARIES_WARN

RECIPE = """
[model]
name = {model}
quantization = "none"
dtype = "fp32"
[lora]
r = 4
[data]
train = "./chats.jsonl"
eval_share = 0.25
[objective]
loss_type = "sft"
[train]
learning_rate = 5e-3
batch_size = 4
num_train_epochs = 3
logging_steps = 1
[samples]
prompts = 2
max_new_tokens = 4
"""


def chat(number: int) -> dict[str, Any]:
    texts = (f"Where is shelf {number}?", "On the left.", "And the lamp?", f"Beside shelf {number}.")
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


@pytest.fixture
def home(empty_folder: Path) -> Path:
    Path("chats.jsonl").write_text("".join(json.dumps(chat(n)) + "\n" for n in range(16)), encoding="utf-8")
    Path("sft.toml").write_text(RECIPE.format(model=json.dumps(tiny_run.source().name)), encoding="utf-8")
    return empty_folder


def run(*words: str) -> int:
    AcceleratorState._reset_state(True)
    return main(list(words))


def test_a_run_its_figures_and_what_follows_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "sft.toml") == 0
    shown = capsys.readouterr()
    assert "Held-out answers: " in shown.out
    assert "perplexity" in shown.out
    assert "token accuracy" in shown.out
    assert "answers used" in shown.err
    results = json.loads(Path("adapters/sft/results.json").read_text(encoding="utf-8"))
    first, last = results["evals"][0], results["evals"][-1]
    assert last["eval_loss"] < first["eval_loss"]
    assert not [name for name in last if "rejected" in name or name in ("eval_ties", "eval_rewards/accuracies")]
    assert results["baselines"] == {}
    card = Path("adapters/sft/README.md").read_text(encoding="utf-8")
    assert "answers of chats.jsonl" in card
    assert "| Epoch | Training Loss | Validation Loss | Perplexity | Token Accuracy | Logps |" in card
    assert "preference pairs" not in card

    assert run("eval", "adapters/sft", "--dtype", "fp32", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["perplexity"]["tuned"] == pytest.approx(last["eval_perplexity"], rel=1e-4)
    assert figures["token_accuracy"] == pytest.approx(last["eval_mean_token_accuracy"])
    assert figures["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)
    assert "accuracy" not in figures
    assert run("eval", "adapters/sft", "--min-accuracy", "0.5") == 2
    assert "one answer each" in capsys.readouterr().err

    assert run("merge", "adapters/sft", "-o", "merged", "--dtype", "fp32") == 0
    assert "not measured: the held-out rows have one answer each" in capsys.readouterr().out
    pair = {"prompt": "Where is it?", "chosen": "On the left.", "rejected": "Who knows."}
    Path("pairs.jsonl").write_text("".join(json.dumps(pair | {"prompt": f"Where is {n}?"}) + "\n" for n in range(20)))
    words = ["reference.kind=adapter", "reference.path=adapters/sft", "objective.loss_type=sigmoid"]
    settings = [word for each in [*words, "data.train=pairs.jsonl"] for word in ("--set", each)]
    assert run("train", "sft.toml", "-o", "adapters/dpo", "--max-steps", "1", *settings) == 0
    dpo = json.loads(Path("adapters/dpo/results.json").read_text(encoding="utf-8"))
    assert dpo["evals"][0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_the_loss_is_the_mean_over_each_answer_by_a_plain_pass(home: Path) -> None:
    assert run("train", "sft.toml", "--max-steps", "1", "--set", "train.learning_rate=1e-9") == 0
    measured = json.loads(Path("adapters/sft/results.json").read_text(encoding="utf-8"))["evals"][0]
    opened = open_adapter(Path("adapters/sft"), "fp32")
    assert opened.recipe is not None
    heldout = load_pairs(opened.recipe.data, "eval", opened.tokenizer, 42, supervised=True)
    losses, total, tokens = [], 0.0, 0
    for pair in heldout.encoded:
        ids = torch.tensor([[*pair.prompt, *pair.chosen]])
        with torch.no_grad():
            logp_LV = opened.model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        answer = logp_LV[len(pair.prompt) - 1 : -1].gather(1, ids[0, len(pair.prompt) :, None])
        losses.append(-float(answer.mean()))
        total, tokens = total + float(answer.sum()), tokens + len(answer)
    assert measured["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measured["eval_perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-5)


def test_answers_of_a_chat_are_in_one_step_and_every_epoch_sees_each_once() -> None:
    order = make_data_order(9, TrainTable(batch_size=3, num_train_epochs=2), chat_starts=(0, 2, 3, 6))
    epochs = [[index for step in range(first, first + 3) for index in order.batch_indices(step)] for first in (1, 4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(9))] * 2
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        for chat_indices in ([0, 1], [3, 4, 5], [6, 7, 8]):
            place = epoch.index(chat_indices[0])
            assert epoch[place : place + len(chat_indices)] == chat_indices


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("objective.loss_type=sigmoid", 'has no column "chosen"'),
        ("train.metric_for_best_model=rewards/margins", "the held-out rows have one answer each"),
    ],
)
def test_what_needs_two_answers_is_refused_before_a_weight_is_read(
    home: Path, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    assert run("train", "sft.toml", "--set", setting) == (1 if setting.startswith("objective") else 2)
    assert said in capsys.readouterr().err
    assert not list(Path("adapters").iterdir())


def test_a_format_of_answers_needs_supervised_tuning(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "sft.toml", "--set", "objective.loss_type=sigmoid", "--set", "data.format=supervised") == 2
    assert 'only loss_type = "sft" trains on, not "sigmoid"' in capsys.readouterr().err


def test_best_by_perplexity_and_check(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "sft.toml", "--set", "data.train_on=last") == 0
    assert "answers used" in capsys.readouterr().out
    words = ["--set", "train.metric_for_best_model=perplexity", "--set", "train.load_best_model_at_end=true"]
    assert run("train", "sft.toml", "--max-steps", "2", *words) == 0
    results = json.loads(Path("adapters/sft/results.json").read_text(encoding="utf-8"))
    lowest = min(results["evals"], key=lambda record: record["eval_perplexity"])
    assert results["best"] == lowest["step"]
