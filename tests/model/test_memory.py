"""What a layer keeps of a token is measured, layers are recomputed, weights kept dense, and memory is counted."""

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_run
import torch
from fork_server import run_forked
from torch import nn

from qlora_dpo.model import malloc, memory
from qlora_dpo.model.activation_memory import ActivationBytes, measure_activation_bytes
from qlora_dpo.model.decoder_layers import checkpointable_layers, set_gradient_checkpointing
from qlora_dpo.model.malloc import limit_heap
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import MicroBatch, collate

pytestmark = tiny_run.LIBRARIES_WARN

TEN = ActivationBytes(layer=10.0, layer_input=1.0)


def test_bytes_of_a_row_fall_with_every_recomputed_layer_but_the_one_that_is_there_at_the_time() -> None:
    assert [TEN.bytes(2, 4, count) for count in range(5)] == [80, 82, 64, 46, 28]


def test_only_the_first_layers_are_recomputed() -> None:
    model = tiny_run.fresh(tiny_run.recipe())
    set_gradient_checkpointing(model, 1)
    assert [layer.gradient_checkpointing for layer in checkpointable_layers(model)] == [True, False]
    set_gradient_checkpointing(model, 0)
    assert [layer.gradient_checkpointing for layer in checkpointable_layers(model)] == [False, False]


def test_what_a_token_keeps_is_measured_whatever_the_row_is() -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe("nf4"))).train()
    found = []
    for count in (6, 24):
        batch = collate(tiny_run.pairs(count), tiny_run.PACKED)
        tokens = batch.input_ids_BL.numel()
        found.append(measure_activation_bytes(model.get_base_model(), partial(logps_of, model, batch), tokens))
    # width 64, inner width 128: dozens of float32 vectors of either size, and not hundreds
    assert 2_000 < found[0].layer < 20_000
    assert found[1].layer == pytest.approx(found[0].layer, rel=0.2)
    assert found[0].layer_input == 64 * 4


def logps_of(model: Any, batch: MicroBatch) -> torch.Tensor:
    return score_batch(model, batch, tiny_run.CPU).chosen_logp_P


def test_free_memory_is_what_the_machine_and_the_group_leave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert 0 < memory.free_bytes(tiny_run.CPU) <= tiny_run.CPU.total_bytes
    monkeypatch.setattr(memory, "_cgroup_free_bytes", lambda: 5)
    assert memory.free_bytes(tiny_run.CPU) == 5


@pytest.mark.parametrize(("spare", "how"), [(-1, "at each use"), (0, "once")])
def test_weights_are_kept_dense_where_they_have_room(spare: int, how: str) -> None:
    base = architectures.made(architectures.CONFIGS["llama"]).to(torch.float64)
    need = memory.dense_bytes(base, torch.float32)
    layers = [layer for layer in base.modules() if isinstance(layer, torch.nn.Linear)]
    assert need == sum(layer.weight.numel() for layer in layers) * 4
    kept, words = memory.cache_dequantized_if_fits(base, tiny_run.CPU, need + spare)
    assert words == (
        f"weights: the linear layers take {need / 2**30:.1f} GiB in fp32, and {need / 2**30:.1f} GiB are free for "
        f"that: converted {how}"
    )
    assert kept == hasattr(layers[0], "dense_weight") == (spare == 0)
    assert not kept or layers[0].dense_weight.dtype == torch.float32


HEAP_AFTER_A_TENSOR = """
import re, sys, torch
from pathlib import Path
from qlora_dpo.model.malloc import malloc_retain
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    malloc_retain()
torch.ones(2**24)
start, end = re.search("(.*)-(.*) rw-p .*heap", Path("/proc/self/maps").read_text()).groups()
print(int(end, 16) - int(start, 16))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_what_a_step_frees_is_not_asked_of_the_system_again() -> None:
    """The 64 MiB of a tensor that is gone stay part of the heap, which they never were without the setting.

    Pages are not counted: some kernels take those away that nobody has touched for a while.
    """

    def heap_bytes(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", HEAP_AFTER_A_TENSOR, how], capture_output=True, check=True)
        return int(done.stdout)

    assert heap_bytes("kept") - heap_bytes("unasked") > 2**25


HEAP_AFTER_STEPS = """
import sys, torch
from qlora_dpo.model.malloc import limit_heap, malloc_retain, rss_bytes
torch.set_num_threads(1)
malloc_retain()
generator = torch.Generator().manual_seed(0)
start, kept, most = rss_bytes(), [], 0
layer = torch.nn.Identity()
with limit_heap([layer] if sys.argv[1] == "bounded" else [], 12 * 2**22):
    for step in range(300):
        sizes = torch.randint(2**14, 2**20, (12,), generator=generator).tolist()
        tensors = [torch.ones(size) for size in sizes]
        kept.append(torch.ones(2**10))  # a little of each step stays, and splits the heap
        del tensors
        layer(kept[-1])
        most = max(most, rss_bytes() - start)
print(most)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_blocks_of_ever_changing_lengths_do_not_fill_the_heap() -> None:
    root = Path(__file__).parents[2]

    def most(how: str) -> int:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        done = run_forked(["-c", HEAP_AFTER_STEPS, how], cwd=root, env=environment)
        return int(done.stdout)

    assert most("bounded") < 0.8 * most("unbounded")


def test_freed_memory_is_returned_once_a_process_holds_nearly_all_that_was_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, trims = iter([100, 190, 191, 120, 191, 190]), []
    monkeypatch.setattr(malloc, "rss_bytes", lambda: next(sizes))
    monkeypatch.setattr(malloc, "malloc_trim", lambda: trims.append(1))
    layers, counts = [nn.Linear(2, 2), nn.Linear(2, 2)], []
    with limit_heap(layers, 100):
        counts.append(len(trims))  # one at the start
        states = layers[0](torch.ones(2))
        counts.append(len(trims))
        states = layers[1](states)  # above 0.95 of 200
        counts.append(len(trims))
        with torch.no_grad():
            layers[0](torch.ones(2))
        counts.append(len(trims))
        states.sum().backward()  # one layer above, the other not
    assert counts == [1, 1, 2, 2]
    assert len(trims) == 3
    layers[0](torch.ones(2))  # no size is left to read
