"""The report of a run: a card that names the objective, plots that repeat, and a page that needs no network."""

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import pytest
from finished_run import RESULTS, SAMPLES, run
from html_tags import Tags
from huggingface_hub import ModelCard

from qlora_dpo.cli import main
from qlora_dpo.recipe.objective import OBJECTIVE_TABLES
from qlora_dpo.report import plots
from qlora_dpo.report.objective_names import OBJECTIVE_NAMES, describe_objective, objective_tags
from qlora_dpo.report.run_files import read_run_files
from qlora_dpo.report.write import base_licence, write_report

DRAWS_PLOTS = True
RESOLVED = """
[model]
name = "Qwen/Qwen2-0.5B-Instruct"
[data]
train = "Dahoas/full-hh-rlhf"
[objective]
loss_type = "ipo"
beta = 0.2
"""
SIGN = {"step": 24, "name": "kl", "sentence": "the policy is <far> away"}


def records() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for each in RESULTS["evals"]:
        sides = {"eval_rewards/chosen": 0.5, "eval_rewards/rejected": -0.5, "eval_logps/chosen": -40.0, "eval_kl": 0.1}
        made.append({"kind": "eval", **each, **sides, "eval_logps/rejected": -50.0, "eval_rewards/margins": 1.0})
    for step in range(4, 49, 4):
        logged = {"learning_rate": 1e-5 * step, "pairs_per_second": 5.0, "rewards/margins": step / 48}
        made.append(
            {"kind": "train", "step": step, "epoch": step / 24, "loss": 0.7 - step / 96, "rewards/accuracies": 0.7}
            | logged
        )
    made.append({"kind": "sign", **SIGN})
    return sorted(made, key=lambda record: record["step"])


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """What a finished run leaves, as far as a report reads it."""
    folder = tmp_path / "hh"
    folder.mkdir()
    for name, value in (("run.json", run()), ("results.json", {**RESULTS, "signs": [SIGN]})):
        (folder / name).write_text(json.dumps(value))
    for name, lines in (("metrics.jsonl", records()), ("samples.jsonl", SAMPLES)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "resolved.toml").write_text(RESOLVED)
    (folder / "recipe.toml").write_text(f'# by /home/alice/me\n{RESOLVED}# <script>alert("recipe")</script>\n')
    return folder


def test_a_line_separator_inside_a_sampled_text_ends_no_record(finished: Path) -> None:
    prompt = [{"role": "user", "content": "One\u2028two\u2029three\x85four?"}]
    text = json.dumps({**SAMPLES[0], "prompt": prompt, "tuned": "Yes\u2028no."}, ensure_ascii=False) + "\n"
    (finished / "samples.jsonl").write_text(text + text[:40], encoding="utf-8")  # the last line was cut off
    (read,) = read_run_files(finished).samples
    assert (read["prompt"], read["tuned"]) == (prompt, "Yes\u2028no.")
    assert main(["report", str(finished)]) == 0


def parsed(folder: Path) -> Tags:
    page = Tags()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    return page


def test_the_report_is_card_page_and_plots_in_both_formats(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(finished)]) == 0
    names = ("loss", "accuracy", "margins", "rewards", "logps", "kl", "learning_rate", "throughput")
    drawn = [f"plots/{name}.{ending}" for name in names for ending in ("svg", "png")]
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(finished / name) for name in ("README.md", "report.html", *drawn)]
    assert told.err == ""
    for name in drawn:
        start = (finished / name).read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if name.endswith("png") else start.startswith(b"<?xml")


def test_the_same_records_give_the_same_plots_and_no_date(finished: Path) -> None:
    some = records()
    first, second = (plots.draw_plots(some, RESULTS) for _ in range(2))
    assert [each.svg for each in first] == [each.svg for each in second]
    assert [each.png for each in first] == [each.png for each in second]
    for each in first:
        assert ElementTree.fromstring(each.svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.search(rb"\d{4}-\d{2}-\d{2}|<dc:date>", each.svg)


def test_what_was_not_measured_is_not_drawn() -> None:
    some = [{**record, "loss": None} for record in records() if record["kind"] == "train"]
    assert plots.PLOTS["loss"][2][0].points(some) == ([], [])
    assert [each.name for each in plots.draw_plots(some, {})] == ["accuracy", "margins", "learning_rate", "throughput"]
    assert plots.draw_plots([], {}) == []


def test_the_page_is_one_file_that_asks_nobody_and_holds_every_plot(finished: Path) -> None:
    write_report(finished, None)
    page = parsed(finished)
    sources = [each["src"] or "" for tag, each in page.tags if tag == "img"]
    pictures = [base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")) for source in sources]
    assert pictures == [
        (finished / "plots" / f"{name}.svg").read_bytes() for name in plots.PLOTS if name != "perplexity"
    ]
    names = {name for _, each in page.tags for name in each}
    assert [name for name in names if name in ("href", "action") or name.startswith("on")] == []
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    policy = next(each["content"] for tag, each in page.tags if tag == "meta" and "http-equiv" in each)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_the_page_says_what_the_run_said_and_no_path(finished: Path) -> None:
    write_report(finished, None)
    text = parsed(finished).text
    for part in (
        "tuned with IPO (beta 0.2) on 192 pairs of Dahoas/full-hh-rlhf",
        "step 24: the policy is <far> away",
        "95 % interval",
        '<script>alert("recipe")',
        "</pre></td><script>alert(1)</script>",
        "Validation Loss",
    ):
        assert part in text, part
    assert "alice" not in text


def test_a_report_repairs_what_was_lost_and_changes_nothing_else(finished: Path) -> None:
    before = {each.name: each.read_bytes() for each in finished.iterdir()}
    write_report(finished, None)
    first = {name: (finished / name).read_bytes() for name in ("README.md", "report.html")}
    for name in first:
        (finished / name).unlink()
    shutil.rmtree(finished / "plots", ignore_errors=True)
    write_report(finished, None)
    assert {name: (finished / name).read_bytes() for name in first} == first
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_the_card_names_the_objective_and_the_licence_of_the_base(finished: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    write_report(finished, base)
    card: Any = ModelCard((finished / "README.md").read_text(encoding="utf-8"))
    assert (card.data.license, card.data.tags) == ("apache-2.0", ["lora", "ipo", "qlora"])
    assert "tuned with IPO (beta 0.2) on 192 preference pairs" in card.text


@pytest.mark.parametrize("content", [None, "# no metadata\n", "---\nlicense: [1]\n---\n", "---\n: {\n---\n", "\xff"])
def test_a_base_that_names_no_licence_has_none(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "README.md").write_bytes(content.encode("latin-1"))
    assert base_licence(tmp_path) is None


def test_every_loss_has_a_name() -> None:
    losses = {name for table in OBJECTIVE_TABLES for name in get_args(table.model_fields["loss_type"].annotation)}
    assert losses - OBJECTIVE_NAMES.keys() == {"sum"}
    assert OBJECTIVE_NAMES.keys() <= losses


@pytest.mark.parametrize(
    ("objective", "words", "tags"),
    [
        ({"loss_type": "sigmoid", "beta": 0.1, "sft_weight": 1.0}, "DPO (beta 0.1) plus 1 * SFT", ["dpo"]),
        ({"loss_type": "orpo", "beta": 0.1}, "ORPO (beta 0.1)", ["orpo"]),
        ({"loss_type": "sft"}, "SFT", ["sft"]),
        ({"loss_type": "beta_dpo", "beta": 0.1}, "beta-DPO (beta 0.1)", ["dpo", "beta-dpo"]),
        (
            {"loss_type": "sum", "loss_weights": {"sigmoid": 1.0, "ipo": 0.5}, "beta": 0.1},
            "a sum of 1 * DPO, 0.5 * IPO (beta 0.1)",
            [],
        ),
    ],
)
def test_objectives_are_called_by_their_names(objective: dict[str, Any], words: str, tags: list[str]) -> None:
    assert (describe_objective(objective), objective_tags(objective)) == (words, tags)


def test_a_run_that_is_not_finished_or_damaged_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "metrics.jsonl").write_text("{broken\n")
    assert main(["report", str(finished)]) == 1
    assert f"qlora-dpo: {finished}: its files do not fit together or are damaged (JSONDecodeError:" in (
        capsys.readouterr().err
    )
    (finished / "results.json").unlink()
    assert main(["report", str(finished)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"qlora-dpo: {finished}: has no results.json, which a finished run leaves; name the folder of a finished run"
    )
    assert main(["report", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err == (
        f"qlora-dpo: {tmp_path / 'no'}: there is no such folder; name the folder of a run, as in adapters/hh\n"
    )
    assert not (finished / "README.md").exists()
