"""Every key of a recipe changes something that a user can see: what is learned, measured, written or said."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import commands_in_process
import pytest
import tiny
import tiny_run
import torch
import varied_model
from accelerate.state import AcceleratorState
from cli_sandbox import rows
from peft import PeftModel

from qlora_dpo.preference.objective import LossColumns
from qlora_dpo.preference.reference import compute_reference_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.preference.token_weights import make_token_weighting
from qlora_dpo.recipe.objective import OBJECTIVE_TABLES, loss_types
from qlora_dpo.recipe.reference import REFERENCE_TABLES
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training import loop
from qlora_dpo.training.context import PreferenceDataset
from qlora_dpo.training.loop import train_loop

pytestmark = tiny_run.LIBRARIES_WARN
TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Change:
    """What a key is set to, beside what, and which of the runs it is compared with has the same beside it."""

    value: str
    beside: tuple[str, ...] = ()


CHANGES: dict[str, Change] = {
    "model.name": Change('"./other-model"'),
    "model.quantization": Change('"nf4"'),
    "model.double_quant": Change("false", ('model.quantization="nf4"',)),
    "model.dtype": Change('"bf16"'),
    "model.chat_template": Change('"plain"'),
    "model.chat_template_kwargs": Change('{ mood = "Well: " }', ('model.chat_template="./own.jinja"',)),
    "lora.r": Change("4"),
    "lora.lora_alpha": Change("64"),
    "lora.lora_dropout": Change("0.5"),
    "lora.target_modules": Change('["q_proj"]'),
    "lora.exclude_modules": Change('["q_proj"]'),
    "lora.layers_to_transform": Change("[0]", ('lora.target_modules=["q_proj", "v_proj"]',)),
    "lora.rank_pattern": Change("{ q_proj = 3 }"),
    "lora.alpha_pattern": Change("{ q_proj = 99 }"),
    "lora.use_rslora": Change("true"),
    "lora.use_dora": Change("true"),
    "lora.loraplus_lr_ratio": Change("16.0"),
    "lora.init_lora_weights": Change('"gaussian"'),
    "lora.modules_to_save": Change('["norm"]'),
    "lora.init_from": Change('"./started"', ("lora.r=4",)),
    "data.train": Change('"./other.jsonl"'),
    "data.train_split": Change('"extra"', ('data.train="./folder"',)),
    "data.eval": Change('"./other.jsonl"'),
    "data.eval_share": Change("0.5"),
    "data.eval_split": Change('"extra"', ('data.train="./folder"',)),
    "data.format": Change('"strings"'),
    "data.columns": Change('{ chosen = "rejected", rejected = "chosen" }'),
    "data.ranked_pairs": Change('"best_worst"', ('data.train="./ranked.jsonl"',)),
    "data.max_length": Change("100"),
    "data.overlong": Change('"cut_prompt"', ("data.max_length=100",)),
    "data.max_bad_share": Change("1.0", ('data.train="./bad.jsonl"',)),
    "data.max_train_samples": Change("8"),
    "data.max_eval_samples": Change("2"),
    "train.engine": Change('"trl"'),
    "train.optim": Change('"sgd"'),
    "train.learning_rate": Change("1e-2"),
    "train.lr_scheduler_type": Change('"cosine"', ("train.max_steps=4",)),
    "train.warmup_steps": Change("2"),
    "train.weight_decay": Change("0.5"),
    "train.max_grad_norm": Change("1e-6"),
    "train.batch_size": Change("2"),
    "train.micro_batch_tokens": Change("100"),
    "train.num_train_epochs": Change("2", ("train.max_steps=10",)),
    "train.max_steps": Change("1"),
    "train.gradient_checkpointing": Change("true"),
    "train.seed": Change("7"),
    "train.logging_steps": Change("1", ("train.max_steps=4",)),
    "train.eval_steps": Change("1"),
    "train.save_steps": Change("1"),
    "train.metric_for_best_model": Change('"kl"', ("train.eval_steps=1",)),
    "train.load_best_model_at_end": Change("true", ("train.eval_steps=1", 'train.metric_for_best_model="kl"')),
    "train.early_stopping_patience": Change("1", ("train.eval_steps=1", 'train.metric_for_best_model="kl"')),
    "watch.stop": Change('["stuck"]', ("train.learning_rate=1e-12", "train.eval_steps=1")),
    "samples.prompts": Change("1"),
    "samples.max_new_tokens": Change("2", ("samples.prompts=1",)),
    "samples.at_evaluations": Change("1", ("samples.prompts=1",)),
    "samples.group_by": Change('"kind"', ("samples.prompts=1",)),
    "samples.count_matching": Change('"e"', ("samples.prompts=1",)),
    "reference.path": Change('"./other-start"', ("lora.r=4", 'reference.kind="adapter"', 'reference.path="./started"')),
    "reference.name": Change('"./model"', ('reference.kind="model"', 'reference.name="./other-model"')),
    "reference.quantization": Change(
        '"none"', ('reference.kind="model"', 'reference.name="./other-model"', 'reference.quantization="nf4"')
    ),
    "reference.ref_model_mixup_alpha": Change("0.1", ('reference.kind="ema"', "reference.ref_model_sync_steps=1")),
    "reference.ref_model_sync_steps": Change("2", ('reference.kind="ema"', "reference.ref_model_sync_steps=1")),
    "objective.weight_column": Change('"weight"'),
    "objective.margin_column": Change('"margin"'),
    "objective.score_columns": Change(
        '["margin", "weight"]', ('objective.loss_type="odpo"', 'objective.score_columns=["weight", "margin"]')
    ),
}

ELSEWHERE = {
    "model.revision": ("model/test_model_sources.py", "revision"),
    "model.sha256": ("model/test_model_sources.py", "sha256"),
    "data.mix": ("data/test_mixture.py", "data.mix"),
    "data.answer": ("data/test_layouts.py", 'answer="from_difference"'),
    "data.train_on": ("data/test_supervised.py", 'train_on="last"'),
    "data.config": ("data/test_mixture.py", "config"),
    "data.data_dir": ("data/test_mixture.py", "data_dir"),
    "data.revision": ("data/test_sources.py", "revision"),
    "reference.revision": ("model/test_model_sources.py", "revision"),
    "reference.sha256": ("model/test_model_sources.py", "sha256"),
    "track.wandb": ("tracking/test_run_log.py", "wandb"),
    "track.tensorboard": ("tracking/test_trackers.py", "tensorboard"),
    "track.trackio": ("tracking/test_trackers.py", "trackio"),
}
"""Keys that need a hub, a package index, a GPU or a service, or rows of their own, and the tests that have these."""


def every_key() -> list[str]:
    """All keys of a recipe but those of losses, and those of losses that name columns of the data."""
    tables = tiny_run.recipe(track={"wandb": "project"}).model_dump()
    plain = [f"{name}.{key}" for name, keys in tables.items() if name not in ("objective", "reference") for key in keys]
    references = {f"reference.{key}" for table in REFERENCE_TABLES for key in table.model_fields if key != "kind"}
    return [*plain, *sorted(references), *(key for key in CHANGES if key.startswith("objective."))]


RECIPE = """
[model]
name = "./model"
quantization = "none"
dtype = "fp32"
[lora]
r = 2
[data]
train = "./pairs.jsonl"
[train]
batch_size = 4
learning_rate = 1e-3
max_steps = 2
logging_steps = 2
[samples]
prompts = 0
max_new_tokens = 4
"""

NOTHING = ("train.max_steps=2", "train.logging_steps=2")
"""Settings that the recipe has already: such a run proves that nothing else tells two runs apart."""

TIMES = re.compile(r"pairs_per_second|tokens_per_second|seconds|memory_bytes")


def written(folder: Path) -> dict[str, Any]:
    """What a run left behind, without its recipe and without what time and memory it took."""
    if not (folder / "results.json").is_file():
        return {}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    audit = json.loads((folder / "audit.json").read_text())
    return {
        "adapter": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "metrics": [{k: v for k, v in each.items() if not TIMES.fullmatch(k)} for each in records],
        "results": {key: value for key, value in results.items() if key not in ("seconds", "evals")},
        "audit": audit,
        "samples": (folder / "samples.jsonl").read_text(),
        "files": sorted(each.name for each in folder.iterdir()),
        "checkpoints": sorted(each.name for each in folder.glob("checkpoints/*")),
    }


def said(text: str) -> list[str]:
    """What a run says of its decisions, without paces, free memory, and the plan, which repeats the recipe."""
    lines = re.sub(r"[\d.]+ GiB are free", "some is free", text.split("reading base and data", 1)[-1]).splitlines()
    return [line for line in lines if line.startswith(("layout", "memory: a", "lora:", "qlora-dpo:", "engine"))]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, ...], Any]]:
    """What each run of `CHANGES`, and each that it is compared with, shows; by its settings."""
    place = tmp_path_factory.mktemp("keys")
    for name, seed in (("model", 0), ("other-model", 1)):
        varied_model.qwen2(seed).save_pretrained(place / name)
        tiny.tokenizer().save_pretrained(place / name)
    made = [{**row, "weight": 1 + i % 3, "margin": (i % 2) / 2, "kind": "ab"[i % 2]} for i, row in enumerate(rows(40))]
    other = [{**row, "weight": 1, "margin": 0, "kind": "c"} for row in rows(24, 40)]
    ranked = [
        {"prompt": row["prompt"], "responses": ["Yes.", "No.", "It depends."], "ranks": [1, 2, 3]} for row in rows(12)
    ]
    bad = [{**row, "rejected": row["chosen"]} if i == 3 else row for i, row in enumerate(made)]
    (place / "folder").mkdir()
    files = {"pairs": made, "other": other, "ranked": ranked, "bad": bad}
    folder = {"folder/train": made[:24], "folder/test": other[:8], "folder/extra": other[8:]}
    for name, content in {**files, **folder}.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (place / "base.toml").write_text(RECIPE)
    (place / "own.jinja").write_text("{{ mood }}" + tiny.CHATML)
    starts = [
        ["train", "base.toml", "-o", name, "--max-steps=1", "--set", "lora.r=4", "--set", f"train.seed={seed}"]
        for name, seed in (("started", 1), ("other-start", 2))
    ]
    runs = list(
        dict.fromkeys(
            settings
            for key, change in CHANGES.items()
            for settings in (change.beside, (*change.beside, f"{key}={change.value}"))
        )
    )
    runs.append(NOTHING)
    commands = [
        ["train", "base.toml", "-o", f"adapters/run-{i}", *(part for each in run for part in ("--set", each))]
        for i, run in enumerate(runs)
    ]
    environment = commands_in_process.here(QLORA_DPO_CACHE=str(place / "cache"))
    found = commands_in_process.said([*starts, *commands], place, environment)[len(starts) :]
    yield {
        run: {"code": each.code, "said": said(each.err), "error": each.err if each.code not in (0, 3) else ""}
        | written(place / f"adapters/run-{i}")
        for i, (run, each) in enumerate(zip(runs, found, strict=True))
    }


def test_every_key_has_a_change_here_or_a_test_elsewhere() -> None:
    assert sorted({*CHANGES, *ELSEWHERE}) == sorted({*every_key(), *ELSEWHERE})
    assert not CHANGES.keys() & ELSEWHERE.keys()
    for key, (file, word) in ELSEWHERE.items():
        assert word in (TESTS / file).read_text(), key


def test_what_changes_nothing_shows_the_same(seen: dict[tuple[str, ...], Any]) -> None:
    assert seen[NOTHING] == seen[()]


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_changes_something(key: str, seen: dict[tuple[str, ...], Any]) -> None:
    change = CHANGES[key]
    before, after = seen[change.beside], seen[(*change.beside, f"{key}={change.value}")]
    may_fail = key in ("data.format", "data.max_bad_share", "watch.stop")
    assert (before["error"], after["error"]) == ("", "") or may_fail, (before["error"], after["error"])
    assert before != after


# --- the keys of losses, whose runs need no command

VALUES: dict[str, Any] = {
    "beta": 0.7,
    "sft_weight": 0.9,
    "use_weighting": True,
    "ld_alpha": 0.2,
    "label_smoothing": 0.3,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.3,
    "discopop_tau": 2.0,
    "dpop_lambda": 300.0,
    "length_alpha": 0.9,
    "odpo_alpha": 0.1,
    "beta_alpha": 5.0,
    "beta_momentum": 0.1,
    "loss_weights": {"hinge": 0.5, "ipo": 0.5},
    "simpo_gamma": 3.0,
    "alphapo_alpha": 0.9,
    "desirable_weight": 3.0,
    "undesirable_weight": 3.0,
}
BESIDE: dict[str, dict[str, Any]] = {"f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"}}
NEEDED: dict[str, dict[str, Any]] = {
    "robust": {"label_smoothing": 0.1},
    "sum": {"loss_weights": {"sigmoid": 0.8, "bco_pair": 0.2}},
    "odpo": {"score_columns": ["better", "worse"]},
}


def keys_of_losses() -> list[tuple[str, str]]:
    """Losses with each of their keys that names no column."""
    return [
        (loss, key)
        for table in OBJECTIVE_TABLES
        for key in table.model_fields
        if key != "loss_type" and not key.endswith(("_column", "_columns"))
        # losses of one table differ in what they make of beta, and read the other keys in the same place
        for loss in (loss_types(table) if key == "beta" else loss_types(table)[:1])
    ]


def learned(folder: Path, **objective: Any) -> torch.Tensor:
    """The adapter after two steps with one objective, in one vector."""
    AcceleratorState._reset_state(True)
    what = tiny_run.recipe(objective=objective, train={"max_steps": 2, "learning_rate": 1e-2})
    model: PeftModel = tiny_run.stirred(tiny_run.fresh(what))
    folder.mkdir()
    job = tiny_run.job(model, what, folder, train=8, heldout=2)
    packing, sides = replace(job.packing, token_weighting=make_token_weighting(what.objective)), []
    generator = torch.Generator().manual_seed(0)
    for seed, count in ((0, 8), (1, 2)):
        pairs = tiny_run.pairs(count, seed)
        scores_P2 = torch.rand(count, 2, generator=generator).sort(1, descending=True).values
        label_P = torch.arange(count) % 2 == 0 if what.objective.loss_type == "kto" else None
        store = ReferenceLogpCache(folder / f"of-{seed}")
        sides.append(
            PreferenceDataset(
                pairs,
                compute_reference_logps(model, pairs, store, packing, tiny_run.CPU),
                LossColumns(None, None, scores_P2, label_P),
            )
        )
    job = replace(job, packing=packing, train=sides[0], heldout=sides[1])
    with RunLog(folder, job.data_order.total_steps) as tracker, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_evaluation", lambda *some: None)  # most of the time, and it changes no weight
        train_loop(model, job, tiny_run.start(job), tracker)
    return torch.cat([value.flatten() for value in tiny_run.adapter(model).values()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The adapter of a loss with its defaults, trained once."""
    known: dict[str, torch.Tensor] = {}

    def find(loss: str, **beside: Any) -> torch.Tensor:
        name = json.dumps([loss, beside])
        if name not in known:
            folder = tmp_path_factory.mktemp("plain") / "run"
            known[name] = learned(folder, loss_type=loss, **NEEDED.get(loss, {}), **beside)
        return known[name]

    return find


@pytest.mark.parametrize(("loss", "key"), keys_of_losses())
def test_a_key_of_a_loss_changes_what_is_learned(loss: str, key: str, plain: Any, tmp_path: Path) -> None:
    beside = BESIDE.get(key, {})
    changed = {"loss_type": loss, **NEEDED.get(loss, {}), **beside, key: VALUES[key]}
    assert not torch.equal(learned(tmp_path / "run", **changed), plain(loss, **beside))
