"""`samples.at_evaluations`: held-out prompts answered on the way; they change no step, and none is there twice."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from saved_adapters import save_base, save_pairs
from stopping_tracker import tracker_that_stops

from qlora_dpo.cli import main
from qlora_dpo.errors import Interrupted
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.recipe import Recipe
from qlora_dpo.talk.generate import generate_greedy
from qlora_dpo.tracking import run_log as tracking
from qlora_dpo.tracking.run_log import EVALUATION_SAMPLES, RunLog
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.loop import train_loop

pytestmark = [tiny_run.LIBRARIES_WARN, pytest.mark.filterwarnings("ignore::UserWarning")]

ASKED = {"role": "user", "content": "How do I find the library?"}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / EVALUATION_SAMPLES).read_text(encoding="utf-8").splitlines()]


def ask(model: Any) -> Sequence[dict[str, Any]]:
    (told,) = generate_greedy(model, load_tokenizer(tiny_run.source()), [[ASKED]], 6)
    return [{"row": 1, "prompt": [ASKED], "answer": told.text, "tokens": told.tokens, "ended": told.ended}]


def trained(what: Recipe, folder: Path, asks: bool, resume: Path | None = None, stop_at: int = 0) -> Any:
    AcceleratorState._reset_state(True)
    folder.mkdir(exist_ok=True)
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder)
    if asks:
        job = replace(job, sample_fn=ask)
    with tracker_that_stops(folder, job.data_order.total_steps, stop_at) as tracker:
        train_loop(model, job, tiny_run.start(job), tracker, resume)
    return tiny_run.adapter(model)


def test_answers_change_no_step_and_a_resumed_run_has_each_once(tmp_path: Path) -> None:
    what = tiny_run.recipe("nf4", lora={"lora_dropout": 0.2}, train={"num_train_epochs": 2, "eval_steps": 2})
    without = trained(what, tmp_path / "without", asks=False)
    asked = trained(what, tmp_path / "with", asks=True)
    assert all(torch.equal(asked[name], without[name]) for name in without)
    assert [line["step"] for line in lines_of(tmp_path / "with")] == [0, 2, 4, 6]
    assert not (tmp_path / "without" / EVALUATION_SAMPLES).exists()

    with pytest.raises(Interrupted):
        trained(what, tmp_path / "part", asks=True, stop_at=4)
    checkpoint = newest_valid(tmp_path / "part")[0]
    tracking.truncate_metrics(
        tmp_path / "part" / EVALUATION_SAMPLES, int(checkpoint.name.removeprefix("step-"))
    )  # as `follow` does
    resumed = trained(what, tmp_path / "part", asks=True, resume=checkpoint)
    assert all(torch.equal(resumed[name], without[name]) for name in without)
    assert lines_of(tmp_path / "part") == lines_of(tmp_path / "with")


def test_they_are_shown_in_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 48) as run:
        run.log_samples(
            20, [{"row": 7, "prompt": [ASKED], "answer": "On\n\nthe \x1b[31mleft, " + "a" * 200, "tokens": 9}]
        )
        run.log_samples(40, [{"row": 7, "prompt": [ASKED], "answer": "", "tokens": 0}])
    assert capsys.readouterr().err.splitlines() == [
        f"step 20/48  How do I find the library? -> On the left, {'a' * 87}...",
        "step 40/48  How do I find the library? -> (nothing)",
    ]
    assert [line["step"] for line in lines_of(tmp_path)] == [20, 40]


def test_the_first_answers_are_the_bases_and_the_last_those_of_the_end(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_pairs(tmp_path / "train.jsonl", 8)
    save_pairs(tmp_path / "heldout.jsonl", 4)
    (tmp_path / "r.toml").write_text(
        '[model]\nname = "./base"\ndtype = "fp32"\n[data]\ntrain = "./train.jsonl"\neval = "./heldout.jsonl"\n'
        "[train]\nbatch_size = 4\nlearning_rate = 0.05\neval_steps = 1\n"
        "[samples]\nprompts = 3\nat_evaluations = 2\nmax_new_tokens = 8\n"
    )
    AcceleratorState._reset_state(True)
    assert main(["train", str(tmp_path / "r.toml"), "-o", str(tmp_path / "run")]) == 0
    during = lines_of(tmp_path / "run")
    assert [(line["step"], line["row"]) for line in during] == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    end = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in during[:2]] == [each["base"] for each in end[:2]]
    assert [line["answer"] for line in during[4:]] == [each["tuned"] for each in end[:2]]
    assert during[0]["prompt"] == end[0]["prompt"]
    assert end[0]["base"] != end[0]["tuned"]
