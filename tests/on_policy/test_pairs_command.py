"""`pairs` makes pairs of a model's own answers, loses none of them however it ends, and what it writes trains."""

import itertools
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import commands_in_process
import pytest
import saved_adapters
from cli_sandbox import rows
from fork_server import ForkedPython
from tiny_run import LIBRARIES_WARN
from transformers import GenerationConfig

from qlora_dpo.cli import main

pytestmark = LIBRARIES_WARN

RECIPE = """
[model]
name = "./base"
quantization = "none"
dtype = "fp32"
[data]
train = "./own.jsonl"
eval_share = 0.2
max_bad_share = 0.5  # a random model begins answers with what merges with the prompt
[train]
batch_size = 2
max_steps = 2
[samples]
prompts = 0
"""
RULE = """
def score(messages, text):
    assert messages[-1]["role"] == "user"
    return sum(map(ord, text)) % 97

def fails(messages, text):
    return 1 / 0

def no_number(messages, text):
    return "good"

def some(messages, text):
    return None if len(text) % 2 else len(text)
"""
QUESTIONS = [f"How do I find the {place}?" for place in ("library", "market", "station", "harbour", "museum", "park")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, whose answers soon end, two adapters of it, prompts and rules."""
    home = tmp_path_factory.mktemp("pairs")
    base = saved_adapters.save_base(home / "base")
    GenerationConfig(eos_token_id=list(range(300, 340))).save_pretrained(home / "base")
    saved_adapters.save_adapter(home / "one", base, "none", size=0.6)
    saved_adapters.save_adapter(home / "two", base, "none", size=0.2)
    (home / "asks.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    (home / "rules.py").write_text(RULE)
    (home / "tiny.toml").write_text(RECIPE)
    (home / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    return home


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


SHORT = ("--max-new-tokens", "24", "--dtype", "fp32")


def pairs(*arguments: str) -> int:
    return main(["pairs", *arguments, *SHORT])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_best_answer_is_chosen_and_what_is_left_out_is_counted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pairs("asks.txt", "--model", "one", "--rule", "rules.py:score", "-o", "own.jsonl") == 0
    said = capsys.readouterr()
    assert "rules.py:score: this function is run here" in said.err
    made, manifest = lines(place / "own.jsonl"), json.loads((place / "own.jsonl.manifest").read_text())
    answers = {line["prompt"]: line["record"] for line in lines(place / "own.jsonl.answers")[1:]}
    assert len(answers) == len(QUESTIONS)
    for row in made:
        assert [turn["role"] for turn in row["prompt"]] == ["user"]
        texts = {answer["text"] for of_prompt in answers.values() for answer in of_prompt if answer["ended"]}
        assert {row["chosen"][0]["content"], row["rejected"][0]["content"]} <= texts
        for side in ("chosen", "rejected"):
            assert row[f"{side}_score"] == sum(map(ord, row[side][0]["content"])) % 97
        assert row["chosen_score"] > row["rejected_score"]
    assert said.out.startswith(f"own.jsonl: {len(made)} pairs of {len(made)} of {len(QUESTIONS)} prompts\n")
    assert manifest["pairs"] == len(made) >= 3
    assert manifest["model"]["adapter"] == "one"
    assert manifest["sampling"] == {"samples": 4, "temperature": 0.9, "top_p": 1.0, "max_new_tokens": 24, "seed": 0}
    assert manifest["scores"]["code"] == RULE
    cut = sum(not answer["ended"] for of_prompt in answers.values() for answer in of_prompt)
    assert manifest["left_out"].get("answers cut off by --max-new-tokens", 0) == cut


def test_what_it_writes_trains_and_its_origin_stands_in_run_json(place: Path) -> None:
    assert pairs("asks.txt", "--model", "tiny.toml", "--longer", "--pairing", "all", "-o", "own.jsonl") == 0
    wanted = json.loads((place / "own.jsonl.manifest").read_text())
    del wanted["sha256"]
    environment = commands_in_process.here(QLORA_DPO_CACHE=str(place / "cache"))
    train = ["train", "tiny.toml", "-o", "adapters/run"]
    (trained,) = commands_in_process.said([train], place, environment)
    assert trained.code == 0, trained.err
    assert json.loads((place / "adapters/run/run.json").read_text())["data"]["origin"] == wanted
    with (place / "own.jsonl").open("a") as file:
        file.write(json.dumps(lines(place / "own.jsonl")[0]) + "\n")
    train[3] = "adapters/changed"
    (trained,) = commands_in_process.said([train], place, environment)
    assert json.loads((place / "adapters/changed/run.json").read_text())["data"]["origin"] == {"changed": True}


def test_answers_do_not_depend_on_which_prompts_share_their_batch(place: Path) -> None:
    assert pairs("asks.txt", "--model", "one", "--longer", "-o", "whole.jsonl") == 0
    (place / "few.txt").write_text("\n".join(QUESTIONS[2:4]))
    assert pairs("few.txt", "--model", "one", "--longer", "-o", "few.jsonl") == 0
    whole, few = (
        {line["prompt"]: line["record"] for line in lines(place / f"{name}.jsonl.answers")[1:]}
        for name in ("whole", "few")
    )
    assert few == {digest: whole[digest] for digest in few}
    assert len(few) == 2


def test_the_datas_own_answer_is_chosen(place: Path) -> None:
    assert pairs("hh.jsonl", "--model", "one", "--base", "--chosen", "chosen", "-o", "own.jsonl") == 0
    manifest, own = json.loads((place / "own.jsonl.manifest").read_text()), {row["chosen"].strip() for row in rows(8)}
    assert (manifest["model"]["adapter"], manifest["scores"], manifest["sampling"]["samples"]) == (None, None, 1)
    made = lines(place / "own.jsonl")
    assert {row["chosen"][0]["content"].strip() for row in made} <= own
    assert len(made) == manifest["pairs"] >= 2
    assert manifest["chosen_tokens"] > 0


def test_an_adapters_reward_scores_anothers_answers(place: Path) -> None:
    assert pairs("asks.txt", "--model", "one", "--implicit", "two", "--pairing", "best_worst", "-o", "own.jsonl") == 0
    for row in lines(place / "own.jsonl"):
        assert row["chosen_score"] > row["rejected_score"]
    assert json.loads((place / "own.jsonl.manifest").read_text())["scores"] == {
        "by": "implicit",
        "adapter": "two",
        "beta": 0.1,
    }


JUDGE = "import sys; text = sys.stdin.read(); print('[[A]]' if text.count('x') % 2 else '[[B]]')"
SILENT = "print('Both are fine.')"
FAILING = "import sys; sys.exit('no more credit')"


def judged_by(code: str) -> list[str]:
    return ["--judge", f"{sys.executable} -ISsc {json.dumps(code)}"]


def test_a_judge_that_fails_or_says_nothing_costs_no_answer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ("asks.txt", "--model", "one", "-o", "own.jsonl")
    assert pairs(*first, *judged_by(FAILING)) == 1
    assert (
        "no more credit; what is done so far is kept in own.jsonl.answers, and --resume goes on"
        in (capsys.readouterr().err.splitlines()[-1])
    )
    answers = (place / "own.jsonl.answers").read_bytes()
    assert pairs(*first, *judged_by(FAILING), "--resume") == 1
    (place / "own.jsonl.scores").unlink()
    assert pairs(*first, *judged_by(SILENT), "--resume") == 1
    assert 'replies hold no verdict, the last one "Both are fine."' in capsys.readouterr().err
    (place / "own.jsonl.scores").unlink()
    capsys.readouterr()
    assert pairs(*first, *judged_by(JUDGE), "--resume") in (0, 1)
    assert "the judge gets at most 72 requests" in capsys.readouterr().err
    assert (place / "own.jsonl.answers").read_bytes() == answers
    assert not (place / "own.jsonl").exists() or lines(place / "own.jsonl")


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_moment_no_prompt_is_answered_twice(place: Path, kills: int) -> None:
    command = ["-m", "qlora_dpo", "pairs", "asks.txt", "--model", "one", "--rule", "rules.py:score", *SHORT]
    environment, draw = commands_in_process.here(), random.Random(0)

    def run(out: str, seconds: float | None) -> int:
        with ForkedPython([*command, "-o", out, "--resume"], cwd=place, env=environment, stderr=-3) as process:
            if seconds is not None:
                time.sleep(seconds)
                process.send_signal(signal.SIGKILL)
            return process.wait()

    started = time.monotonic()
    assert run("whole.jsonl", None) == 0
    seconds = time.monotonic() - started
    done = 0
    for number in itertools.count():
        if done >= kills:
            break
        out = f"own-{number}.jsonl"
        while run(out, draw.uniform(0, seconds)) == -signal.SIGKILL:
            done += 1
        for suffix in ("", ".scores", ".answers"):
            kept = [sorted((place / f"{name}{suffix}").read_bytes().splitlines()) for name in (out, "whole.jsonl")]
            assert kept[0] == kept[1], suffix


ROUNDS = ("asks.txt", "--rounds", "2", "--recipe", "rounds.toml", "--rule", "rules.py:score", "-o", "rounds")


def test_rounds_go_on_from_each_other_and_end_where_nothing_is_won(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "asks.txt").write_text("\n".join(f"{question} {number}" for number in range(5) for question in QUESTIONS))
    (place / "rounds.toml").write_text(RECIPE.replace("max_steps = 2", "max_steps = 2\nlearning_rate = 1e-2"))
    assert pairs(*ROUNDS, "--model", "tiny.toml") == 0
    said = capsys.readouterr()
    assert "6 prompts are held out, 24 are sampled from" in said.err
    results = json.loads((place / "rounds/rounds.json").read_text())
    assert results[0]["steps"] == 2
    assert 0 <= results[0]["interval"][0] <= results[0]["win_rate"] <= results[0]["interval"][1] <= 1
    ended = len(results) < 2 or "no further round" in said.err
    assert ended == (results[-1]["interval"][0] <= ([0.5] + [each["win_rate"] for each in results])[len(results) - 1])
    table = said.out.splitlines()[-len(results) - 1 :]
    assert table[0].split() == ["round", "pairs", "steps", "win", "rate", "95", "%", "interval", "score", "tokens"]
    assert [line.split()[0] for line in table[1:]] == [str(each["round"]) for each in results]
    held_out = {line["prompt"] for line in lines(place / "rounds/start.held-out.answers")[1:]}
    sampled = {line["prompt"] for line in lines(place / "rounds/round-1.jsonl.answers")[1:]}
    assert (len(held_out), len(sampled), held_out & sampled) == (6, 24, set())
    trained = json.loads((place / "rounds/round-1/run.json").read_text())
    assert trained["data"]["origin"]["made_by"] == "qlora-dpo pairs"

    weights = (place / "rounds/round-1/adapter_model.safetensors").stat().st_mtime_ns
    assert pairs(*ROUNDS, "--model", "tiny.toml") == 2
    assert "rounds: exists; --resume goes on in it, or name another folder" in capsys.readouterr().err
    assert pairs(*ROUNDS, "--model", "tiny.toml", "--resume") == 0
    assert (place / "rounds/round-1/adapter_model.safetensors").stat().st_mtime_ns == weights
    assert json.loads((place / "rounds/rounds.json").read_text()) == results


def test_a_round_goes_on_from_the_adapter_that_it_begins_with(place: Path) -> None:
    (place / "asks.txt").write_text("\n".join(f"{question} {number}" for number in range(3) for question in QUESTIONS))
    one = json.loads((place / "one/adapter_config.json").read_text())
    lora = f"[lora]\nr = {one['r']}\nlora_alpha = {one['lora_alpha']}\n"
    (place / "rounds.toml").write_text(RECIPE + lora)
    assert pairs(*ROUNDS[:2], "1", *ROUNDS[3:], "--model", "one") == 0
    resolved = (place / "rounds/round-1/resolved.toml").read_text()
    assert f'path = "{place}/one"' in resolved
    assert 'kind = "adapter"' in resolved


REFUSED: list[tuple[Sequence[str], int, str]] = [
    (["asks.txt"], 2, "nothing says which answers are better; add --judge, --rule, --matches, --longer, --shorter or"),
    (["asks.txt", "--longer", "--matches", "x"], 2, "--matches and --longer: answers have one score"),
    (["asks.txt", "--longer", "--samples", "1"], 2, "--samples 1: a pair needs two answers"),
    (["asks.txt", "--longer", "--temperature", "0"], 2, "--temperature 0: all 4 answers would be equal"),
    (["asks.txt", "--longer", "--temperature", "-1"], 2, "temperature is -1.0"),
    (["asks.txt", "--chosen", "chosen"], 2, "--chosen chosen: asks.txt is plain text, which has no columns"),
    (["hh.jsonl", "--chosen", "good"], 2, "--chosen good: hh.jsonl:1 has no such column, but prompt, response"),
    (["asks.txt", "--matches", "("], 2, "--matches (: is no regular expression: "),
    (["asks.txt", "--rule", "rules.py"], 2, "--rule rules.py: names no function; write FILE.py:FUNCTION"),
    (["asks.txt", "--rule", "none.py:score"], 2, "--rule none.py:score: there is no file none.py"),
    (["asks.txt", "--rule", "rules.py:missing"], 2, "--rule rules.py:missing: rules.py has no function missing"),
    (["asks.txt", "--rule", "broken.py:score"], 2, "--rule broken.py:score: line 1: "),
    (["asks.txt", "--rule", "rules.py:fails"], 2, "line 7: ZeroDivisionError: division by zero; what is done so far"),
    (["asks.txt", "--rule", "rules.py:no_number"], 2, "gives 'good' for an answer to \"How do I find the"),
    (
        ["asks.txt", "--longer", "--rounds", "2"],
        2,
        "--rounds: rounds sample answers and train a recipe on them; add --rec",
    ),
    (
        ["asks.txt", "--longer", "--recipe", "tiny.toml"],
        2,
        "--recipe: rounds sample answers and train a recipe on them",
    ),
    (
        ["hh.jsonl", "--chosen", "chosen", "--rounds", "2", "--recipe", "tiny.toml"],
        2,
        "--rounds: compares the held-out",
    ),
    (["asks.txt", "--longer", "--judge-model", "m"], 2, "--judge-model: names a model behind the address of --judge"),
    (["asks.txt", "--implicit", "base"], 2, "--implicit base: is no adapter; name the folder of a run"),
    (["missing.jsonl", "--longer"], 2, "missing.jsonl"),
    (["equal.jsonl", "--longer"], 1, "equal.jsonl: holds no usable prompts; `qlora-dpo data lint` says"),
    (["empty.txt", "--longer"], 2, "empty.txt: holds no prompts; write one a line"),
    (["asks.txt", "--matches", "this is nowhere"], 1, "own.jsonl: is not written, since there are no pairs: "),
]


@pytest.mark.parametrize(("arguments", "code", "sentence"), REFUSED, ids=[" ".join(each[0]) for each in REFUSED])
def test_what_cannot_be_done_is_said_in_a_sentence(
    arguments: Sequence[str], code: int, sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "broken.py").write_text("def score(:\n")
    (place / "empty.txt").write_text("\n\n")
    (place / "equal.jsonl").write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "So."}\n')
    assert pairs(*arguments, "--model", "one", "-o", "own.jsonl") == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert sentence in last
    assert not (place / "own.jsonl").exists()


def test_what_is_there_is_not_overwritten_and_other_settings_are_not_mixed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("asks.txt", "--model", "one", "--rule", "rules.py:score", "-o", "own.jsonl")
    assert pairs(*command) == 0
    before = (place / "own.jsonl").read_bytes()
    assert pairs(*command) == 2
    assert "own.jsonl: exists; --resume goes on with it, or name another file" in capsys.readouterr().err
    assert pairs(*command, "--resume", "--seed", "1", "--temperature", "0.5") == 2
    assert "own.jsonl.answers: was made with another temperature, another seed; take" in capsys.readouterr().err
    assert pairs(*command, "--resume") == 0
    assert (place / "own.jsonl").read_bytes() == before
    (place / "other.jsonl.answers").write_bytes((place / "own.jsonl.answers").read_bytes())
    other = ("asks.txt", "--model", "one", "--shorter", "-o", "other.jsonl")
    assert pairs(*other) == 2
    assert pairs(*other, "--resume") == 0
    damaged = (place / "own.jsonl.answers").read_text().splitlines()
    (place / "own.jsonl.answers").write_text("\n".join([*damaged[:2], damaged[2][:20], *damaged[3:]]) + "\n")
    assert pairs(*command, "--resume") == 1
    assert "own.jsonl.answers:3: is damaged; delete this line" in capsys.readouterr().err
