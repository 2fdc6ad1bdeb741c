"""What `merge` can add up: DoRA, rsLoRA, patterns, whole copies, several adapters, each exactly as PEFT does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from saved_adapters import save_adapter, save_base
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from qlora_dpo.cli import main
from qlora_dpo.deploy import merge as merging
from qlora_dpo.deploy import shards

FIGURES = {"kl": 0.0, "top1": 1.0, "why_no_accuracy": "nothing", "tokens": 1, "measured_on": "", "computed_in": ""}
IDS = torch.arange(3, 43)[None]
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 16}},
    "some layers": {"layers_to_transform": [1]},
    "whole norms": {"modules_to_save": ["norm"]},
}


@pytest.fixture(autouse=True, scope="module")
def no_bars() -> None:
    """As the command line does before transformers is imported."""
    disable_progress_bar()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("made") / "base")


def foreign(folder: Path, base: Path, seed: int, **config: Any) -> Path:
    """An adapter as PEFT makes and saves it, every tensor of it random."""
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    model = get_peft_model(full, LoraConfig(**{**names, **config}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def merged(adapter: Path, output: Path) -> Any:
    merging.merge_adapter(merging.open_for_merge(adapter), output, "trained", "fp32", lambda _: FIGURES)
    return AutoModelForCausalLM.from_pretrained(output)


def insist_on_same(ours: Any, theirs: Any) -> None:
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_is_merged_as_peft_merges_it(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = foreign(tmp_path / "a", base, 1, **KINDS[kind])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    insist_on_same(merged(adapter, tmp_path / "m"), theirs.merge_and_unload())


def test_a_base_that_names_its_layers_otherwise_is_merged_as_a_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = foreign(tmp_path / "a", base, 1, **KINDS["whole norms"])
    by_shards = merged(adapter, tmp_path / "shards")
    monkeypatch.setattr(shards, "list_tensors", lambda folder: {})
    insist_on_same(merged(adapter, tmp_path / "whole"), by_shards)


def test_shards_hold_what_one_file_holds(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = foreign(tmp_path / "a", base, 1)
    merged(adapter, tmp_path / "one")
    monkeypatch.setattr(shards, "MAX_SHARD_SIZE", "50KB")
    merged(adapter, tmp_path / "several")
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    several = {name: load_file(tmp_path / "several" / file)[name] for name, file in index["weight_map"].items()}
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert one.keys() == several.keys()
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in one.values())


# --- several adapters


def test_several_adapters_are_added_up_as_peft_concatenates_them(base: Path, tmp_path: Path) -> None:
    one = foreign(tmp_path / "one", base, 1)
    other = foreign(tmp_path / "other", base, 2, r=8, use_rslora=True, target_modules=["q_proj", "down_proj"])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), one, "one")
    theirs.load_adapter(other, "other")
    updates: dict[str, torch.Tensor] = {}
    for name, module in theirs.get_base_model().named_modules():
        for which, weight in (("one", 0.7), ("other", -0.3)):
            if which in getattr(module, "lora_A", {}):
                updates[name] = updates.get(name, 0) + weight * module.get_delta_weight(which)
    opened = merging.open_for_merge(one, [other], [0.7, -0.3])
    merging.merge_adapter(opened, tmp_path / "m", "trained", "fp32", lambda _: FIGURES)
    ours, before = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), load_file(base / "model.safetensors")
    assert len(updates) == 8
    for name, update in updates.items():
        wanted = before[f"{name}.weight"].float() + update
        torch.testing.assert_close(ours.get_submodule(name).weight, wanted, atol=1e-6, rtol=1e-6)
    # what it is compared with is the model that has both adapters on
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, opened.model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_in_4_bit_an_adapter_in_two_parts_is_the_adapter(base: Path, tmp_path: Path) -> None:
    one, twin = (save_adapter(tmp_path / name, base) for name in ("one", "twin"))
    opened = merging.open_for_merge(one, [twin], [0.7, 0.3])
    merging.merge_adapter(opened, tmp_path / "m", "trained", "fp32", lambda _: FIGURES)
    in_parts = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    insist_on_same(in_parts, merged(one, tmp_path / "whole"))
    with torch.no_grad():
        torch.testing.assert_close(in_parts(IDS).logits, opened.model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_one_weight_scales_one_adapter(base: Path, tmp_path: Path) -> None:
    adapter = foreign(tmp_path / "a", base, 1)
    assert main(["merge", str(adapter), "--weights", "0", "--dtype", "fp32", "-o", str(tmp_path / "m")]) == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


def test_the_merged_folder_names_every_adapter_with_its_weight(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = foreign(tmp_path / "one", base, 1), foreign(tmp_path / "other", base, 2)
    assert main(["merge", str(one), str(other), "--weights", "0.7,0.3", "-o", str(tmp_path / "m")]) == 0
    record = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert record["adapter"] == "0.7 x one + 0.3 x other"
    assert record["kl"] < 0.001
    assert "# 0.7 x one + 0.3 x other, merged" in (tmp_path / "m" / "README.md").read_text()
    assert capsys.readouterr().err.startswith(f"merging {one} and {other} into {tmp_path / 'm'}\n")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["merge", *map(str, arguments)])
    return code, capsys.readouterr().err.splitlines()[-1]


def test_weights_that_do_not_fit_are_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, out = foreign(tmp_path / "one", base, 1), tmp_path / "other", ("-o", tmp_path / "m")
    assert refusal(capsys, one, other, *out) == (
        2,
        "qlora-dpo: 2 adapters need --weights, a number for each, such as 0.5,0.5",
    )
    for text in ("1", "1,x", "1,nan", "1,2,3"):
        assert refusal(capsys, one, other, "--weights", text, *out) == (
            2,
            f"qlora-dpo: --weights {text}: is not 2 numbers with commas between, one for each adapter",
        )


def test_adapters_of_different_bases_or_quantizations_are_not_added_up(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = foreign(tmp_path / "one", base, 1), ("--weights", "1,1", "-o", tmp_path / "m")
    elsewhere = foreign(tmp_path / "b", save_base(tmp_path / "other-base", seed=5), 1)
    assert refusal(capsys, one, elsewhere, *out) == (
        1,
        f"qlora-dpo: {elsewhere}: has another base than {one}; only adapters of one base can be added up",
    )
    quantized = save_adapter(tmp_path / "nf4", base)
    assert refusal(capsys, one, quantized, *out) == (
        1,
        f'qlora-dpo: {quantized}: was trained with model.quantization = "nf4" and {one} with "none"; only adapters of '
        "one base can be added up",
    )
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dora", "an adapter with DoRA is no sum and"),
        ("whole norms", "an adapter that holds whole tensors (modules_to_save, embeddings, biases or tokens)"),
    ],
)
def test_what_is_no_sum_cannot_be_weighed(
    kind: str, name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = foreign(tmp_path / "a", base, 1, **KINDS[kind])
    assert refusal(capsys, adapter, "--weights", "0.5", "-o", tmp_path / "m") == (
        1,
        f"qlora-dpo: {name} cannot be weighed; merge it by itself, without --weights",
    )


def test_a_damaged_second_adapter_is_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_adapter(tmp_path / "one", base)
    other = save_adapter(tmp_path / "other", base)
    weights = other / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, sentence = refusal(capsys, one, other, "--weights", "1,1", "-o", tmp_path / "m")
    assert code == 1
    assert sentence.startswith(f"qlora-dpo: {other}: is damaged: adapter_model.safetensors has not its SHA-256; ")
