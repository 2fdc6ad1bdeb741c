"""A forecast judges the pairs that a run would train on, by the model that it would start from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import saved_adapters
import torch
from tiny_run import LIBRARIES_WARN
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_dpo.cli import main, run_hooks
from qlora_dpo.errors import ModelError
from qlora_dpo.model.device import select_device
from qlora_dpo.on_policy import forecast

pytestmark = LIBRARIES_WARN

RECIPE = """
[model]
name = "./base"
quantization = "none"
dtype = "fp32"
[data]
train = "./pairs.jsonl"
eval_share = 0.3
[train]
batch_size = 4
max_steps = 2
learning_rate = 1e-2
[samples]
prompts = 0
"""
CHECK = ["check", "tiny.toml", "--json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter of it, pairs, and a recipe."""
    home = tmp_path_factory.mktemp("forecast")
    base = saved_adapters.save_base(home / "base", dtype=torch.float32)
    GenerationConfig(eos_token_id=list(range(300, 310))).save_pretrained(home / "base")
    saved_adapters.save_adapter(home / "other", base, "none", size=0.6)
    saved_adapters.save_pairs(home / "pairs.jsonl", 24)
    (home / "tiny.toml").write_text(RECIPE)
    return home


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(list(arguments)) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def test_check_gives_the_figures_of_plain_transformers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = said(capsys, *CHECK, "--forecast")["forecast"]
    used = said(capsys, *CHECK)["data"]["train"]["used"]
    assert checked["chosen"] == checked["rejected"] == used >= 10
    model = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    lint = said(capsys, "data", "lint", "pairs.jsonl", "--model", "base", "--json")["forecast"]
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    assert lint["chosen"] == len(rows)
    logps, tokens, right, states = {"chosen": 0.0, "rejected": 0.0}, {"chosen": 0, "rejected": 0}, 0, 0
    for row in rows:
        sums = {}
        for side in logps:
            user, answer = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}
            prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template([user, answer], return_dict=False)
            end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)  # a newline after the end is not scored
            with torch.no_grad():
                logits = model(torch.tensor([whole[:end]])).logits[0].double().log_softmax(-1)
            scored = range(len(prompt), end)
            sums[side] = sum(float(logits[place - 1, whole[place]]) for place in scored)
            tokens[side] += len(scored)
            logps[side] += sums[side]
        right += sums["chosen"] > sums["rejected"]
        states += 1
    assert lint["ranked_right"][0] == right / states
    bound = 1e-5 if select_device("auto").compute_dtype == "fp32" else 1e-3
    for side in logps:
        assert lint[f"{side}_nats"] == pytest.approx(-logps[side] / tokens[side], rel=bound)
    assert 0 < lint["own"]["nats_per_token"] < lint["chosen_nats"]
    assert lint["own"]["answers"] == 20
    assert lint["separable"][0] > 0.5


def test_an_adapter_is_asked_with_its_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lint = ("data", "lint", "pairs.jsonl", "--json")
    base, other = (said(capsys, *lint, "--model", model)["forecast"] for model in ("base", "other"))
    assert base["chosen_nats"] != pytest.approx(other["chosen_nats"], rel=1e-2)
    without = said(capsys, *lint, "--model", "base", "--no-forecast")
    assert without["forecast"] is None
    assert without["tokens"]


def test_a_run_says_it_before_its_first_step_and_trains_the_same(
    place: Path, own_cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--set", "samples.prompts=1", "--set", "samples.max_new_tokens=2")
    assert main(["train", "tiny.toml", "-o", "with", *options]) == 0
    lines = capsys.readouterr().err.splitlines()
    told = next(number for number, line in enumerate(lines) if line.startswith("pairs: nats a token: "))
    assert "of the model's own" in lines[told]
    assert told < next(number for number, line in enumerate(lines) if line.startswith("step 0/"))
    monkeypatch.setattr(forecast, "own_answers", None)  # those of the first run are used again
    assert main(["train", "tiny.toml", "-o", "again", *options]) == 0
    again = next(line for line in capsys.readouterr().err.splitlines() if "nats a token" in line)
    assert again.rpartition(", ")[2] == lines[told].rpartition(", ")[2]
    assert main(["train", "tiny.toml", "-o", "silent"]) == 0
    assert again.rpartition(", ")[0] in capsys.readouterr().err.splitlines()

    def fails(*some: object) -> None:
        raise ModelError("its template fails")

    monkeypatch.setattr(forecast, "_read_own_answers", fails)
    assert main(["train", "tiny.toml", "-o", "failed", *options]) == 0
    assert "pairs: not judged, since its template fails" in capsys.readouterr().err.splitlines()
    monkeypatch.setattr(run_hooks, "forecast_run", lambda *some: None)
    assert main(["train", "tiny.toml", "-o", "without", *options]) == 0
    assert "nats a token" not in capsys.readouterr().err
    adapters = [(place / run / "adapter_model.safetensors").read_bytes() for run in ("with", "without")]
    assert adapters[0] == adapters[1]


def test_a_sentence_says_where_a_forecast_cannot_be_made(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (
            ["check", "tiny.toml", "--forecast", "--gpu", "t4"],
            "--forecast loads the model on this machine; leave --gpu out",
        ),
        (["check", "--forecast"], "--forecast needs a RECIPE"),
        (["data", "lint", "pairs.jsonl", "--no-forecast"], "--no-forecast goes with --model; leave it out"),
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith(f"qlora-dpo: {sentence}; see ")
