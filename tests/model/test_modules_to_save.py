"""`lora.modules_to_save`: norms and embeddings as whole trained copies; without the adapter the base is the base."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from saved_adapters import save_base
from stopping_tracker import FIGURES, tracker_that_stops
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from qlora_dpo import adapter, run_folder
from qlora_dpo.adapter_weights import attach_adapter
from qlora_dpo.deploy import merge as merging
from qlora_dpo.errors import Interrupted, RecipeError
from qlora_dpo.model import modules_to_save, sources
from qlora_dpo.model.base import load_base
from qlora_dpo.model.decoder_layers import set_gradient_checkpointing
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import adapter_disabled, attach_lora, trainable_parameters
from qlora_dpo.model.packed import attention
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import collate
from qlora_dpo.preference.start_checks import check_adapter_off_is_base, probe_logits
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.recipe import LoadedRecipe
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.loop import train_loop
from qlora_dpo.training.memory.footprint import measure_footprint
from qlora_dpo.training.memory.row_plan import adapter_bytes
from qlora_dpo.training.memory.workload import Workload
from qlora_dpo.training.optim import create_optimizer

pytestmark = [tiny_run.LIBRARIES_WARN, pytest.mark.filterwarnings("ignore::UserWarning")]

IDS = torch.arange(3, 43)[None]


@pytest.fixture(autouse=True)
def accelerate_forgets() -> None:
    disable_progress_bar()
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A tiny base whose output head has weights of its own."""
    folder = save_base(tmp_path_factory.mktemp("untied") / "base", tied=False)
    return sources.fetch_model(tiny_run.ModelTable(name=str(folder)))


def recipe(source: ModelSource, copied: list[str], quantization: str = "nf4", **train: Any) -> Recipe:
    model = {"name": source.name, "quantization": quantization}
    return tiny_run.recipe(quantization, model=model, lora={"modules_to_save": copied}, train=train)


def attached(source: ModelSource, what: Recipe) -> Any:
    base = load_base(source, what.model, tiny_run.CPU)
    attention.enable_packed_attention(base)
    pair = tiny_run.pairs(1, seed=5)[0]
    before_LV = probe_logits(base, pair, tiny_run.CPU)
    model = attach_lora(base, what.lora, what.train.seed)
    fuse_lora(model, tiny_run.CPU.torch_dtype)
    check_adapter_off_is_base(model, before_LV, pair, tiny_run.PACKED, tiny_run.CPU)
    return model


def trained(source: ModelSource, what: Recipe, folder: Path, resume: Path | None = None, stop_at: int = 0) -> Any:
    AcceleratorState._reset_state(True)
    folder.mkdir(exist_ok=True)
    model = attached(source, what)
    job = tiny_run.job(model, what, folder)
    with tracker_that_stops(folder, job.data_order.total_steps, stop_at) as tracker:
        train_loop(model, job, tiny_run.start(job), tracker, resume)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_copies_train_in_float32_reopen_and_merge_exactly_and_the_base_stays(
    quantization: str, untied: ModelSource, tmp_path: Path
) -> None:
    what = recipe(untied, ["norm", "input_layernorm", "embed_tokens"], quantization, max_steps=3)
    before = logits(load_base(untied, what.model, tiny_run.CPU))
    model = trained(untied, what, tmp_path / "run")
    trained_copies = modules_to_save.trained_copies(model)
    names = ["model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.1.input_layernorm", "model.norm"]
    assert sorted(trained_copies) == names
    for name, copy in trained_copies.items():
        original = model.get_base_model().get_submodule(name).original_module
        assert copy.weight.dtype == torch.float32
        assert not torch.equal(copy.weight, original.weight), name
        assert not original.weight.requires_grad
    expected = logits(model)
    with adapter_disabled(model):
        assert torch.equal(logits(model), before)
    assert float((expected - before).abs().max()) > 1e-3

    folder = tmp_path / "saved"
    run_folder.init_run_folder(folder, LoadedRecipe(what, tmp_path / "saved.toml", "# the recipe\n"), resume=False)
    adapter.save_adapter(folder, model, load_tokenizer(untied), untied)
    (folder / "run.json").write_text(json.dumps({"name": "saved", "base": {"fingerprint": untied.fingerprint}}))
    opened = merging.open_for_merge(folder)
    torch.testing.assert_close(logits(opened.model), expected, rtol=1e-5, atol=1e-5)
    for name, copy in modules_to_save.trained_copies(opened.model).items():
        assert torch.equal(copy.weight, trained_copies[name].weight), name
    merging.merge_adapter(opened, tmp_path / "merged", "trained", "fp32", lambda written: FIGURES)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(full), expected, rtol=1e-4, atol=1e-4)
    for name, copy in trained_copies.items():
        assert torch.equal(full.get_submodule(name).weight, copy.weight), name


def test_peft_alone_opens_them(untied: ModelSource, tmp_path: Path) -> None:
    what = recipe(untied, ["norm"], "none", max_steps=2)
    model = trained(untied, what, tmp_path / "run")
    (tmp_path / "saved").mkdir()
    adapter.save_adapter(tmp_path / "saved", model, load_tokenizer(untied), untied)
    base = AutoModelForCausalLM.from_pretrained(untied.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "saved")), logits(model))


def test_a_resumed_run_has_the_same_bytes(untied: ModelSource, tmp_path: Path) -> None:
    what = recipe(untied, ["post_attention_layernorm", "embed_tokens"], num_train_epochs=2)
    whole = tiny_run.adapter(trained(untied, what, tmp_path / "whole"))
    assert [name for name in whole if "embed_tokens" in name]
    with pytest.raises(Interrupted):
        trained(untied, what, tmp_path / "part", stop_at=3)
    resumed = tiny_run.adapter(trained(untied, what, tmp_path / "part", resume=newest_valid(tmp_path / "part")[0]))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_on_a_16_bit_base_an_untrained_float32_copy_changes_no_bit(untied: ModelSource) -> None:
    """As on a GPU with bf16, whose stream is bf16 too: the copies' outputs keep that dtype."""
    place = tiny_run.device.select_device("bf16")
    base = load_base(untied, tiny_run.ModelTable(name=untied.name, quantization="none"), place).to(torch.bfloat16)
    with place.autocast():
        before = logits(base)
        model = attach_lora(base, recipe(untied, ["norm", "embed_tokens", "input_layernorm"], "none").lora, 42).eval()
        assert {copy.weight.dtype for copy in modules_to_save.trained_copies(model).values()} == {torch.float32}
        assert torch.equal(logits(model), before)
        with adapter_disabled(model):
            assert torch.equal(logits(model), before)


def test_copies_trained_in_float32_are_not_rounded_when_a_16_bit_base_is_opened(
    untied: ModelSource, tmp_path: Path
) -> None:
    model = attached(untied, recipe(untied, ["norm"], "none"))
    (copy,) = modules_to_save.trained_copies(model).values()
    copy.weight.data += 1e-6
    (tmp_path / "saved").mkdir()
    adapter.save_adapter(tmp_path / "saved", model, load_tokenizer(untied), untied)
    table = tiny_run.ModelTable(name=untied.name, quantization="none")
    base = load_base(untied, table, tiny_run.device.select_device("bf16")).to(torch.bfloat16)
    opened = attach_adapter(base, tmp_path / "saved")
    (reopened,) = modules_to_save.trained_copies(opened).values()
    assert torch.equal(reopened.weight, copy.weight)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nrom",
            "nrom, and this model has no such module; it has embed_tokens, input_layernorm, post_attention_layernorm, "
            "norm",
        ),
        ("lm_head", "lm_head, which is the output head or holds it, and the head is not trained here; leave it out"),
        (
            "q_proj",
            "q_proj, which is a linear layer or holds some; they get LoRA, by lora.target_modules; leave it out",
        ),
        ("mlp", "mlp, which is a linear layer or holds some; they get LoRA, by lora.target_modules; leave it out"),
        ("rotary_emb", "rotary_emb, which has no weights to train; leave it out"),
    ],
)
def test_what_cannot_be_a_copy_is_refused(name: str, says: str, untied: ModelSource) -> None:
    with pytest.raises(RecipeError) as raised:
        attached(untied, recipe(untied, ["norm", name]))
    assert str(raised.value) == f"lora.modules_to_save names {says}"


def test_embeddings_that_the_head_shares_are_refused() -> None:
    with pytest.raises(RecipeError) as raised:
        attached(tiny_run.source(), recipe(tiny_run.source(), ["embed_tokens"]))
    assert str(raised.value) == (
        "lora.modules_to_save names embed_tokens, which shares its weights with the output head of this model, and the "
        "head is not trained here; leave it out"
    )


def test_a_foreign_adapter_with_a_head_of_its_own_is_merged_with_that_head(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base", tied=False), dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    theirs = get_peft_model(base, config)
    for parameter in trainable_parameters(theirs).values():
        parameter.data += 0.01
    theirs.save_pretrained(tmp_path / "a")
    opened = merging.open_for_merge(tmp_path / "a")
    merging.merge_adapter(opened, tmp_path / "m", "trained", "fp32", lambda written: FIGURES)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(full), logits(theirs.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("optim", "each"), [("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2)])
def test_gradients_and_moments_of_what_is_trained_are_counted(optim: Any, each: int, untied: ModelSource) -> None:
    """Gradient 4 bytes, AdamW's two moments 4 bytes each or 1 in 8 bits."""
    what = recipe(untied, ["embed_tokens"], optim=optim)
    elements = sum(parameter.numel() for parameter in trainable_parameters(attached(untied, what)).values())
    assert elements > 25_600
    shapes = measure_footprint(untied, what, tiny_run.CPU, Workload(24, 100))
    assert adapter_bytes(shapes, what) == {
        "LoRA, float32": 4 * elements,
        "its gradients, float32": 4 * elements,
        f"optimizer state ({optim})": each * elements,
    }


@pytest.mark.parametrize(("asked", "layers"), [("0-0", {0}), ("0-1", {0, 1}), ([1], {1})])
def test_layers_are_a_list_or_a_range(asked: Any, layers: set[int]) -> None:
    what = tiny_run.recipe(lora={"target_modules": ["q_proj"], "layers_to_transform": asked})
    model = attached(tiny_run.source(), what)
    assert {int(name.split("layers.")[1][0]) for name in trainable_parameters(model)} == layers


@pytest.mark.parametrize("asked", ["1-2", [0, 2]])
def test_layers_that_the_model_does_not_have_are_refused(asked: Any) -> None:
    with pytest.raises(RecipeError) as raised:
        attached(tiny_run.source(), tiny_run.recipe(lora={"target_modules": ["q_proj"], "layers_to_transform": asked}))
    assert str(raised.value) == "lora.layers_to_transform asks for layer 2; this model has the layers 0 to 1"


def test_weight_decay_leaves_copies_of_norms_alone(untied: ModelSource) -> None:
    what = recipe(untied, ["norm", "embed_tokens"], weight_decay=0.1)
    parameters = trainable_parameters(attached(untied, what))
    for ratio in (None, 4.0):
        optimizer = create_optimizer(parameters, what.train, tiny_run.CPU, ratio)
        decayed = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
        assert {name for name, each in parameters.items() if decayed[id(each)] == 0} == {
            "base_model.model.model.norm.modules_to_save.default.weight"
        }
        assert len(decayed) == len(parameters)


def test_gradients_of_copies_are_those_of_padded_batches_and_of_recomputed_layers(untied: ModelSource) -> None:
    found = []
    for packing, recomputed in ((tiny_run.PADDED, 0), (tiny_run.PACKED, 0), (tiny_run.PACKED, 2)):
        model = tiny_run.stirred(attached(untied, recipe(untied, ["norm", "input_layernorm", "embed_tokens"]))).train()
        set_gradient_checkpointing(model, recomputed)
        scores = score_batch(model, collate(tiny_run.pairs(5), packing), tiny_run.CPU)
        (scores.chosen_logp_P - scores.rejected_logp_P).sum().backward()
        assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())
        found.append(tiny_run.gradients(model))
    assert tiny_run.apart(found[1], found[0]) < 1e-5
    assert tiny_run.apart(found[2], found[1]) < 1e-5
