"""`runs` lists what was trained with its figures, and tells two runs apart."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.cli import main
from qlora_dpo.cli.runs import SORT_CHOICES as OFFERED
from qlora_dpo.report.runs import SORT_DESCENDING

RESOLVED = """
[model]
name = "Qwen/Qwen2-0.5B-Instruct"
[data]
train = "Dahoas/full-hh-rlhf"
[objective]
loss_type = "{loss}"
beta = 0.1
[train]
learning_rate = {rate}
"""


def evaluation(step: int, loss: float, accuracy: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "eval_loss": loss,
        "eval_rewards/accuracies": accuracy,
        "eval_rewards/margins": accuracy - 0.5,
        "eval_kl": 0.1,
        "eval_pairs": 100,
    }


def made(home: Path, name: str, accuracy: float, rate: str = "1e-5", held_out: str = "f00d", **run: Any) -> None:
    """A finished run whose adapter comes from step 10 of 20."""
    folder = home / name
    folder.mkdir(parents=True)
    (folder / "resolved.toml").write_text(RESOLVED.format(loss="ipo" if name == "b" else "sigmoid", rate=rate))
    facts = {
        "name": name,
        "status": "finished",
        "finished": f"2026-01-0{ord(name) - 96}T00:00:00+00:00",
        "adapter_step": 10,
        "steps": 20,
        "seconds": {"total": 90.0},
        "data": {"train_pairs": 50, "fingerprint_eval": held_out},
        "versions": {"torch": "2.13.0"},
    }
    (folder / "run.json").write_text(json.dumps({**facts, **run}))
    evals = [evaluation(0, 0.69, 0.5), evaluation(10, 1 - accuracy, accuracy), evaluation(20, 2.0, 0.1)]
    results = {"evals": evals, "signs": [{"step": 20, "name": "kl", "sentence": "far"}] if name == "b" else []}
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def home(empty_folder: Path) -> Path:
    adapters = empty_folder / "adapters"
    for name, accuracy in (("a", 0.6), ("b", 0.8), ("c", 0.7)):
        made(adapters, name, accuracy)
    going_on = adapters / "d"
    going_on.mkdir()
    (going_on / "resolved.toml").write_text(RESOLVED.format(loss="sigmoid", rate="1e-5"))
    (going_on / "metrics.jsonl").write_text(json.dumps({"kind": "eval", **evaluation(0, 0.69, 0.5)}) + '\n{"kind": "tr')
    (adapters / "README.md").write_text("")
    return adapters


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["runs", *arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["runs"]
    return found


def test_a_run_is_listed_with_the_figures_of_the_step_its_adapter_comes_from(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = listed(capsys)[0]
    assert {
        key: first[key] for key in ("name", "objective", "loss", "accuracy", "adapter_step", "steps", "minutes")
    } == {
        "name": "a",
        "objective": "DPO (beta 0.1)",
        "loss": 0.4,
        "accuracy": 0.6,
        "adapter_step": 10,
        "steps": 20,
        "minutes": 1.5,
    }
    assert first["accuracy_interval"] == pytest.approx([0.502, 0.691], abs=1e-3)


@pytest.mark.parametrize(
    ("sort", "order"),
    [("finished", "abcd"), ("name", "abcd"), ("accuracy", "bcad"), ("loss", "bcad"), ("minutes", "abcd")],
)
def test_runs_are_sorted_the_best_first(home: Path, sort: str, order: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "".join(run["name"] for run in listed(capsys, str(home), "--sort", sort)) == order


def test_the_table_tells_of_trouble(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[:1] for line in shown.splitlines()[3:7]] == [["a"], ["b"], ["c"], ["d"]]
    assert shown.splitlines()[-2:] == ["b: kl", "d: unfinished"]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (
            "run.json",
            "?",
            "is damaged (JSONDecodeError: Expecting value: line 1 column 1 (char 0)); take it from a backup",
        ),
        (
            "results.json",
            '{"evals": [{"step": 1, "eval_loss": "low"}]}',
            "is damaged (TypeError: 'low' is no number); take it from a backup",
        ),
        (
            "resolved.toml",
            "model = 1",
            "is damaged (KeyError: 'train'); take it from a backup",
        ),
    ],
)
def test_a_run_that_cannot_be_read_is_left_out_and_named(
    home: Path, file: str, content: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run.json", "results.json"):
        (home / "b" / name).unlink()
    (home / "b" / file).write_text(content)
    assert main(["runs", "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [run["name"] for run in found["runs"]] == ["a", "c", "d"]
    assert found["unreadable"] == [f"adapters/b: {reason}"]
    assert told.err == f"left out: adapters/b: {reason}\n"
    assert main(["runs"]) == 0


def test_two_runs_differ_in_recipe_data_and_results(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(home, "e", 0.9, rate="2e-5", held_out="beef")
    assert main(["runs", "diff", "adapters/a", "adapters/e", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == {"train.learning_rate": [1e-5, 2e-5]}
    assert found["data"] == {"data.fingerprint_eval": ["f00d", "beef"]}
    assert found["results"]["accuracy"] == [0.6, 0.9]
    assert found["same_held_out_pairs"] is False
    assert main(["runs", "diff", "adapters/a", "adapters/c"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("the same") == 3
    assert shown.splitlines()[-1] == "both were evaluated on the same held-out pairs"


def test_the_keys_to_sort_by_are_offered() -> None:
    assert set(OFFERED) == SORT_DESCENDING.keys()


def test_listing_runs_needs_no_torch(home: Path) -> None:
    code = "import sys; from qlora_dpo.cli import main; main(['runs']); sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=home.parent, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["empty"], 1, "empty: holds no runs; train one first: qlora-dpo train recipes/quickstart.toml"),
        (["a", "b"], 2, "name one folder, or write: qlora-dpo runs diff a b; see qlora-dpo runs --help"),
        (
            ["diff", "a"],
            2,
            "diff takes two runs, as in: qlora-dpo runs diff adapters/hh adapters/hh-fast; see qlora-dpo runs --help",
        ),
        (["diff", "adapters/a", "x"], 2, "x: holds no run; name the folder of a run, as in adapters/hh"),
        (
            ["broken"],
            1,
            "broken/r: is damaged (JSONDecodeError: Expecting value: line 1 column 1 (char 0)); take it from a backup",
        ),
    ],
)
def test_what_is_no_run_is_refused(
    home: Path, arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = home.parent / "broken" / "r"
    broken.mkdir(parents=True)
    (broken / "resolved.toml").write_text(RESOLVED.format(loss="sigmoid", rate="1e-5"))
    (broken / "run.json").write_text("?")
    assert main(["runs", *arguments]) == code
    assert capsys.readouterr() == ("", f"qlora-dpo: {sentence}\n")
