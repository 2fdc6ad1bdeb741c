"""Kinds of LoRA and optimizers: each leaves the base the reference, trains, resumes, reopens and merges."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from qlora_dpo import adapter, run_folder
from qlora_dpo.deploy import merge as merging
from qlora_dpo.errors import Interrupted, RecipeError
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora, trainable_parameters
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.preference.start_checks import check_adapter_off_is_base, probe_logits
from qlora_dpo.recipe.recipe import LoadedRecipe
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.loop import train_loop

pytestmark = [tiny_run.LIBRARIES_WARN, pytest.mark.filterwarnings("ignore::UserWarning")]

KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks by module": {"rank_pattern": {"q_proj": 8, "down_proj": 2}, "alpha_pattern": {"q_proj": 2}},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    "a list": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "all but one": {"exclude_modules": ["gate_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "LoRA+": {"loraplus_lr_ratio": 8.0},
    "dropout": {"lora_dropout": 0.2},
}


@pytest.fixture(autouse=True)
def accelerate_forgets() -> None:
    """Each run is its own process in real life; accelerate keeps its settings for the life of one."""
    disable_progress_bar()
    AcceleratorState._reset_state(True)


def attached(what: Any) -> Any:
    """Base and adapter of a recipe; it is proved that the adapter changes nothing yet."""
    base = tiny_run.base_model(what.model.quantization)
    pair = tiny_run.pairs(1, seed=5)[0]
    before_LV = probe_logits(base, pair, tiny_run.CPU)
    model = attach_lora(base, what.lora, what.train.seed)
    fuse_lora(model, tiny_run.CPU.torch_dtype)
    check_adapter_off_is_base(model, before_LV, pair, tiny_run.PACKED, tiny_run.CPU)
    return model


def trained(what: Any, folder: Path, resume: Path | None = None, stop_at: int = 0) -> Any:
    AcceleratorState._reset_state(True)
    folder.mkdir(exist_ok=True)
    model = attached(what)
    job = tiny_run.job(model, what, folder)
    tracker = RunLog(folder, job.data_order.total_steps)
    said = tracker.step

    def step(number: int) -> None:
        said(number)
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    tracker.step = step  # type: ignore[method-assign]
    with tracker:
        train_loop(model, job, tiny_run.start(job), tracker, resume)
    return model.eval()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains_reopens_and_merges(kind: str, quantization: str, tmp_path: Path) -> None:
    what = tiny_run.recipe(quantization, lora={"r": 4, "lora_alpha": 8, **KINDS[kind]}, train={"max_steps": 3})
    model = trained(what, tmp_path / "run")
    moved = [
        name for name, each in trainable_parameters(model).items() if "lora_B" in name and float(each.abs().max()) > 0
    ]
    assert moved
    ids = torch.tensor([tiny_run.pairs(1, seed=7)[0].prompt])
    expected = model(input_ids=ids, use_cache=False).logits
    folder = tmp_path / "saved"
    loaded = LoadedRecipe(what, tmp_path / "saved.toml", "# the recipe\n")
    run_folder.init_run_folder(folder, loaded, resume=False)
    adapter.save_adapter(folder, model, load_tokenizer(tiny_run.source()), tiny_run.source())
    (folder / "run.json").write_text(
        json.dumps({"name": "saved", "base": {"fingerprint": tiny_run.source().fingerprint}})
    )
    opened = merging.open_for_merge(folder)
    torch.testing.assert_close(opened.model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    merging.merge_adapter(opened, tmp_path / "merged", "trained", "fp32", lambda written: {**FIGURES, "kl": 0.0})
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(full(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


FIGURES = {
    "top1": 1.0,
    "trained_accuracy": None,
    "merged_accuracy": None,
    "why_no_accuracy": "not asked for",
    "tokens": 1,
    "measured_on": "nothing",
    "computed_in": "nothing",
}


def test_targets_are_those_that_were_named() -> None:
    def layers(**keys: Any) -> set[str]:
        model = attached(tiny_run.recipe("nf4", lora=keys))
        names = {name.partition(".lora_A")[0] for name in trainable_parameters(model) if "lora_A" in name}
        return {name.removeprefix("base_model.model.model.layers.") for name in names}

    everything = layers()
    assert len(everything) == 14
    assert layers(exclude_modules=["gate_proj"]) == {name for name in everything if "gate_proj" not in name}
    assert layers(target_modules=["q_proj"], layers_to_transform=[1]) == {"1.self_attn.q_proj"}
    assert layers(target_modules=r".*\.0\.mlp\..*_proj") == {name for name in everything if name.startswith("0.mlp.")}


def test_lora_plus_moves_lora_b_more(tmp_path: Path) -> None:
    once = trained(tiny_run.recipe(train={"max_steps": 1}), tmp_path / "plain")
    plus = trained(tiny_run.recipe(lora={"loraplus_lr_ratio": 8.0}, train={"max_steps": 1}), tmp_path / "plus")
    for part, ratio in (("lora_A", 1.0), ("lora_B", 8.0)):
        (one, other), start = (
            (tiny_run.adapter(once), tiny_run.adapter(plus)),
            tiny_run.adapter(attached(tiny_run.recipe())),
        )
        name = next(name for name in one if part in name)
        if part == "lora_B":
            assert torch.allclose(other[name] - start[name], ratio * (one[name] - start[name]), rtol=1e-3, atol=1e-9)
        else:
            assert torch.equal(other[name], one[name])


def test_patterns_give_modules_their_own_rank_and_scale() -> None:
    model = attached(tiny_run.recipe(lora={"r": 4, "lora_alpha": 8, **KINDS["ranks by module"]}))
    ranks = {
        name.split(".")[-4]: each.shape[0] for name, each in trainable_parameters(model).items() if "lora_A" in name
    }
    assert ranks["q_proj"] == 8 and ranks["down_proj"] == 2 and ranks["k_proj"] == 4
    layers = {name.rpartition(".")[2]: each for name, each in model.named_modules() if isinstance(each, LoraLayer)}
    scales = {name: layer.scaling["default"] for name, layer in layers.items()}
    assert (scales["q_proj"], scales["k_proj"]) == (2 / 8, 8 / 4)


SCHEDULES = ("linear", "cosine_with_restarts", "polynomial", "inverse_sqrt")
ONCE = [*(("adamw_torch", schedule) for schedule in SCHEDULES), ("adafactor", "linear"), ("sgd", "polynomial")]
"""Cases in which each optimizer and each schedule stands; the others are slow."""
OTHERS = [
    (optim, schedule) for optim in ("adafactor", "sgd") for schedule in SCHEDULES if (optim, schedule) not in ONCE
]


@pytest.mark.parametrize(
    ("optim", "schedule"), [*ONCE, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)]
)
def test_every_optimizer_and_schedule_resumes_to_the_same_bytes(optim: str, schedule: str, tmp_path: Path) -> None:
    steps = {
        "optim": optim,
        "lr_scheduler_type": schedule,
        "warmup_steps": 1,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
    }
    what = tiny_run.recipe("nf4", train=steps, lora={"loraplus_lr_ratio": 2.0})
    whole = tiny_run.adapter(trained(what, tmp_path / "whole"))
    start = tiny_run.adapter(attached(what))
    assert any(not torch.equal(whole[name], start[name]) for name in whole)
    with pytest.raises(Interrupted):
        trained(what, tmp_path / "part", stop_at=3)
    resumed = tiny_run.adapter(trained(what, tmp_path / "part", resume=newest_valid(tmp_path / "part")[0]))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_of_a_gpu_are_refused_on_a_cpu(optim: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        trained(tiny_run.recipe(train={"optim": optim}), tmp_path / "run")
    assert str(error.value) == (
        f'train.optim = "{optim}" needs a CUDA GPU; on this CPU choose "adamw_torch", "adafactor" or "sgd"'
    )
