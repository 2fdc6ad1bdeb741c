"""What the pretended GPU does itself, so that what is shown with it is worth something."""

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import pretended_gpu as pretended
import pytest
import tiny_run
import torch
from pretended_gpu import MixedDevicesError, PretendedGPU, pretended_gpu
from pretended_kernels import fused_kernel_rule

from qlora_dpo.model.gpu_specs import GPU_SPECS


@pytest.fixture
def gpu() -> Iterator[PretendedGPU]:
    with pretended_gpu("t4") as found:
        yield found


def test_tensors_say_that_they_are_on_the_gpu_and_everything_is_as_before_afterwards() -> None:
    with pretended_gpu("t4"):
        there, here = torch.ones(2, device="cuda"), torch.ones(2)
        told = [(each.device.type, each.is_cuda, each.is_cpu, each.get_device()) for each in (there * 2, here * 2)]
        assert told == [("cuda", True, False, 0), ("cpu", False, True, -1)]
        assert torch.cuda.get_device_capability() == (7, 5)
    assert (torch.cuda.is_available(), there.device.type) == (False, "cpu")


def test_what_mixes_devices_is_refused_and_single_numbers_are_not(gpu: PretendedGPU) -> None:
    there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    for mixed in (
        lambda: there + here,
        lambda: there @ here,
        lambda: here[there[0].long()],
        lambda: torch.cat([here, there]),
    ):
        with pytest.raises(MixedDevicesError, match=r"device|indices should be either on cpu"):
            mixed()
    with pytest.raises(TypeError, match=r"^can't convert cuda:0 device type tensor to numpy"):
        there.numpy()
    assert (there + torch.tensor(1.0)).tolist() == [[2, 2], [2, 2]]
    assert there[torch.tensor([0])].is_cuda


def test_what_the_backward_pass_makes_is_on_the_gpu_too(gpu: PretendedGPU) -> None:
    weight = torch.nn.Parameter(torch.ones(2, device="cuda"))
    (weight.cpu() * torch.ones(2)).sum().backward()
    assert weight.grad is not None and weight.grad.is_cuda


def test_bytes_are_counted_from_their_making_to_their_last_use(gpu: PretendedGPU) -> None:
    mebibyte = 2**18  # float32 numbers
    kept = torch.ones(mebibyte, device="cuda", requires_grad=True)
    made = (2 * kept).exp()
    total = made.sum()
    assert (gpu.memory.now, gpu.memory.peak) == (2 * 2**20 + pretended.BLOCK, 3 * 2**20)
    del made  # which the backward pass needs
    assert gpu.memory.now == 2 * 2**20 + pretended.BLOCK
    del total
    assert gpu.memory.now == 2**20
    assert kept.detach().cpu().device.type == "cpu"
    assert gpu.memory.now == torch.cuda.memory_allocated() == 2**20


def test_a_full_gpu_has_no_room_and_keeps_what_it_has(gpu: PretendedGPU) -> None:
    kept = torch.ones(1000, device="cuda")
    gpu.memory.ceiling = gpu.memory.now + 4096
    before = gpu.memory.now
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried to allocate "):
        kept.repeat(2)
    assert gpu.memory.now == before
    assert (kept + 1).is_cuda


def test_the_host_waits_for_numbers_masks_and_copies_and_not_for_page_locked_memory(gpu: PretendedGPU) -> None:
    def waits(work: Callable[[], Any]) -> int:
        before = gpu.waits.total()
        work()
        return gpu.waits.total() - before

    there, here = torch.arange(4.0, device="cuda"), torch.arange(4.0)
    pinned = here.pin_memory()
    assert pinned.is_pinned() and not here.is_pinned()
    mask = there > 1
    for count, work in (
        (1, lambda: there.sum().item()),
        (1, lambda: there.tolist()),
        (1, lambda: there[mask]),
        (1, lambda: bool(mask.any())),
        (1, lambda: here.to("cuda")),
        (1, lambda: here.to("cuda", non_blocking=True)),
        (1, lambda: there.cpu()),
        (1, lambda: torch.equal(there, there)),
        (1, lambda: torch.tensor([1.0], device="cuda")),
        (1, lambda: there.copy_(here)),
        (2, lambda: torch.segment_reduce(there, "sum", lengths=torch.full((2,), 2, device="cuda"))),
        (0, lambda: torch.segment_reduce(there, "sum", lengths=torch.full((2,), 2, device="cuda"), unsafe=True)),
        (0, lambda: there.__setitem__(mask, 0)),
        (0, lambda: torch.where(mask, there, 0)),
        (0, lambda: pinned.to("cuda", non_blocking=True)),
        (0, lambda: torch.zeros(4, device="cuda")),
    ):
        assert waits(work) == count
    assert gpu.copies_without_wait == 1


def test_what_is_copied_without_a_wait_cannot_be_read_before_one(gpu: PretendedGPU) -> None:
    arriving = torch.ones(2, device="cuda").to("cpu", non_blocking=True)
    with pytest.raises(RuntimeError, match=r"^a tensor is read to which a copy without a wait may not have come yet$"):
        arriving.tolist()
    torch.cuda.synchronize()
    assert arriving.tolist() == [1, 1]


def test_the_gpu_has_a_random_generator_of_its_own(gpu: PretendedGPU) -> None:
    torch.manual_seed(1)
    here, there = torch.get_rng_state(), torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    assert torch.equal(torch.get_rng_state(), here)
    assert not torch.equal(torch.rand_like(first), first)
    torch.cuda.set_rng_state(there)
    assert torch.equal(torch.rand_like(first), first)
    with pytest.raises(RuntimeError, match=r"^Expected a 'cuda' device type for generator but found 'cpu'$"):
        torch.rand(3, device="cuda", generator=torch.Generator())


def test_autocast_computes_products_in_16_bits_and_sums_in_32(gpu: PretendedGPU) -> None:
    there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    with torch.autocast("cuda", dtype=torch.float16):
        assert ((there @ there).dtype, (here @ here).dtype) == (torch.float16, torch.float32)
        assert (there @ there).softmax(-1).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert (there @ there).dtype == torch.float32


@pytest.mark.parametrize(
    ("card", "most"), [("t4", {(896, 896): 64, (896, 4864): 32}), ("h200", {(896, 896): 32, (896, 4864): 16})]
)
def test_products_of_few_tokens_are_fused_as_bitsandbytes_decides(card: str, most: dict[tuple[int, int], int]) -> None:
    """The shapes of Qwen2-0.5B: q_proj and, inputs first, down_proj on a T4 and gate_proj on an H200."""
    rule = fused_kernel_rule(pretended.MULTIPROCESSORS[card], *GPU_SPECS[card].capability)
    dtype = torch.float16 if card == "t4" else torch.bfloat16
    for (one, other), tokens in most.items():
        words, width = (one, other) if card == "t4" else (other, one)
        fused = [count for count in range(1, 1024) if rule(0, dtype, count, words, width)]
        assert fused == list(range(1, tokens + 1))


def test_the_fused_product_is_that_of_the_dequantized_weights_but_for_rounding(gpu: PretendedGPU) -> None:
    layer = bnb.nn.Linear4bit(256, 64, compute_dtype=torch.float16, quant_type="nf4").to("cuda")
    inputs = torch.randn(65, 256, device="cuda", dtype=torch.float16)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    whole = torch.nn.functional.linear(inputs, weight.half(), layer.bias.half()).detach()
    for tokens in (64, 65):
        found = layer(inputs[:tokens]).float().detach()
        assert torch.equal(found, whole[:tokens].float()) == (tokens == 65)
        assert tiny_run.apart(found, whole[:tokens].float()) < 1e-3
    assert gpu.products == {"fused": 1, "dequantized": 1}
