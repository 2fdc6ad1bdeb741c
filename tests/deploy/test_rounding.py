"""Merged weights of a base in 16 bits keep updates that are smaller than half a unit in the last place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_adapters import save_adapter, save_base

from qlora_dpo.adapter import open_adapter
from qlora_dpo.cli import main
from qlora_dpo.deploy import rounding
from qlora_dpo.deploy.merged_weights import adapted_layers, add_delta_weight, base_layer_weight
from qlora_dpo.deploy.rounding import is_on_grid, stochastic_round

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@DTYPES
def test_every_element_is_one_of_its_two_neighbours_and_the_mean_is_exact(dtype: torch.dtype) -> None:
    exact = torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * 0.02
    found = stochastic_round(exact, dtype, "a").float()
    nearest = exact.to(dtype).float()
    ulp = torch.finfo(dtype).eps * exact.abs()
    assert ((found - exact).abs() <= ulp + 1e-7).all()
    assert 0.2 < (found != nearest).float().mean() < 0.3  # the farther neighbour, a quarter of the time on average
    shifted = torch.full((400_000,), 0.1).to(dtype).float() * (1 + 0.1 * torch.finfo(dtype).eps)
    assert (shifted.to(dtype).float() == shifted[0].to(dtype).float()).all()
    mean = stochastic_round(shifted, dtype, "b").double().mean()
    assert float(mean / shifted[0].double() - 1) == pytest.approx(0, abs=0.005 * torch.finfo(dtype).eps)


@DTYPES
def test_what_the_type_represents_stays_and_a_name_has_one_result(dtype: torch.dtype) -> None:
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    assert torch.equal(stochastic_round(edges, dtype, "a").float(), edges.to(dtype).float())
    assert stochastic_round(torch.tensor([torch.nan]), dtype, "a").isnan().all()
    small = torch.tensor([1e-30, -1e-30])
    least = 2**-24 if dtype == torch.float16 else 1.01e-30
    assert (stochastic_round(small, dtype, "a").float().abs() <= least).all()
    some = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1))
    first, again, other = (stochastic_round(some, dtype, name) for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert first.shape == some.shape
    assert not torch.equal(first, other)
    assert stochastic_round(torch.empty(0, 3), dtype, "a").shape == (0, 3)


def test_chunks_cover_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "CHUNK_ELEMENTS", 10)
    some = torch.randn(7, 9)
    assert (stochastic_round(some, torch.bfloat16, "a").float() - some).abs().max() < 2**-7 * some.abs().max()
    assert is_on_grid(some.bfloat16().float(), torch.bfloat16)
    last = some.bfloat16().float()
    last[-1, -1] += 1e-4
    assert not is_on_grid(last, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_small_update_of_a_base_in_bf16_is_not_lost(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "tuned", base, "none", size=1e-3)
    assert main(["merge", str(adapter), "-o", str(tmp_path / "m"), "--dtype", dtype]) == 0
    written = load_file(tmp_path / "m" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, layer in adapted_layers(open_adapter(adapter, "fp32").model).items():
        exact_OI = add_delta_weight(layer, base_layer_weight(layer))
        inputs = torch.randn(64, exact_OI.shape[1], generator=generator)
        wanted, added, nearest = (
            inputs @ (weight_OI - before[f"{name}.weight"].float()).T
            for weight_OI in (exact_OI, written[f"{name}.weight"].float(), exact_OI.to(kind).float())
        )
        # of what the update adds to sums over the inputs, nearly all is there; rounded to the nearest, most is lost
        assert float((added * wanted).sum() / (wanted * wanted).sum()) == pytest.approx(1, abs=0.25)
        if dtype == "bf16":
            assert (nearest * wanted).sum() / (wanted * wanted).sum() < 0.6


def test_a_merge_that_loses_what_was_trained_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tmp_path / "tuned", save_base(tmp_path / "base"), "nf4", size=1e-3)
    assert main(["merge", str(adapter), "-o", str(tmp_path / "m")]) == 0
    figures = json.loads((tmp_path / "m" / "merge.json").read_text(encoding="utf-8"))
    assert figures["kl"] > 0.1 * figures["base_kl"]
    said = capsys.readouterr().err
    assert f"the merged model's KL to the trained one is {figures['kl'] / figures['base_kl']:.0%} of the base's" in said
    assert main(["merge", str(adapter), "-o", str(tmp_path / "whole"), "--dtype", "fp32"]) == 0
    assert "of the base's" not in capsys.readouterr().err


def test_a_quantized_base_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "tuned", save_base(tmp_path / "base"), "nf4")
    assert main(["merge", str(adapter), "-o", str(tmp_path / "m")]) == 0
    written = load_file(tmp_path / "m" / "model.safetensors")
    for name, layer in adapted_layers(open_adapter(adapter, "fp32").model).items():
        exact_OI = add_delta_weight(layer, base_layer_weight(layer))
        assert torch.equal(written[f"{name}.weight"], exact_OI.bfloat16())
