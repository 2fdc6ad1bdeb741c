"""`sweep` trains every combination of some values on one base, each as `train` would, and says which is the best."""

import contextlib
import hashlib
import io
import json
import os
import signal
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from file_faults import struck
from saved_adapters import save_base, save_pairs
from sweep_recipe import RECIPE

from qlora_dpo.cli import main, probe
from qlora_dpo.model.base_snapshot import snapshot_base
from qlora_dpo.model.decoder_layers import set_gradient_checkpointing
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.preference.start_checks import probe_logits
from qlora_dpo.recipe.grid import name_points, parse_axes
from qlora_dpo.recipe.model import LoraTable
from qlora_dpo.report.sweep import ranking_caveats
from qlora_dpo.tracking.run_log import RunLog

pytestmark = tiny_run.LIBRARIES_WARN

GRID = ("--over", "dpo.beta=[0.05, 0.3]", "--over", "lora.use_dora=[true, false]")
NAMES = ["1_beta-0.05_use_dora-true", "2_beta-0.05_use_dora-false", "3_beta-0.3_use_dora-true"]
NAMES += ["4_beta-0.3_use_dora-false"]


@dataclass(frozen=True)
class Said:
    """What a command in this process ended with."""

    code: int
    out: str
    err: str


def said(*arguments: str) -> Said:
    """Run one command as if it had a process of its own."""
    AcceleratorState._reset_state(True)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(list(arguments))
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder of all tests here, with a recipe of four steps."""
    folder = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("QLORA_DPO_CACHE", str(folder / "cache"))
        save_base(folder / "base")
        save_pairs(folder / "train.jsonl", 8)
        save_pairs(folder / "held.jsonl", 4)
        (folder / "r.toml").write_text(RECIPE)
        yield folder


@pytest.fixture(scope="module")
def swept(place: Path) -> Said:
    """Four points, every second with layers that are PEFT's, the others with lean ones."""
    return said("sweep", "r.toml", *GRID)


@pytest.fixture(scope="module")
def alone(place: Path, swept: Said) -> Path:
    """The last point by itself."""
    options = ("--set", "objective.beta=0.3", "--set", "lora.use_dora=false")
    assert said("train", "r.toml", *options, "-o", "adapters/alone").code == 0
    return place / "adapters" / "alone"


def weights(folder: Path | str) -> str:
    return hashlib.sha256((Path(folder) / "adapter_model.safetensors").read_bytes()).hexdigest()


def record(folder: Path | str, name: str = "sweep.json") -> Any:
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))


def states(folder: Path | str) -> list[str]:
    return [point["state"] for point in record(folder)["points"]]


def test_a_sweep_has_one_base_one_reading_and_one_reference(swept: Said) -> None:
    assert swept.code == 0, swept.err
    home = Path("adapters/r-sweep")
    assert sorted(each.name for each in home.iterdir()) == [*NAMES, "best.toml", "sweep.json"]
    asked = [record(home / name, "run.json")["reference_pairs_computed"] for name in NAMES]
    assert asked == [8, 0, 0, 0]  # the four held-out pairs are among the eight
    starts = [record(home / name, "results.json")["evals"][0] for name in NAMES]
    assert all(start["seconds"] > 0 for start in starts)  # no learning rate alone tells two of them apart
    for once in ("dpo.beta: read as objective.beta\n", "reading base and data", "weights: the linear ", "layout: "):
        assert swept.err.count(once) == 1, once


def test_a_point_is_what_train_writes_with_its_values_set(swept: Said, alone: Path) -> None:
    point = Path("adapters/r-sweep", NAMES[3])
    assert sorted(each.name for each in point.iterdir()) == sorted(each.name for each in alone.iterdir())
    for same in ("adapter_model.safetensors", "resolved.toml", "recipe.toml", "audit.json", "samples.jsonl"):
        assert (point / same).read_bytes() == (alone / same).read_bytes(), same
    evals = [record(each, "results.json")["evals"] for each in (point, alone)]
    assert [each.keys() for each in evals[0]] == [each.keys() for each in evals[1]]
    assert all(one[name] == other[name] for one, other in zip(*evals, strict=True) for name in one if name != "seconds")


def test_the_recipe_of_the_best_trains_to_its_adapter(swept: Said) -> None:
    best = record("adapters/r-sweep")["best"]
    assert said("train", "adapters/r-sweep/best.toml").code == 0
    assert weights("adapters/best") == weights(Path("adapters/r-sweep", best))


def test_the_end_is_the_table_of_runs_and_how_sure_the_best_is(swept: Said) -> None:
    found = record("adapters/r-sweep")
    figures = {point["name"]: point["figure"] for point in found["points"]}
    ranked = sorted(NAMES, key=lambda name: figures[name])
    assert (found["best"], states("adapters/r-sweep")) == (ranked[0], ["finished"] * 4)
    table = said("runs", "adapters/r-sweep", "--sort", "loss").out
    assert swept.out.startswith(table)
    runs = {run["name"]: run for run in json.loads(said("runs", "adapters/r-sweep", "--json").out)["runs"]}
    assert figures == {name: run["loss"] for name, run in runs.items()}
    best, folder = next(each for each in found["points"] if each["name"] == ranked[0])["set"], f"r-sweep/{ranked[0]}"
    dora = str(best["lora.use_dora"]).lower()
    evals = [record(f"adapters/r-sweep/{name}", "results.json")["evals"][-1] for name in ranked[:2]]
    errors = [1.96 * each["eval_loss_stderr"] for each in evals]
    ends = [
        f"{each['eval_loss'] - error:.3f}-{each['eval_loss'] + error:.3f}"
        for each, error in zip(evals, errors, strict=True)
    ]
    chat = f"qlora-dpo chat adapters/{folder}"
    assert swept.out.removeprefix(table).splitlines() == [
        "",
        f"best: {ranked[0]}, loss {figures[ranked[0]]:.4f} on 4 held-out pairs "
        f"(objective.beta = {best['objective.beta']}, lora.use_dora = {dora})",
        "  loss depends on objective.beta, which the points do not share, so it cannot rank them fairly; --metric "
        "rewards/accuracies can",
        f"  4 pairs cannot tell it apart from the second, {ranked[1]}: the 95 % intervals of their losses overlap "
        f"({ends[0]} and {ends[1]})",
        "  it was chosen among 4 runs on these same pairs, so its figure is optimistic; evaluate it on others: "
        f"qlora-dpo eval adapters/{folder} --data FILE",
        "",
        f"{chat}   # talk to it",
        f"{'qlora-dpo train adapters/r-sweep/best.toml':<{len(chat) + 3}}# its recipe, trained on its own",
    ]


def test_a_finished_sweep_resumes_to_its_table_by_another_figure_too(swept: Said) -> None:
    again = said("sweep", "r.toml", *GRID, "--resume", "--metric", "kl", "--json")
    found = json.loads(again.out)
    assert (again.code, again.err.splitlines()[-1]) == (0, "4 of 4 points have ended already")
    by_kl = sorted(found["runs"], key=lambda run: run["kl"])
    assert found["best"] == by_kl[0]["name"] == found["runs"][0]["name"]
    assert found["recipe"] == "adapters/r-sweep/best.toml"
    assert tomllib.loads(Path(found["recipe"]).read_text())["train"]["learning_rate"] == 0.01
    assert not [each for each in found["cautions"] if "cannot rank" in each]


def test_a_figure_that_no_run_has_is_named(swept: Said) -> None:
    told = said("sweep", "r.toml", *GRID, "--resume", "--metric", "sft_loss")
    assert (told.code, told.err.splitlines()[-1]) == (
        1,
        "qlora-dpo: --metric sft_loss: is not measured with this objective; go on with --resume and one of loss, "
        "preference_loss, rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, "
        "logps/rejected, logits/chosen, logits/rejected, entropy, mean_token_accuracy, kl",
    )


def test_another_sweep_does_not_go_on_in_its_folder(swept: Said) -> None:
    begin = "adapters/r-sweep: belongs to another sweep; changed since: "
    end = "; put it back, or begin another one with -o DIR"
    sets = ("--set", "train.batch_size=2")
    for arguments, what in (
        ((*GRID[:2], "--resume", *sets), "lora.use_dora was [true, false], is absent; lora.use_dora was absent, is "),
        ((*GRID, "--resume", *sets), "train.batch_size was 4, is 2"),
        ((*GRID[:3], "lora.use_dora=[true]", "--resume"), "lora.use_dora was [true, false], is [true]"),
    ):
        told = said("sweep", "r.toml", *arguments)
        assert told.code == 1
        assert told.err.splitlines()[-1].startswith(f"qlora-dpo: {begin}{what}")
        assert told.err.splitlines()[-1].endswith(end)
    told = said("sweep", "r.toml", *GRID)
    assert (told.code, told.err.splitlines()[-1]) == (
        1,
        "qlora-dpo: adapters/r-sweep: holds a sweep; go on with --resume, or name another folder with -o DIR",
    )


def test_a_stopped_sweep_goes_on_within_the_run_it_was_in(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, said_step = [], RunLog.step

    def step(tracker: RunLog, number: int) -> None:
        said_step(tracker, number)
        steps.append(number)
        if len(steps) == 5:  # the first of the second point
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "step", step)
    grid = ("sweep", "r.toml", "--set", "lora.use_dora=false", *GRID[:2], "-o", "stopped")
    told = said(*grid)
    assert (told.code, told.err.splitlines()[-1]) == (
        130,
        "qlora-dpo: point 2 of 2: stopped after step 1 as asked; stopped/2_beta-0.3/checkpoints/step-000001 is saved, "
        "--resume goes on from there",
    )
    assert (states("stopped"), steps) == (["finished", "running"], [1, 2, 3, 4, 1])
    assert said(*grid, "--resume").code == 0
    assert (states("stopped"), steps[5:]) == (["finished", "finished"], [2, 3, 4])
    assert weights("stopped/2_beta-0.3") == weights(alone)
    assert record("stopped/2_beta-0.3", "run.json")["reference_pairs_computed"] == 0


def test_a_killed_sweep_ends_as_if_nobody_had_killed_it(alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    grid = ("sweep", "r.toml", *GRID[:2], "--set", "lora.use_dora=false", "-o", str(folder))
    for event in (2, 60, 190):  # before sweep.json, within the first run, within the second
        resume = ("--resume",) if (folder / "sweep.json").is_file() else ()
        assert struck(lambda resume=resume: said(*grid, *resume), event, "killed", folder)  # type: ignore[misc]
    assert states(folder) == ["finished", "running"]
    assert said(*grid, "--resume").code == 0
    assert states(folder) == ["finished", "finished"]
    assert weights(folder / "2_beta-0.3") == weights(alone)
    assert said("verify", str(folder / "1_beta-0.05")).code == 0


def test_a_point_that_fails_is_told_and_leaves_the_next_ones_base_as_it_was(alone: Path) -> None:
    options = ("--set", "objective.beta=0.3", "--set", "lora.use_dora=false", "-o", "failing")
    told = said("sweep", "r.toml", "--over", "train.learning_rate=[1e30, 0.01]", *options)
    failed, finished = record("failing")["points"]
    assert (failed["state"], failed["figure"], finished["state"]) == ("failed", None, "finished")
    assert "is not finite" in failed["sentence"]
    assert (told.code, told.err.splitlines()[-1]) == (
        1,
        f"qlora-dpo: failing: 1 of 2 points failed, the first of them 1_lr-1e30: {failed['sentence']}; --resume tries "
        "them again",
    )
    assert told.out.splitlines()[3].startswith("2_lr-0.01 ")
    assert weights("failing/2_lr-0.01") == weights(alone)
    assert record("failing")["best"] == "2_lr-0.01"


def test_objectives_that_read_the_pairs_in_other_ways_share_them(place: Path) -> None:
    told = said("sweep", "r.toml", "--over", 'objective.loss_type=["sft", "ipo"]', "-o", "losses")
    assert told.code == 0, told.err
    assert said("train", "r.toml", "--set", "objective.loss_type=ipo", "-o", "ipo").code == 0
    assert weights("losses/2_loss_type-ipo") == weights("ipo")
    assert record("losses/2_loss_type-ipo", "run.json")["data"] == record("ipo", "run.json")["data"]


def test_another_model_as_reference_is_loaded_once(place: Path) -> None:
    save_base(place / "other", seed=1)
    sets = ("--set", "reference.kind=model", "--set", "reference.name=./other", "--set", "train.max_steps=2")
    told = said("sweep", "r.toml", "--over", "train.learning_rate=[0.01, 0.02]", *sets, "-o", "referred")
    assert told.code == 0, told.err
    assert [line for line in told.err.splitlines() if line.startswith("reference: ")] == [
        f"reference: 8 pairs computed, 4 from the cache; {place / 'other'} is freed",
        f"reference: 0 pairs computed, 12 from the cache; {place / 'other'} is not loaded again",
    ]


def test_other_pairs_than_the_sweep_began_with_are_refused(place: Path) -> None:
    grid = ("sweep", "s.toml", "--over", "train.learning_rate=[1e-3]", "--set", "train.max_steps=1", "-o", "changed")
    (place / "s.toml").write_text(RECIPE.replace("held", "mine"))
    save_pairs(place / "mine.jsonl", 4)
    assert said(*grid).code == 0
    save_pairs(place / "mine.jsonl", 5)
    found = record("changed")
    found["points"][0]["state"] = "waiting"
    Path("changed/sweep.json").write_text(json.dumps(found))
    told = said(*grid, "--resume")
    assert (told.code, told.err.splitlines()[-1]) == (
        1,
        "qlora-dpo: the held-out pairs are others than when this sweep began, so its figures could not be compared; "
        "put them back, or begin another sweep with -o DIR",
    )


def test_what_is_attached_to_a_remembered_base_falls_off() -> None:
    base = tiny_run.base_model("nf4")
    pair = tiny_run.pairs(1)[0]
    before_LV, names = probe_logits(base, pair, tiny_run.CPU), [name for name, _ in base.named_modules()]
    bytes_before = {name: each.clone() for name, each in base.state_dict().items()}
    forwards = [vars(module).get("forward") for module in base.modules()]
    put_back = snapshot_base(base)
    for table in (
        {"modules_to_save": ["norm"]},
        {"use_dora": True, "lora_dropout": 0.1},
        {"target_modules": ["q_proj"]},
    ):
        model = attach_lora(base, LoraTable.model_validate({"r": 4, **table}), seed=1)
        fuse_lora(model, torch.float32)
        set_gradient_checkpointing(model, 1)
        tiny_run.stirred(model).train()
        assert not torch.equal(probe_logits(model, pair, tiny_run.CPU), before_LV)
        put_back()
        assert [name for name, _ in base.named_modules()] == names
        assert [vars(module).get("forward") for module in base.modules()] == forwards
        assert not base.is_gradient_checkpointing
        assert not base.training
        assert not any(parameter.requires_grad for parameter in base.parameters())
        assert torch.equal(probe_logits(base, pair, tiny_run.CPU), before_LV)
    assert all(torch.equal(each, bytes_before[name]) for name, each in base.state_dict().items())


def test_the_grid_is_printed_by_a_dry_run(place: Path) -> None:
    told = said(
        "sweep", "r.toml", "--over", "objective.beta=[0.1, 5]", "--over", "train.learning_rate=[1e-5]", "--dry-run"
    )
    assert (told.code, told.err) == (0, "")
    assert told.out.splitlines() == [
        "recipe      r.toml",
        "grid        2 x 1 = 2 runs; the best by loss",
        "output      adapters/r-sweep",
        "  1_beta-0.1_lr-1e-05  objective.beta = 0.1, train.learning_rate = 1e-05",
        "  2_beta-5_lr-1e-05    objective.beta = 5, train.learning_rate = 1e-05",
    ]


def test_the_table_dpo_of_other_tools_is_objective_on_the_command_line(place: Path) -> None:
    told = said("train", "r.toml", "--set", "dpo.beta=0.2", "--set", "dpo.beta=0.25", "--dry-run")
    assert (told.code, told.err) == (0, "dpo.beta: read as objective.beta\n")
    assert "sigmoid DPO, beta 0.25;" in told.out


SHARED = "a sweep has one base and one set of pairs for all its runs, and this key "


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "a sweep needs a key with several values: --over objective.beta=[0.05, 0.1, 0.3]"),
        (["lora.r"], "--over lora.r: write TABLE.KEY=[VALUE, VALUE], as in --over lora.r=[8, 16]"),
        (["lora.r=8"], "--over lora.r=8: must be a list that is not empty: --over lora.r=[8]"),
        (["lora.r=[8, 8]"], "--over lora.r=[8, 8]: has the value 8 twice; leave one out"),
        (["lora.r=[8]", "lora.r=[4]"], "--over lora.r: is given twice; write all its values in one list"),
        (["lora.rr=[8]"], "--over lora.rr: a recipe has no such key; did you mean lora.r?"),
        (["beta=[0.1]"], "--over beta: a recipe has no such key; did you mean objective.beta?"),
        (["xyzzy=[8]"], "--over xyzzy: a recipe has no such key; write TABLE.KEY"),
        (
            ["train.optim=[sgd]"],
            "--over train.optim=[sgd]: the values are not valid TOML: Invalid value (at line 1, column 10); write a "
            "list, strings in double quotes",
        ),
        (["lora.r=[8.0]"], "--over lora.r=8.0: lora.r is 8.0; it must be a whole number"),
        (["dpo.beta=[0.1, -1]"], "--over objective.beta=-1: objective.beta is -1; it must be greater than 0.0"),
        (
            ["model.name=['a', 'b']"],
            f"--over model.name: {SHARED}would need another base; leave it out, or begin a sweep for each value: --set "
            "model.name=VALUE -o DIR",
        ),
        (
            ["data.max_length=[128, 256]"],
            f"--over data.max_length: {SHARED}would need other pairs, held-out ones too, and figures of different "
            "pairs cannot be compared; leave it out, or begin a sweep for each value: --set data.max_length=VALUE "
            "-o DIR",
        ),
        (
            ["train.seed=[1, 2]", "--set", "data.max_eval_samples=2"],
            "--over train.seed: pairs are drawn with it here (data.max_train_samples, data.max_eval_samples, "
            "max_samples or weight in [[data.mix]]), so each run would have others; leave out those keys, or begin a "
            "sweep for each seed: --set train.seed=VALUE -o DIR",
        ),
        (["lora.r=[8, 16]", "--set", "lora.r=4"], "lora.r: stands in --set and in --over; leave one out"),
        (
            ["lora.r=[8, 16]", "--set", "train.engine=trl"],
            'train.engine is "trl", which wants a base loaded anew for each run; sweep with "qlora_dpo", or see '
            "docs/sweeps.md for one process a run",
        ),
        (
            ["lora.r=[8]", "--metric", "bleu"],
            "--metric bleu: is not measured at an evaluation; write one of loss, preference_loss, sft_loss, "
            "rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected, "
            "logits/chosen, logits/rejected, entropy, mean_token_accuracy, perplexity, kl",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_loaded(
    options: list[str], sentence: str, place: Path
) -> None:
    at = next((number for number, word in enumerate(options) if word.startswith("--")), len(options))
    over = [word for each in options[:at] for word in ("--over", each)]
    told = said("sweep", "r.toml", *over, *options[at:], "-o", "refused")
    assert (told.code, told.out, told.err.splitlines()[-1]) == (2, "", f"qlora-dpo: {sentence}")
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    ("made", "resume", "sentence"),
    [
        ("adapters", [], "is not empty; name another folder with -o DIR, or remove it"),
        ("adapters", ["--resume"], "holds no sweep to go on with; begin it without --resume"),
        ("r.toml", [], "is a file; name a new folder with -o DIR"),
    ],
)
def test_a_folder_that_holds_something_else_is_left_alone(
    made: str, resume: list[str], sentence: str, alone: Path
) -> None:
    told = said("sweep", "r.toml", "--over", "lora.r=[8]", "-o", made, *resume)
    assert (told.code, told.err.splitlines()[-1]) == (1, f"qlora-dpo: {made}: {sentence}")


def test_names_of_points_fit_a_folder_and_stay_apart() -> None:
    over = parse_axes(['lora.target_modules=["all-linear", ["q_proj", "v_proj"]]', "train.learning_rate=[1e30, 1e-30]"])
    values = [{over[0].key: one, over[1].key: other} for one in over[0].values for other in over[1].values]
    assert name_points(over, values)[::3] == ["1_modules-all-linear_lr-1e30", "4_modules-q-proj-v-proj_lr-1e-30"]
    long = parse_axes([f"lora.layers_to_transform=[{list(range(40))}, {list(range(41))}]"])
    names = name_points(long, [{long[0].key: value} for value in long[0].values])
    assert ([len(name) <= 64 for name in names], len(set(names))) == ([True, True], 2)


def test_best_and_second_are_told_apart_by_their_intervals() -> None:
    def evaluated(accuracy: float, loss: float, pairs: int = 400) -> dict[str, float]:
        figures = {"eval_rewards/accuracies": accuracy, "eval_loss": loss, "eval_loss_stderr": 0.02}
        return {**figures, "eval_pairs": pairs}

    apart = {"a": evaluated(0.84, 0.4), "b": evaluated(0.65, 0.43)}
    optimistic = (
        "it was chosen among 2 runs on these same pairs, so its figure is optimistic; evaluate it on others: "
        "qlora-dpo eval s/a --data FILE"
    )
    assert list(ranking_caveats(apart, "rewards/accuracies", ["objective.beta"], "s/a")) == [optimistic]
    assert list(ranking_caveats(apart, "loss", ["lora.r"], "s/a")) == [
        "400 pairs cannot tell it apart from the second, b: the 95 % intervals of their losses overlap (0.361-0.439 "
        "and 0.391-0.469)",
        optimistic,
    ]
    few = {"a": evaluated(0.84, 0.4, pairs=25), "b": evaluated(0.64, 0.43, pairs=25)}
    # Wilson's intervals of 21 and of 16 among 25
    assert next(ranking_caveats(few, "rewards/accuracies", [], "s/a")) == (
        "25 pairs cannot tell it apart from the second, b: the 95 % intervals of their accuracies overlap (0.653-0.936 "
        "and 0.445-0.798)"
    )
    assert list(ranking_caveats({"a": evaluated(0.84, 0.4)}, "loss", ["lora.r"], "s/a")) == []


@pytest.mark.parametrize(
    ("metric", "swept_keys", "told"),
    [
        (
            "loss",
            ["objective.sft_weight"],
            ("loss depends on objective.sft_weight, which", "--metric preference_loss can"),
        ),
        ("preference_loss", ["objective.sft_weight"], None),
        (
            "preference_loss",
            ["objective.beta", "objective.sft_weight"],
            ("preference_loss depends on objective.beta, which", "--metric rewards/accuracies can"),
        ),
        (
            "loss",
            ["objective.beta", "objective.sft_weight"],
            ("loss depends on objective.beta and objective.sft_weight, which", "--metric rewards/accuracies can"),
        ),
    ],
)
def test_runs_of_other_objectives_are_ranked_by_what_these_do_not_change(
    metric: str, swept_keys: list[str], told: tuple[str, str] | None
) -> None:
    """A preference loss leaves the SFT term out, so its weight does not change what is compared."""
    caveats = list(ranking_caveats({"a": {}}, metric, swept_keys, "s/a"))
    assert bool(caveats) == bool(told)
    if told:
        assert caveats[0].startswith(told[0])
        assert caveats[0].endswith(f"so it cannot rank them fairly; {told[1]}")


def test_a_probe_has_short_runs_and_writes_the_whole_recipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "INTERIM_EVAL_PAIRS", 3)
    rates = "train.learning_rate=[1e-4, 1e-2, 1e-3]"
    mine = ("--set", "train.batch_size=2", "--set", "data.max_eval_samples=600", "--set", "samples.max_new_tokens=4")
    mine += ("--set", "train.eval_steps=4", "--set", "objective.beta=0.37")  # an evaluation that no other test has made
    done = said("sweep", "r.toml", "--probe", "--over", rates, *mine, "-o", "probe")
    assert done.code == 0, done.err
    assert "the best by preference_loss" in done.err
    resolved = tomllib.loads((place / "probe" / "1_lr-0.0001" / "resolved.toml").read_text())
    assert resolved["train"]["max_steps"] == 100
    assert "train.eval_steps=50" in probe.probe_overrides(tiny_run.recipe(train={"batch_size": 2}), ())
    assert resolved["watch"]["stop"] == ["kl", "likelihood_displacement"]
    assert (resolved["data"]["max_eval_samples"], resolved["samples"]["max_new_tokens"]) == (200, 4)
    best = tomllib.loads((place / "probe/best.toml").read_text())
    results = json.loads((place / "probe/sweep.json").read_text())
    finished = {entry["figure"]: entry for entry in results["points"] if entry["state"] == "finished"}
    chosen = finished[min(finished)]["set"]["train.learning_rate"]
    assert best["train"]["learning_rate"] == chosen
    assert best["train"]["batch_size"] == 2
    assert "max_steps" not in best["train"]
    assert best["data"]["max_eval_samples"] == 600
    assert best["samples"]["prompts"] == 1
    table = [line for line in done.out.splitlines() if line.startswith("train.learning_rate = ")]
    assert len(table) == 3
    starts = [record(place / "probe" / entry["name"], "results.json")["evals"][0] for entry in finished.values()]
    made_once = [start.pop("seconds") for start in starts]
    assert sorted(bool(seconds) for seconds in made_once) == [False, False, True]
    assert starts[0] == starts[1] == starts[2]
    evals = record(place / "probe" / "1_lr-0.0001", "results.json")["evals"]
    assert [(each["step"], each["eval_pairs"]) for each in evals] == [(0, 4), (4, 3), (8, 4)]
    at_the_end = f"train.learning_rate = {chosen:g} is the" in done.out
    assert at_the_end == (chosen in (1e-4, 1e-2))
    assert "qlora-dpo train probe/best.toml   # all of its pairs" in done.out


def test_a_probe_of_a_key_without_values_is_told_which_have_some(place: Path) -> None:
    done = said("sweep", "r.toml", "--probe", "train.learning_rate,lora.r", "-o", "none")
    assert (done.code, done.err.splitlines()[-1]) == (
        2,
        "qlora-dpo: --probe lora.r: has no values of its own; train.learning_rate and objective.beta have, and --over "
        "lora.r=[VALUE, ...] names them for another key",
    )
    plan = said("sweep", "r.toml", "--probe", "train.learning_rate,objective.beta", "--dry-run")
    assert "6 x 3 = 18 runs" in plan.out
