"""Families of models whose layers are unusual: their plan, their adapters, and what they compute in training."""

import json
import math
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import tiny_run
import torch
from torch import nn

from qlora_dpo.cli.text import memory_text
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model import sources
from qlora_dpo.model.base import disable_dropout, load_base
from qlora_dpo.model.decoder_layers import set_gradient_checkpointing
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.model.quantized import stacked_weights
from qlora_dpo.planning.memory_estimate import estimate_memory
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import dpo
from qlora_dpo.preference.pack import collate
from qlora_dpo.preference.reference import model_logps
from qlora_dpo.preference.start_checks import check_training_mode, probe_logits
from qlora_dpo.recipe.model import LoraTable, ModelTable
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training import run
from qlora_dpo.training.memory.workload import Workload
from qlora_dpo.training.prepare import prepare_data

pytestmark = tiny_run.LIBRARIES_WARN

IDS = torch.arange(3, 43)[None]
UNPLANNED = {
    "Mixtral": "RuntimeError: Expected inputs of BF16 type but got mat_a.dtype=torch.float32 and "
    "mat_b.dtype=torch.float32",
}


def saved(kind: str, folder: Path) -> Path:
    base = architectures.family(kind, vocab_size=400)
    base.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", UNPLANNED)
def test_a_plan_that_cannot_be_made_says_so_in_a_line(kind: str, tmp_path: Path) -> None:
    source = sources.fetch_model(ModelTable(name=str(saved(kind, tmp_path))))
    plan = estimate_memory(source, tiny_run.recipe(), tiny_run.CPU, Workload(24, 100), 2**33)
    assert plan.fits
    assert plan.unplanned_reason == f"its layers cannot be run without weights ({UNPLANNED[kind]})"
    line = f"a step cannot be planned, since {plan.unplanned_reason}; a run measures it on the loaded model"
    assert line in memory_text.memory_lines(plan)
    assert memory_text.memory_line(plan).endswith(f"; {line}")
    assert not any("activations" in part for part in plan.bytes_by_part)
    assert not estimate_memory(source, tiny_run.recipe(), tiny_run.CPU, Workload(24, 100), 2**20).fits


def test_where_packed_rows_fail_the_plan_is_that_of_padded_batches(tmp_path: Path) -> None:
    source = sources.fetch_model(ModelTable(name=str(saved("DeepseekV3", tmp_path / "packed"))))
    plan = estimate_memory(source, tiny_run.recipe(), tiny_run.CPU, Workload(24, 100), 2**33)
    assert (plan.padding_reason, plan.unplanned_reason) == ("", "")
    sinks = sources.fetch_model(ModelTable(name=str(saved("GptOss", tmp_path / "padded"))))
    plan = estimate_memory(sinks, tiny_run.recipe(), tiny_run.CPU, Workload(24, 100), 2**33)
    assert plan.padding_reason == "in packed rows spans fails (ValueError: a layer asks attention for s_aux)"


def test_the_experts_that_4_bits_leave_as_they_are_are_planned_and_said(tmp_path: Path) -> None:
    source = sources.fetch_model(ModelTable(name=str(saved("Qwen3Moe", tmp_path))))
    plan = estimate_memory(source, tiny_run.recipe("nf4"), tiny_run.CPU, Workload(24, 100), 2**33)
    base = load_base(source, ModelTable(name="it", quantization="nf4"), tiny_run.CPU)
    experts = stacked_weights(base)
    assert sorted({name.rpartition(".layers.")[2][2:] for name in experts}) == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
    ]
    assert not stacked_weights(architectures.family("Mamba"))
    size = sum(weight.numel() * 4 for weight in experts.values())
    assert plan.bytes_by_part["weights of experts, not quantized, float32"] == size
    assert size == 2 * 4 * (32 * 32 + 16 * 32) * 4  # layers, experts, their three matrices, bytes


def test_a_run_without_a_plan_measures_its_memory_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"the cat {n}?", "chosen": "on the mat", "rejected": "no"} for n in range(8)]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    what = tiny_run.recipe(
        model={"name": str(saved("Mixtral", tmp_path / "base"))},
        data={"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "max_length": 100},
        train={"micro_batch_tokens": "auto"},
    )
    with RunLog(tmp_path, 2) as log, tiny_run.logged_sentences() as said:
        options, hooks = run.RunOptions(), run.RunHooks()
        result = run.train_prepared(prepare_data(what), tiny_run.CPU, log, options, hooks, None)
    assert result.state.step == 2
    assert "memory: what a token keeps was measured on the loaded model, with one pair" in said
    needs = next(sentence for sentence in said if "a backward pass over" in sentence)
    assert float(needs.split(" needs ")[1].split()[0]) > 0 or "0.0 GiB" in needs


LEFT_OUT = {
    "Llama4Text": ("feed_forward.router",),
    "Phimoe": ("mlp.router",),
    "Mamba": ("mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"),
    "Mamba2": ("mixer.out_proj",),
    "FalconH1": ("mamba.out_proj",),
    "Bamba": ("mamba.out_proj",),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_all_linear_leaves_out_what_cannot_be_adapted_and_says_so(kind: str) -> None:
    base = architectures.family(kind)
    with tiny_run.logged_sentences() as said:
        model = attach_lora(base, LoraTable(r=4), 0)
    left = ", ".join(LEFT_OUT[kind])
    assert said == [f"lora: all-linear leaves out {left}, where an adapter fails or changes nothing"]
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert adapted
    assert not any(name.endswith(LEFT_OUT[kind]) for name in adapted)
    others = [name for name, module in architectures.family(kind).named_modules() if isinstance(module, nn.Linear)]
    wanted = {name for name in others if not name.endswith((*LEFT_OUT[kind], "lm_head"))}
    assert adapted == wanted


@pytest.mark.parametrize(
    ("kind", "names", "sentence"),
    [
        ("Llama4Text", ["q_proj", "router"], "lora.target_modules names feed_forward.router, which chooses experts"),
        ("Mamba", ["out_proj"], "lora.target_modules = ['out_proj'] cannot be adapted: "),
        ("Mamba", ["q_proj"], "lora.target_modules = ['q_proj'] matches no layer; this model has dt_proj, in_proj, "),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(kind: str, names: Any, sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        attach_lora(architectures.family(kind), LoraTable(target_modules=names), 0)
    assert sentence in str(error.value)
    assert "base_layer" not in str(error.value)


NOISY = ("OPT", "GPT2", "GPTBigCode", "SeedOss", "BioGpt", "Falcon", "Starcoder2", "Phi3", "Phimoe")


@pytest.mark.parametrize("kind", NOISY)
def test_the_bases_own_dropout_and_noise_are_off_so_that_the_first_loss_is_ln_2(kind: str) -> None:
    base, pairs = architectures.family(kind), tiny_run.pairs(4)
    before_LV = base(input_ids=IDS).logits
    assert not torch.equal(before_LV, base.train()(input_ids=IDS).logits)
    was_on = disable_dropout(base.eval())
    assert torch.equal(base(input_ids=IDS).logits, before_LV)
    assert was_on
    assert all(rate > 0 for rate in was_on.values())
    assert disable_dropout(base) == {}
    model = attach_lora(base.eval(), LoraTable(r=4), 0)
    before_LV = probe_logits(model, pairs[0], tiny_run.CPU)
    reference_P2 = model_logps(model.eval(), pairs, tiny_run.PADDED, tiny_run.CPU)
    check_training_mode(model, before_LV, pairs[0], tiny_run.CPU)
    for layers in (0, 2):
        set_gradient_checkpointing(model, layers)
        scores = score_batch(model.train(), collate(pairs, tiny_run.PADDED), tiny_run.CPU)
        margin_P = scores.chosen_logp_P - scores.rejected_logp_P - (reference_P2[:, 0] - reference_P2[:, 1])
        assert float(dpo(margin_P.detach(), beta=0.5).mean()) == pytest.approx(math.log(2), abs=1e-6)


def test_loras_own_dropout_stays() -> None:
    base = architectures.family("GPT2")
    disable_dropout(base)
    model = attach_lora(base, LoraTable(r=4, lora_dropout=0.5), 0).train()
    tiny_run.stirred(model).train()
    assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_noise_that_is_not_known_is_refused() -> None:
    base = architectures.made(architectures.CONFIGS["llama"])
    base.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: output + module.training * torch.randn_like(output)
    )
    pair = tiny_run.pairs(1)[0]
    before_LV = probe_logits(base, pair, tiny_run.CPU)
    with pytest.raises(ModelError) as error:
        check_training_mode(attach_lora(base, LoraTable(r=4), 0), before_LV, pair, tiny_run.CPU)
    assert str(error.value) == (
        "in training mode this model computes other logits than in evaluation mode, by dropout or noise of its own "
        "that is not switched off, so the first loss would not be ln 2; name a model of another family"
    )


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_layer_that_adds_to_the_output_of_another_in_place_trains(quantization: str, tmp_path: Path) -> None:
    source = sources.fetch_model(ModelTable(name=str(saved("Falcon", tmp_path))))
    table = ModelTable(name=source.name, quantization=quantization)
    model = attach_lora(load_base(source, table, tiny_run.CPU), LoraTable(r=4), 0)
    disable_dropout(model.get_base_model())
    pairs = tiny_run.pairs(3)
    found = []
    for fused in (False, True):
        if fused:
            fuse_lora(model, torch.float32)
        tiny_run.stirred(model).train().zero_grad()
        score_batch(model, collate(pairs, tiny_run.PADDED), tiny_run.CPU).chosen_logp_P.sum().backward()
        found.append(tiny_run.gradients(model))
    assert tiny_run.apart(*found) < 1e-5
