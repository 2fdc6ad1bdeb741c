"""`qlora-dpo export ADAPTER --to gguf-lora`: llama.cpp's sum of base and adapter is the model that was trained."""

import json
from pathlib import Path

import architectures
import gguf
import gguf_models
import pytest
import tiny
import torch
from gguf.quants import dequantize
from saved_adapters import save_adapter, save_base

from qlora_dpo.adapter import OpenedModel, open_adapter
from qlora_dpo.cli import main
from qlora_dpo.deploy.gguf_adapter import export_adapter
from qlora_dpo.deploy.gguf_tensors import rope_permuted
from qlora_dpo.deploy.merged_weights import adapted_layers, add_delta_weight
from qlora_dpo.errors import ModelError
from qlora_dpo.model import sources
from qlora_dpo.model.base import load_base
from qlora_dpo.model.device import select_device
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.recipe.model import LoraTable, ModelTable


def written(adapter: Path, home: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    assert main(["export", str(adapter), "--to", "gguf-lora", "-o", str(home / "lora")]) == 0
    reader = gguf.GGUFReader(next((home / "lora").glob("*.gguf")))
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    values = {
        each.name: torch.from_numpy(dequantize(each.data, each.tensor_type).reshape(each.shape[::-1]).copy())
        for each in reader.tensors
    }
    return values, fields


@pytest.mark.parametrize("name", ["Llama 2", "Gemma 3", "Phi-3"])
def test_alpha_over_rank_times_b_a_is_the_update_of_every_layer(name: str, tmp_path: Path) -> None:
    base = gguf_models.save_gguf_model(name, tmp_path / "base")
    adapter = save_adapter(tmp_path / "tuned", base, "none")
    values, fields = written(adapter, tmp_path)
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    layers = adapted_layers(open_adapter(adapter, "fp32").model)
    assert len(values) == 2 * len(layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[str(fields["general.architecture"]).upper()], 6)
    for layer_name, layer in layers.items():
        key = names.get_name(f"{layer_name}.weight", try_suffixes=(".weight",))
        a_RI, b_OR = values[f"{key}.lora_a"], values[f"{key}.lora_b"]
        update_OI = float(fields["adapter.lora.alpha"]) / len(a_RI) * (b_OR @ a_RI)  # type: ignore[arg-type]
        wanted_OI = add_delta_weight(layer, torch.zeros_like(update_OI))
        if name == "Llama 2" and ("q_proj" in layer_name or "k_proj" in layer_name):
            wanted_OI = rope_permuted(wanted_OI, 4)
        torch.testing.assert_close(update_OI, wanted_OI, rtol=5e-3, atol=2e-3 * float(wanted_OI.abs().max()))


def test_the_folder_is_verified_and_the_next_commands_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "hh", save_base(tmp_path / "base"))
    assert main(["export", "hh", "--to", "gguf-lora", "--quant", "bf16"]) == 0
    said = capsys.readouterr().out
    assert f"qlora-dpo export {tmp_path / 'base'}" in said
    assert "--lora exported/hh-lora-bf16/hh-lora-bf16.gguf" in said
    assert main(["verify", "exported/hh-lora-bf16"]) == 0
    record = json.loads((tmp_path / "exported" / "hh-lora-bf16" / "export.json").read_text(encoding="utf-8"))
    assert (record["to"], record["layers"]) == ("gguf-lora", 14)
    assert record["error"] <= 4e-3


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--quant", "q8_0"], 2, "--quant q8_0: an adapter is written in f16 or bf16"),
        ([], 2, "has no adapter_config.json; name the adapter folder of a finished run"),
    ],
)
def test_what_is_no_adapter_and_what_it_cannot_be_written_in(
    options: list[str], code: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base")
    assert main(["export", str(base), "--to", "gguf-lora", "-o", str(tmp_path / "out"), *options]) == code
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dora_and_experts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, device = ModelTable(name=str(save_base(tmp_path / "base")), quantization="none"), select_device("fp32")
    source = sources.fetch_model(table)
    dora = attach_lora(load_base(source, table, device), LoraTable(r=2, use_dora=True), seed=0)
    with pytest.raises(
        ModelError, match=r"^it: model\.layers\.0\.\S+ is scaled by DoRA, which llama.cpp does not compute; "
    ):
        export_adapter(OpenedModel(dora, tiny.tokenizer(), device, source), tmp_path / "out", "it", "f16")
    experts = attach_lora(architectures.made(gguf_models.gguf_config("Qwen3-MoE")), LoraTable(r=2), seed=0)
    with pytest.raises(ModelError, match=r"experts\S* is the weights of several experts, whose adapters have no place"):
        export_adapter(OpenedModel(experts, tiny.tokenizer(), device, source), tmp_path / "out", "it", "f16")
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "base"), "--base-model", "x"]) == 2
    assert "it needs --to gguf-lora" in capsys.readouterr().err
