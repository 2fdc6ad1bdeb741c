"""What fits: bytes a token keeps are measured, and no more layers are recomputed than memory asks for."""

import platform
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import jobs
import pytest
import torch

from qlora_dpo.model import budget
from qlora_dpo.model.budget import Kept, checkpoint, checkpointable, layers_to_checkpoint
from qlora_dpo.preference.layout import checkpoint_as_needed, measured, reference_packing
from qlora_dpo.preference.logps import score
from qlora_dpo.preference.pack import MicroBatch, collate

pytestmark = jobs.LIBRARIES_WARN

TEN = Kept(layer=10.0, layer_input=1.0)


def test_bytes_of_a_row_fall_with_every_recomputed_layer_but_the_one_that_is_there_at_the_time() -> None:
    assert [TEN.bytes(2, 4, count) for count in range(5)] == [80, 82, 64, 46, 28]


@pytest.mark.parametrize(
    ("free", "layers"),
    [(1000, 0), (100, 0), (99, 2), (80, 2), (79, 3), (58, 3), (57, 4), (0, 4)],
)
def test_as_few_layers_as_needed_are_recomputed(free: int, layers: int) -> None:
    # 0.8 of what is free may be used: 80 bytes for none, 64 for two, 46 for three
    assert layers_to_checkpoint(TEN, layers=4, tokens=2, free=free) == layers


def test_only_the_first_layers_are_recomputed() -> None:
    model = jobs.fresh(jobs.recipe())
    checkpoint(model, 1)
    assert [layer.gradient_checkpointing for layer in checkpointable(model)] == [True, False]
    checkpoint(model, 0)
    assert [layer.gradient_checkpointing for layer in checkpointable(model)] == [False, False]


def test_what_a_token_keeps_is_measured_whatever_the_row_is() -> None:
    model = jobs.stirred(jobs.fresh(jobs.recipe("nf4"))).train()
    found = []
    for count in (6, 24):
        batch = collate(jobs.pairs(count), jobs.PACKED)
        tokens = batch.input_ids_BL.numel()
        found.append(budget.kept(model.get_base_model(), partial(logps_of, model, batch), tokens))
    # width 64, inner width 128: dozens of float32 vectors of either size, and not hundreds
    assert 2_000 < found[0].layer < 20_000
    assert found[1].layer == pytest.approx(found[0].layer, rel=0.2)
    assert found[0].layer_input == 64 * 4


def logps_of(model: Any, batch: MicroBatch) -> torch.Tensor:
    return score(model, batch, jobs.CPU).chosen_logp_P


@pytest.mark.parametrize(
    ("asked", "free", "recomputed", "says"),
    [
        (True, 2**34, [True, True], "16.0 GiB are free: 2 of 2 layers are recomputed, as the recipe says"),
        (False, 0, [False, False], "0.0 GiB are free: nothing is recomputed, as the recipe says"),
        ("auto", 2**34, [False, False], "16.0 GiB are free: nothing is recomputed"),
        ("auto", 0, [True, True], "0.0 GiB are free: 2 of 2 layers are recomputed"),
    ],
)
def test_the_recipe_or_memory_decides(asked: Any, free: int, recomputed: list[bool], says: str) -> None:
    model = jobs.fresh(jobs.recipe())
    pairs, training = jobs.pairs(9), model.training
    per_token = measured(model, pairs, jobs.PACKED, jobs.CPU)
    need = per_token.bytes(512, 2, 0) / 2**30
    words = checkpoint_as_needed(model, asked, per_token, pairs, 512, free)
    assert words == f"memory: a backward pass over 512 tokens needs {need:.1f} GiB, {says}"
    assert [layer.gradient_checkpointing for layer in checkpointable(model)] == recomputed
    assert model.training == training


def test_the_reference_is_asked_in_larger_rows_where_a_gpu_has_room() -> None:
    gpu = replace(jobs.CPU, type="cuda")
    # 0.8 of what is free holds so many tokens of 10 bytes
    for free, tokens in ((0, 512), (12_500, 1000), (10**6, 4096)):
        assert reference_packing(jobs.PACKED, TEN, free, gpu).token_budget == tokens
    assert reference_packing(jobs.PACKED, TEN, 10**6, jobs.CPU) == jobs.PACKED


def test_free_memory_is_what_the_machine_and_the_group_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert 0 < budget.free_bytes(jobs.CPU) <= jobs.CPU.total_bytes
    monkeypatch.setattr(budget, "_left_in_group", lambda: 5)
    assert budget.free_bytes(jobs.CPU) == 5


def test_weights_are_kept_dense_only_where_half_of_the_free_memory_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    base = architectures.made(architectures.CONFIGS["llama"]).to(torch.float64)
    need = budget.dense_bytes(base, torch.float32)
    layers = [layer for layer in base.modules() if isinstance(layer, torch.nn.Linear)]
    assert need == sum(layer.weight.numel() for layer in layers) * 4
    monkeypatch.setattr(budget, "free_bytes", lambda device: need * 2)
    assert budget.keep_dense_if_it_fits(base, jobs.CPU).endswith("converted in every layer visit")
    assert not hasattr(layers[0], "dense_weight")
    monkeypatch.setattr(budget, "free_bytes", lambda device: need * 3)
    assert budget.keep_dense_if_it_fits(base, jobs.CPU).endswith("converted once")
    assert layers[0].dense_weight.dtype == torch.float32


PAGES_TAKEN_ANEW = """
import resource, sys, torch
from qlora_dpo.model.budget import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_what_a_step_frees_is_not_asked_of_the_system_again() -> None:
    """A tensor of 64 MiB four times over: its pages are there already, or come anew each time."""
    kept, unasked = (
        int(subprocess.run([sys.executable, "-c", PAGES_TAKEN_ANEW, how], capture_output=True, check=True).stdout)
        for how in ("kept", "unasked")
    )
    assert kept < unasked / 10
