"""Several sources make one data set: shares are kept, each pair knows its source, no prompt stands on both sides."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
from fork_server import run_forked
from hub import Hub
from hub_caller import HubCaller

from qlora_dpo.data.audit import Audit
from qlora_dpo.data.encode import PairSet, load_pairs
from qlora_dpo.data.sources import concatenate_rows, read_sources
from qlora_dpo.errors import DataError, RecipeError
from qlora_dpo.recipe import load_recipe
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.recipe.recipe import resolved_toml
from qlora_dpo.recipe.tables import DATA_SUFFIXES

ROOT = Path(__file__).parents[2]


def write(name: str, count: int, **other: Any) -> None:
    rows = [{"prompt": f"{name} {number}?", "chosen": "No.", "rejected": "Yes.", **other} for number in range(count)]
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def mixed(part: Any, *mix: dict[str, Any], seed: int = 1, **keys: Any) -> PairSet:
    held = load_pairs(DataTable(mix=list(mix), **keys), part, tiny.tokenizer(), seed)
    insist_on_the_account(held.audit)
    return held


def insist_on_the_account(audit: Audit) -> None:
    left_out = sum(map(len, audit.dropped.values()))
    assert audit.rows == audit.used - audit.extra_pairs + audit.not_sampled + audit.other_split + left_out


def counts(held: PairSet) -> dict[str, int]:
    """Pairs by the name that their prompts begin with."""
    return dict(Counter(pair.prompt[-1]["content"].split()[0] for pair in held.pairs))


@pytest.fixture
def two(empty_folder: Path) -> Path:
    write("a", 100)
    write("b", 30)
    write("q", 5)
    return empty_folder


A, B = {"source": "./a.jsonl"}, {"source": "./b.jsonl"}
APART = {"eval": "./q.jsonl"}


def test_without_weights_every_pair_is_used_in_order(two: Path) -> None:
    held = mixed("train", A, B, **APART)
    assert [pair.row for pair in held.pairs] == list(range(1, 131))
    assert counts(held) == {"a": 100, "b": 30}
    assert held.audit.per_source == (("a.jsonl", 1, 100), ("b.jsonl", 101, 30))
    assert [pair.row for pair in held.encoded] == [pair.row for pair in held.pairs]


@pytest.mark.parametrize(
    ("weights", "wanted", "expected"),
    [
        ((1.0, 1.0), None, {"a": 30, "b": 30}),  # b runs out
        ((3.0, 1.0), None, {"a": 90, "b": 30}),
        ((9.0, 1.0), None, {"a": 100, "b": 11}),  # a runs out: 100 / 0.9 = 111.1 pairs in all
        ((3.0, 1.0), 40, {"a": 30, "b": 10}),
        ((0.5, 0.5), 9, {"a": 4, "b": 4}),
    ],
)
def test_the_source_that_runs_out_first_decides(
    two: Path, weights: tuple[float, float], wanted: int | None, expected: dict[str, int]
) -> None:
    one, other = ({**each, "weight": weight} for each, weight in zip((A, B), weights, strict=True))
    assert counts(mixed("train", one, other, max_train_samples=wanted, **APART)) == expected


def test_a_source_gives_no_more_than_its_limit_and_another_seed_draws_others(two: Path) -> None:
    some = mixed("train", {**A, "max_samples": 10}, B, **APART)
    assert counts(some) == {"a": 10, "b": 30}
    again, other = (mixed("train", {**A, "max_samples": 10}, B, seed=seed, **APART) for seed in (1, 2))
    assert again.pairs == some.pairs
    assert other.pairs != some.pairs


def test_what_is_held_out_counts_among_max_samples_and_has_the_same_shares(two: Path) -> None:
    one, other = {**A, "max_samples": 40, "weight": 2.0}, {**B, "weight": 1.0}
    train, held = (mixed(part, one, other, eval_share=0.25) for part in ("train", "eval"))
    assert (counts(train), counts(held)) == ({"a": 30, "b": 15}, {"a": 10, "b": 5})


def test_no_prompt_stands_on_both_sides_of_a_mixture(empty_folder: Path) -> None:
    write("a", 60)
    Path("b.jsonl").write_bytes(Path("a.jsonl").read_bytes())  # the same prompts again
    train, held = (mixed(part, A, B, eval_share=0.3) for part in ("train", "eval"))
    prompts = [{pair.prompt[0]["content"] for pair in side.pairs} for side in (train, held)]
    assert len(train.pairs) + len(held.pairs) == 120
    assert prompts[0] | prompts[1] == {f"a {number}?" for number in range(60)}
    assert not prompts[0] & prompts[1]


def test_each_source_has_its_shape_and_columns_and_bad_rows_are_named_in_it(empty_folder: Path) -> None:
    write("a", 4)
    Path("b.jsonl").write_text(
        '{"question": "b 1?", "good": "", "bad": "Yes."}\n{"question": "b 2?", "good": "No.", "bad": "Yes."}\n'
    )
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    held = mixed("train", A, {**B, "columns": columns, "format": "strings"}, **APART)
    assert [(pair.row, pair.prompt[0]["content"]) for pair in held.pairs][-1] == (6, "b 2?")
    assert (held.audit.dropped, held.audit.first_location) == ({"empty answer": (5,)}, {"empty answer": "b.jsonl:1"})
    assert held.audit.lines()[:5] == [
        "a.jsonl + b.jsonl: strings (prompt, chosen and rejected)",
        "  rows read                           6",
        "  pairs used                          5",
        "    of a.jsonl (rows 1 to 4)          4",
        "    of b.jsonl (rows 5 to 6)          1",
    ]
    assert held.audit.to_dict()["sources"] == [
        {"source": "a.jsonl", "first_row": 1, "used": 4},
        {"source": "b.jsonl", "first_row": 5, "used": 1},
    ]


def test_pairs_and_labelled_answers_do_not_mix(empty_folder: Path) -> None:
    write("a", 4)
    Path("b.jsonl").write_text('{"prompt": "b", "completion": "c", "label": true}\n')
    with pytest.raises(RecipeError) as refused:
        mixed("train", A, B, **APART)
    assert str(refused.value) == (
        "b.jsonl: holds answers with a label, and a.jsonl holds pairs; a mixture is of one kind, so leave one out"
    )


def test_a_source_without_held_out_pairs_cannot_keep_its_share(two: Path) -> None:
    with pytest.raises(DataError) as refused:
        mixed("eval", {**A, "weight": 1.0}, {**B, "weight": 1.0, "max_samples": 4})
    assert str(refused.value) == (
        "b.jsonl: has 0 held-out pairs, too few for its share of the mixture; raise data.eval_share, or name the "
        "held-out pairs in data.eval"
    )


def test_a_source_of_the_mixture_cannot_be_held_out_as_well(two: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        mixed("eval", A, B, eval="./b.jsonl")
    assert str(refused.value) == (
        "b.jsonl: would give both the training and the held-out pairs; name two files that share no rows, in "
        "data.train and data.eval or by data.train_split and data.eval_split"
    )


def test_a_pattern_stands_for_the_files_that_match(empty_folder: Path) -> None:
    for name, count in (("part-2", 2), ("part-1", 1), ("other", 3)):
        write(name, count)
    Path("part-3.txt").write_text("no data")
    rows = concatenate_rows(read_sources(DataTable(train="./part-*.jsonl"), "train"))
    assert [row["prompt"] for row in rows.rows] == ["part-1 0?", "part-2 0?", "part-2 1?"]
    assert (rows.name, rows.location(3)) == ("part-*.jsonl", "part-2.jsonl:2")
    assert DataTable(train="./part-*").effective_eval_share == 0.1
    assert len(concatenate_rows(read_sources(DataTable(train="./part-[13]*"), "train")).rows) == 1
    with pytest.raises(RecipeError) as refused:
        concatenate_rows(read_sources(DataTable(train="./dart-*.jsonl"), "train"))
    assert str(refused.value) == (
        f"dart-*.jsonl: no data file matches that; they end in {', '.join(DATA_SUFFIXES)}; correct data.train"
    )


MODEL = '[model]\nname = "./m"\n'
TWO = '[[data.mix]]\nsource = "./a.jsonl"\n[[data.mix]]\nsource = "./b.jsonl"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nmax_length = 9\n", '3: [data] needs the key "train"'),
        (
            '[[data.mix]]\nsource = "./a.jsonl"\n',
            "r.toml: [data] has fewer than two [[data.mix]] tables; name a single source in train",
        ),
        (
            f'[data]\ntrain = "./c.jsonl"\n{TWO}',
            "3: [data] has both train and [[data.mix]] tables; each table of a mixture has its own keys",
        ),
        (
            f'[data]\nrevision = "v1"\n{TWO}',
            "3: [data] has both revision and [[data.mix]] tables; each table of a mixture has its own keys",
        ),
        (
            f"{TWO}weight = 2.0\n",
            "r.toml: [data] mixes tables with and without a weight; give each [[data.mix]] one, or none",
        ),
        (f"{TWO}wieght = 2.0\n", '7: [[data.mix]] has no key "wieght"; did you mean "weight"?'),
        (
            f"{TWO}interleave_probs = 2.0\n",
            '7: [[data.mix]] has no key "interleave_probs": that is LLaMA-Factory\'s name; here it is weight in '
            "[[data.mix]] tables",
        ),
        (f"{TWO}weight = 0.0\n", "7: weight in [[data.mix]] is 0.0; it must be greater than 0.0"),
        (f"{TWO}[[data.mix]]\nweight = 1.0\n", '7: [[data.mix]] needs the key "source"'),
        (
            f'{TWO}revision = "v1"\n',
            "r.toml: [data] mixes ./b.jsonl with a revision, which only a hub data set takes; leave it out",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_line(empty_folder: Path, text: str, message: str) -> None:
    Path("r.toml").write_text(MODEL + text)
    with pytest.raises(RecipeError) as refused:
        load_recipe("r.toml")
    assert str(refused.value) == (message if message.startswith("r.toml") else f"r.toml:{message}")


def test_a_resolved_mixture_is_read_back_as_it_was(empty_folder: Path) -> None:
    Path("r.toml").write_text(f"{MODEL}{TWO}max_samples = 4\n")
    recipe = load_recipe("r.toml").recipe
    assert [each.source for each in recipe.data.mix or ()] == [str(empty_folder / f"{name}.jsonl") for name in "ab"]
    Path("resolved.toml").write_text(resolved_toml(recipe))
    assert load_recipe("resolved.toml").recipe == recipe


def test_the_shipped_mixture_trains(tmp_path: Path) -> None:
    text = (ROOT / "recipes/multi-dataset.toml").read_text()
    start, data = text.index("[model]"), text.index("[data]")
    text = text[:start] + f'[model]\nname = "{tiny_run.source().folder}"\n' + text[data:]
    (tmp_path / "mix.toml").write_text(text.replace("./house_rules", str(ROOT / "recipes/house_rules")))
    command = ["train", "mix.toml", "--max-steps", "2", "--set", "samples.prompts=0", "--set", "data.max_length=512"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_forked(["-m", "qlora_dpo", *command], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "adapters/mix/audit.json").read_text())
    assert [each["used"] for each in told["train"]["sources"]] == [162, 54]
    assert [each["used"] for each in told["eval"]["sources"]] == [18, 6]
    assert "and on      " in done.stderr


def test_configurations_and_folders_of_a_hub_data_set_are_read_also_without_the_hub(tmp_path: Path) -> None:
    for name in ("folders", "configs"):
        for part in ("a", "b"):
            folder = tmp_path / "datasets/acme" / name / part
            folder.mkdir(parents=True)
            row = {"prompt": f"{name} {part}", "chosen": "c", "rejected": "d"}
            (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "datasets/acme/configs/README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: a/*.jsonl\n- config_name: two\n  data_files: b/*.jsonl\n---\n"
    )
    kept = {"QLORA_DPO_CACHE": str(tmp_path / "cache")}
    questions = [
        ({"train": "acme/folders", "data_dir": "a"}, "train"),
        ({"train": "acme/folders", "data_dir": "b"}, "train"),
        ({"train": "acme/configs", "config": "two"}, "train"),
        ({"train": "acme/configs", "config": "one"}, "train"),
        ({"train": "acme/configs", "config": "three"}, "train"),
        ({"train": "acme/configs"}, "train"),
    ]
    with Hub(tmp_path) as hub:
        caller = HubCaller(hub.url, tmp_path / "home")
        first = caller.ask(*questions, **kept)
    assert [each[0] for each in first[:4]] == [["folders a"], ["folders b"], ["configs b"], ["configs a"]]
    assert [each[:2] for each in first[4:]] == [
        ["RecipeError", "acme/configs: has no such configuration; it has one, two; correct data.config"],
        ["RecipeError", "acme/configs: holds several configurations; name one of them in data.config: one, two"],
    ]
    (unnamed,) = caller.ask(questions[5], HF_HUB_OFFLINE="1", **kept)
    assert unnamed[0] == "SourceError"
    again = caller.ask(*questions[:4], HF_HUB_OFFLINE="1", **kept)
    assert [each[0] for each in again] == [each[0] for each in first[:4]]
