"""Adapters that are damaged, pickled, from elsewhere, or beside a base they were not trained on: refused by name."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_adapters import save_base

from qlora_dpo.deploy import merge as merging
from qlora_dpo.deploy.merge import open_for_merge
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model.base import tokenizer_fingerprints

Q_PROJ = "model.layers.0.self_attn.q_proj"


def refused(adapter: Path) -> str:
    with pytest.raises((ModelError, RecipeError)) as raised:
        merging.open_for_merge(adapter)
    return str(raised.value)


def rewrite(adapter: Path, change: dict[str, str | None]) -> None:
    """Rename tensors of the adapter; None leaves one out. As if another program had made it, without a manifest."""
    (adapter / "manifest.json").unlink()
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for old, new in change.items():
        value = tensors.pop(old)
        if new is not None:
            tensors[new] = value
    save_file(tensors, file, {"format": "pt"})


def test_a_truncated_adapter_is_named(own: Path) -> None:
    file = own / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(own).startswith(f"{own}: is damaged: adapter_model.safetensors has not its size; ")
    (own / "manifest.json").unlink()  # an adapter from elsewhere has none
    assert refused(own).startswith(f"{own}: the adapter cannot be attached to its base: ")
    assert "\n" not in refused(own)


def test_a_missing_tensor_is_named(own: Path) -> None:
    name = f"base_model.model.{Q_PROJ}.lora_B.weight"
    rewrite(own, {name: None})
    assert refused(own) == f"{own}: 1 tensors do not fit the base, for example {name}"


def test_misnamed_tensors_are_named(own: Path) -> None:
    with safe_open(own / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    rewrite(own, {name: name.replace(".layers.", ".blocks.") for name in names})
    assert refused(own) == (
        f"{own}: {2 * len(names)} tensors do not fit the base, for example "
        "base_model.model.model.blocks.0.mlp.down_proj.lora_A.weight"
    )


def test_an_adapter_of_pickled_weights_is_refused(own: Path) -> None:
    (own / "adapter_model.safetensors").rename(own / "adapter_model.bin")
    message = refused(own)
    assert message.startswith(
        f"{own}: has no adapter_model.safetensors, and adapter_model.bin is pickled, which can run code and is not "
        "read; if you trust it, convert it: python -c "
    )


def test_a_pickled_adapter_is_converted_as_the_message_says(own: Path) -> None:
    weights = own / "adapter_model.safetensors"
    before = load_file(weights)
    torch.save(before, own / "adapter_model.bin")
    weights.unlink()
    command = refused(own).partition("convert it: ")[2].removesuffix(" in that folder")
    words = shlex.split(command)
    subprocess.run([sys.executable, *words[1:]], cwd=own, check=True)
    after = load_file(weights)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_without_weights_is_named(own: Path) -> None:
    (own / "adapter_model.safetensors").unlink()
    assert refused(own) == f"{own}: has no adapter_model.safetensors"


def test_a_base_of_another_size_is_refused(own: Path) -> None:
    for name in ("run.json", "resolved.toml", "manifest.json"):  # an adapter from elsewhere, which tells of no base
        (own / name).unlink()
    wider = tiny.qwen2()
    config = wider.config
    config.hidden_size, config.intermediate_size = 128, 256
    type(wider)(config).save_pretrained(own.parent / "base")
    assert refused(own) == (
        f"{own}: was made for a base of another size: base_model.model.model.layers.0.self_attn.q_proj.lora_A.default."
        "weight does not fit this one; name the right base with --base-model, or as base_model_name_or_path in "
        "adapter_config.json"
    )


def test_a_base_with_a_layer_less_is_refused(own: Path) -> None:
    for name in ("run.json", "resolved.toml", "manifest.json"):
        (own / name).unlink()
    shallow = tiny.qwen2()
    config = shallow.config
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    type(shallow)(config).save_pretrained(own.parent / "base")
    assert refused(own) == (
        f"{own}: 14 tensors do not fit the base, for example "
        "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    )


def told(own: Path, **facts: Any) -> None:
    """Add what a real run.json says."""
    run = json.loads((own / "run.json").read_text())
    run["base"] |= facts.pop("base", {})
    (own / "run.json").write_text(json.dumps(run | facts))


def test_a_base_in_another_quantization_is_refused(own: Path) -> None:
    told(own, base={"quantization": "nf4", "double_quant": True})
    text = (own / "resolved.toml").read_text()
    (own / "resolved.toml").write_text(text.replace('"nf4"', '"none"'))
    assert refused(own) == (
        f'{own}: was trained with model.quantization = "nf4", and its resolved.toml says "none"; put that back'
    )
    (own / "resolved.toml").write_text(text.replace("double_quant = true", "double_quant = false"))
    assert refused(own) == (
        f"{own}: was trained with model.double_quant = true, and its resolved.toml says false; put that back"
    )


def test_another_chat_template_than_it_was_trained_with_is_refused(own: Path) -> None:
    told(own, tokenizer=tokenizer_fingerprints(tiny.tokenizer()))
    open_for_merge(own)
    template = own / "chat_template.jinja"
    template.write_text(template.read_text().replace("helpful", "curt"))
    (own / "manifest.json").unlink()
    assert refused(own) == (
        f"{own}: its chat template is another than it was trained with; take chat_template.jinja from a backup"
    )


def test_a_damaged_config_is_named(own: Path) -> None:
    (own / "adapter_config.json").write_text('{"peft_type": "LORA", ')
    assert refused(own) == f"{own}: its adapter_config.json is damaged (JSONDecodeError)"


def test_a_base_that_changed_since_is_refused(own: Path) -> None:
    save_base(own.parent / "base", seed=1)
    base = own.parent / "base"
    assert refused(own) == (
        f"{own}: was trained on other weights of {base} than are there now; if you have the former ones, say where "
        "with --base-model PATH"
    )


def test_what_is_no_adapter_folder_is_named(own: Path, tmp_path: Path) -> None:
    hint = "name the adapter folder of a finished run"
    assert refused(tmp_path / "away") == f"{tmp_path / 'away'}: there is no such folder; {hint}"
    assert refused(own.parent / "base") == f"{own.parent / 'base'}: has no adapter_config.json; {hint}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_replication": [[0, 2], [0, 2]]}, "it has layer_replication, another number of layers"),
        (
            {"init_lora_weights": "pissa"},
            'it has init_lora_weights = "pissa", which changes the base itself',
        ),
    ],
)
def test_adapters_that_are_more_than_an_update_are_refused(own: Path, change: dict[str, Any], reason: str) -> None:
    file = own / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert refused(own) == f"{own}: cannot be merged: {reason}; use it as an adapter, which chat, serve and eval do"


def test_an_adapter_of_another_kind_is_refused(own: Path) -> None:
    config = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "feedforward_modules": []}
    (own / "adapter_config.json").write_text(json.dumps(config))
    assert refused(own) == (
        f"{own}: cannot be merged: it is of PEFT's type IA3, not LORA; use it as an adapter, which chat, serve and "
        "eval do"
    )
