"""Adapters as PEFT and other tools write them: each is opened and merged to the logits that PEFT's own model has."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from saved_adapters import save_base
from test_merge_kinds import FIGURES, IDS
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
)
from transformers.utils.logging import disable_progress_bar

from qlora_dpo.adapter import open_adapter
from qlora_dpo.cli import main
from qlora_dpo.deploy import merge as merging
from qlora_dpo.deploy import merged_weights, shards
from qlora_dpo.errors import ModelError, QloraDpoError
from qlora_dpo.evaluation.merge_fidelity import compare_merged, free_weights, record_trained
from qlora_dpo.evaluation.merge_texts import load_comparison_texts

pytestmark = [
    # What PEFT says where it changes tied embeddings and head, and where the vocabulary was resized
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),  # lora_B.bias
]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_bias": ("tied", {"lora_bias": True}),
    "biases of all layers": ("tied", {"bias": "all"}),
    "biases of adapted layers": ("tied", {"bias": "lora_only"}),
    "LoRA on tied embeddings": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on a tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on both, tied": ("tied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "LoRA on both, untied": ("untied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "DoRA on embeddings": ("untied", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "whole embeddings, tied": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "whole embeddings and head": ("untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized, tied": ("tied", {"resize": 420}),
    "resized, untied": ("untied", {"resize": 420}),
    "resized, LoRA on embeddings": ("tied", {"resize": 420, "target_modules": ["q_proj", "embed_tokens"]}),
    "resized, whole embeddings": ("tied", {"resize": 420, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized, trained tokens": ("tied", {"resize": 420, "trainable_token_indices": [3, 410]}),
    "trained tokens, tied": ("tied", {"trainable_token_indices": [3, 5]}),
    "trained tokens, untied": ("untied", {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 7]}}),
    "a parameter": ("tied", {"target_modules": ["q_proj"], "target_parameters": ["down_proj.weight"]}),
}


@pytest.fixture(autouse=True, scope="module")
def no_bars() -> None:
    """As the command line does before transformers is imported."""
    disable_progress_bar()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bases `tied` and `untied`."""
    home = tmp_path_factory.mktemp("bases")
    save_base(home / "tied")
    save_base(home / "untied", tied=False)
    return home


def save_with_peft(
    folder: Path, base: Any, *, resize: int | None = None, keep_embeddings: bool | str = "auto", **config: Any
) -> torch.Tensor:
    """Save an adapter of `base`, every trained tensor of it random, as PEFT does; the logits of PEFT's model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32) if isinstance(base, Path) else base
    if resize is not None:
        model.resize_token_embeddings(resize, mean_resizing=False)
    values = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | config
    adapted = get_peft_model(model, LoraConfig(**values)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder, save_embedding_layers=keep_embeddings)
    return logits(adapted)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Write the adapter's tensors under other names."""
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def insist_on(folder: Path, wanted: torch.Tensor, output: Path, base_model: Path | None = None) -> None:
    """The opened and the merged model have the logits `wanted`."""
    where = str(base_model) if base_model else None
    opened = merging.open_for_merge(folder, base_model=where)
    torch.testing.assert_close(logits(opened.model).float(), wanted, atol=1e-4, rtol=1e-4)
    merging.merge_adapter(opened, output, "trained", "fp32", lambda _: FIGURES)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(output)), wanted, atol=1e-4, rtol=1e-4)


def refused(folder: Path, base_model: Path | None = None) -> str:
    """Why the adapter cannot be merged."""
    with pytest.raises(QloraDpoError) as raised:
        merging.open_for_merge(folder, base_model=str(base_model) if base_model else None)
    return str(raised.value)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_peft_opens_is_opened_and_merged(kind: str, bases: Path, tmp_path: Path) -> None:
    base, config = KINDS[kind]
    wanted = save_with_peft(tmp_path / "a", bases / base, **config)
    insist_on(tmp_path / "a", wanted, tmp_path / "m")


@pytest.mark.parametrize("kind", ["trained tokens, tied", "LoRA on tied embeddings"])
def test_the_check_of_a_merge_still_has_the_trained_head(kind: str, bases: Path, tmp_path: Path) -> None:
    base, config = KINDS[kind]
    save_with_peft(tmp_path / "a", bases / base, **config)
    opened = merging.open_for_merge(tmp_path / "a")
    merging.merge_adapter(opened, tmp_path / "m", "trained", "fp32", lambda _: FIGURES)
    texts = load_comparison_texts(tmp_path / "a", None, opened.tokenizer)
    outputs = record_trained(opened.model, texts.encoded, 0, opened.device)
    free_weights(outputs)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert compare_merged(outputs, merged, opened.device, 0.1).kl < 1e-6


NAMES: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".policy.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "DistributedDataParallel": lambda name: f"module.{name}",
}


@pytest.mark.parametrize("kind", list(NAMES))
def test_tensors_that_a_state_dict_names_otherwise_are_read(kind: str, bases: Path, tmp_path: Path) -> None:
    wanted = save_with_peft(tmp_path / "a", bases / "tied")
    rename(tmp_path / "a", NAMES[kind])
    insist_on(tmp_path / "a", wanted, tmp_path / "m")


def test_a_state_dict_with_dora_embeddings_and_whole_copies_is_read(bases: Path, tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["norm"]}
    wanted = save_with_peft(tmp_path / "a", bases / "untied", keep_embeddings=False, **config)

    def state_dict_name(name: str) -> str:
        if name.endswith(("lora_embedding_A", "lora_embedding_B")):
            return f"{name}.default"
        if name.endswith("lora_magnitude_vector"):
            return f"{name}.default.weight"
        return name.replace("A.weight", "A.default.weight").replace("B.weight", "B.default.weight")

    rename(tmp_path / "a", lambda name: state_dict_name(name).replace(".norm.", ".norm.modules_to_save.default."))
    insist_on(tmp_path / "a", wanted, tmp_path / "m")


def test_the_tensors_of_two_adapters_are_refused_unless_one_is_the_default(bases: Path, tmp_path: Path) -> None:
    wanted = save_with_peft(tmp_path / "a", bases / "tied")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)

    def write(*adapters: str) -> None:
        both = {
            name.replace(".weight", f".{a}.weight"): t + (a != adapters[0])
            for name, t in tensors.items()
            for a in adapters
        }
        save_file(both, file, {"format": "pt"})

    write("default", "reference")
    insist_on(tmp_path / "a", wanted, tmp_path / "m")
    write("one", "two")
    assert refused(tmp_path / "a") == (
        f"{tmp_path / 'a'}: holds the tensors of 2 adapters (one, two); save one of them with PEFT: "
        "model.save_pretrained(FOLDER, selected_adapters=[NAME])"
    )


# --- language models inside multimodal ones


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `whole`, a small Gemma 3 as it is published, and `text`, its language model alone."""
    home = tmp_path_factory.mktemp("gemma")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = shape | {"vocab_size": 400, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64, "eos_token_id": 2}
    vision = shape | {"image_size": 28, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        whole = Gemma3ForConditionalGeneration(config).eval()
        alone = Gemma3ForCausalLM(whole.config.text_config).eval()
    for parameter in whole.parameters():
        parameter.data *= 4 if parameter.dim() == 2 else 1
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    for name, model in (("whole", whole), ("text", alone)):
        model.save_pretrained(home / name)
        tiny.tokenizer().save_pretrained(home / name)
    return home


LAYOUTS = {"whole": "model.language_model.", "whole, before 4.52": "language_model.model.", "text": "model."}


@pytest.mark.parametrize("base", ["whole", "text"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layers_are_found_in_and_outside_a_multimodal_model(
    layout: str, base: str, gemma: Path, tmp_path: Path
) -> None:
    where = "language_model" if layout.startswith("whole") else "model"
    config = {"target_modules": rf".*{where}.*\.layers.*(q|v|o)_proj", "alpha_pattern": {f"{where}.*v_proj": 3}}
    trained_on = gemma / layout.partition(",")[0]
    wanted = save_with_peft(tmp_path / "a", trained_on, rank_pattern={"1.self_attn.q_proj": 2}, **config)
    rename(tmp_path / "a", lambda name: name.replace("model.language_model.", LAYOUTS[layout], 1))
    insist_on(tmp_path / "a", wanted, tmp_path / "m", gemma / base)


def test_an_update_of_the_vision_tower_is_not_dropped(gemma: Path, tmp_path: Path) -> None:
    save_with_peft(tmp_path / "a", gemma / "whole")
    assert refused(tmp_path / "a", gemma / "text") == (
        f"{tmp_path / 'a'}: also adapts parts that read no text, such as "
        "model.vision_tower.encoder.layers.0.self_attn.q_proj, and its base here has no such part; name the whole "
        "model with --base-model"
    )


def test_a_multimodal_model_is_merged_and_compared_by_its_text(
    gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_with_peft(tmp_path / "a", gemma / "whole", target_modules=r".*language_model.*(q|v)_proj")
    assert main(["merge", str(tmp_path / "a"), "--dtype", "fp32", "-o", str(tmp_path / "m")]) == 0
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["kl"] < 1e-6


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT's own, for the experts
@pytest.mark.parametrize("targets", [["q_proj", "w1", "w2", "w3"], "all-linear"])
def test_experts_that_transformers_stacks_are_merged(targets: Any, tmp_path: Path) -> None:
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MixtralConfig(**shape, **heads), dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    wanted = save_with_peft(tmp_path / "a", tmp_path / "base", target_modules=targets)
    insist_on(tmp_path / "a", wanted, tmp_path / "m")


# --- bases


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_of_a_base_that_is_stored_quantized_is_merged_dequantized(
    bits: str, bases: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(**{bits: True})
    stored = AutoModelForCausalLM.from_pretrained(bases / "tied", quantization_config=quantization)
    stored.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    save_with_peft(tmp_path / "a", AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    insist_on(tmp_path / "a", logits(open_adapter(tmp_path / "a", "fp32").model).float(), tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    with pytest.raises(QloraDpoError, match="is stored quantized, and the weights it was made from are not in it"):
        merging.candidate_bases(merging.open_for_merge(tmp_path / "a"), "original")


@pytest.mark.parametrize("name", [None, "", " ", 3])
def test_an_adapter_that_names_no_base_says_how_to_name_one(name: Any, bases: Path, tmp_path: Path) -> None:
    wanted = save_with_peft(tmp_path / "a", bases / "tied")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    with pytest.raises(ModelError) as raised:
        open_adapter(tmp_path / "a")
    assert str(raised.value) == (
        f"{tmp_path / 'a'}: its adapter_config.json names no base (base_model_name_or_path is {json.dumps(name)}); say "
        "which model it was trained on with --base-model PATH or --base-model OWNER/NAME"
    )
    torch.testing.assert_close(logits(open_adapter(tmp_path / "a", "fp32", str(bases / "tied")).model), wanted)


def test_a_vocabulary_that_no_file_holds_is_named(bases: Path, tmp_path: Path) -> None:
    for name, config in (
        ("embeddings", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("tokens", {"trainable_token_indices": [3, 410]}),
    ):
        save_with_peft(tmp_path / name, bases / "tied", resize=420, keep_embeddings=False, **config)
    save = "save the adapter with model.save_pretrained(FOLDER, save_embedding_layers=True)"
    assert refused(tmp_path / "embeddings") == (
        f"{tmp_path / 'embeddings'}: was trained on a base whose vocabulary was resized from 400 to 420 tokens, and it "
        f"does not hold model.embed_tokens of that base; save the resized base too and name it with --base-model, "
        f"or {save}"
    )
    assert refused(tmp_path / "tokens") == (
        f"{tmp_path / 'tokens'}: trained the token 410, and this base has 400; name the base with the resized "
        f"vocabulary with --base-model, or {save}"
    )


def test_a_bias_without_a_place_in_the_base_is_refused(bases: Path, tmp_path: Path) -> None:
    with pytest.warns(match="bias"):
        save_with_peft(tmp_path / "a", bases / "tied", target_modules=["down_proj"], lora_bias=True)
    with pytest.warns(match="bias"):
        message = refused(tmp_path / "a")
    assert message == (
        f"{tmp_path / 'a'}: cannot be merged: model.layers.0.mlp.down_proj has lora_bias, and this layer of the base "
        "has no bias to add it to; use it as an adapter, which chat, serve and eval do"
    )


def test_whole_tensors_are_told_and_are_no_sum(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_with_peft(tmp_path / "a", bases / "tied", bias="all")
    assert main(["merge", str(tmp_path / "a"), "--weights", "0.5", "-o", str(tmp_path / "m")]) == 1
    told = capsys.readouterr().err.splitlines()
    replaced = (
        "holds 6 whole tensors of the base, such as model.layers.0.self_attn.k_proj.bias, which replace the base's"
    )
    assert told[-2] == f"{tmp_path / 'a'}: {replaced} own, also where the adapter is switched off"
    assert told[-1] == (
        "qlora-dpo: an adapter that holds whole tensors (modules_to_save, embeddings, biases or tokens) cannot be "
        "weighed; merge it by itself, without --weights"
    )


# --- Conv1D, whose weights are stored transposed

CONV1D: dict[str, dict[str, Any]] = {
    "a square one": {"target_modules": r".*attn\.c_proj"},
    "all": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "DoRA on a square one": {"target_modules": r".*attn\.c_proj", "use_dora": True},
    "DoRA on all": {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True},
    "with embeddings and positions": {"target_modules": ["c_attn", "wte", "wpe"]},
    "with a bias": {"target_modules": ["c_attn", "c_fc"], "lora_bias": True},
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with weights that are not flat."""
    folder = tmp_path_factory.mktemp("gpt2")
    sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=2)).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() == 2 else 1
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("files", ["in shards", "as a whole"])
@pytest.mark.parametrize("kind", list(CONV1D))
def test_conv1d_is_merged_as_it_computes(
    kind: str, files: str, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if files == "as a whole":
        monkeypatch.setattr(shards, "list_tensors", lambda folder: {})
    wanted = save_with_peft(tmp_path / "a", gpt2, fan_in_fan_out=True, **CONV1D[kind])
    insist_on(tmp_path / "a", wanted, tmp_path / "m")


@pytest.mark.parametrize("base", ["gpt2", "tied"])
def test_a_transposed_update_is_found_however_small(
    base: str, gpt2: Path, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, modules = (gpt2, r".*attn\.c_proj") if base == "gpt2" else (bases / "tied", ["o_proj"])
    save_with_peft(tmp_path / "a", where, target_modules=modules, lora_alpha=0.01, fan_in_fan_out=base == "gpt2")

    def transposed(layer: Any, weight: torch.Tensor) -> torch.Tensor:
        return add_delta_weight(layer, weight.T).T

    add_delta_weight = merged_weights.add_delta_weight
    monkeypatch.setattr(merged_weights, "add_delta_weight", transposed)
    opened = merging.open_for_merge(tmp_path / "a")
    with pytest.raises(ModelError, match="the sum does not compute what the adapted layer computes"):
        merging.merge_adapter(opened, tmp_path / "m", "trained", "bf16", lambda _: FIGURES)
    assert not (tmp_path / "m").exists()
