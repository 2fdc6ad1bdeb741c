"""Attention in packed rows, forward and backward, against a loop over sequences in float64."""

import random
from typing import Any

import architectures
import kernel_devices
import pytest
import torch
from kernel_devices import ONE_PRODUCT, PLACES, Where, apart
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.model.packed import attention
from qlora_dpo.model.packed.attention import PackedLayout
from qlora_dpo.preference.pack import Packing, collate
from qlora_dpo.preference.packing_choice import choose_packing

HEADS = pytest.mark.parametrize("heads", [(14, 2), (4, 4)], ids=["7 queries a key", "1 query a key"])
WIDTHS = pytest.mark.parametrize("width", [64, 128])


def dialogues(count: int, longest: int) -> list[EncodedPair]:
    """Pairs of which every second one goes on from the chosen answer of the one before."""
    draw = random.Random(0)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 320) for _ in range(draw.randint(1, most)))

    pairs: list[EncodedPair] = []
    for row in range(count):
        before = pairs[-1] if row % 2 else None
        prompt = (*before.prompt, *before.chosen, *ids(longest // 8)) if before else ids(longest // 2)
        pairs.append(EncodedPair(prompt, ids(longest // 4), ids(longest // 4), row, b""))
    return pairs


def loop(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Plain attention of each span over what it sees, (1, T, H, D)."""
    group = query.shape[1] // key.shape[1]
    outputs = []
    for span in layout.spans:
        seen = [token for start, stop in span.visible_ranges for token in range(start, stop)]
        wide_key, wide_value = (part[:, :, seen].repeat_interleave(group, 1) for part in (key, value))
        scores = query[:, :, span.start : span.stop] @ wide_key.transpose(2, 3) * scale
        hidden = torch.ones(span.tokens, len(seen), dtype=torch.bool).triu(len(seen) - span.tokens + 1)
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ wide_value)
    return torch.cat(outputs, 2).transpose(1, 2)


def backends(place: Device) -> list[Any]:
    """All that the device can be asked for."""
    return list(dict.fromkeys([place.attention, "batched"]))


@PLACES
@HEADS
@WIDTHS
def test_outputs_and_gradients_are_those_of_a_loop_in_float64(
    where: Where, dtype: str, heads: tuple[int, int], width: int
) -> None:
    place = kernel_devices.chosen(where, dtype)
    pairs, generator = dialogues(12, 160), torch.Generator().manual_seed(0)
    for backend in backends(place):
        batch = collate(pairs, Packing(10_000, 0, backend))
        tokens = batch.input_ids_BL.numel()
        sizes = (heads[0], *heads[1:] * 2)
        made = [
            torch.randn(1, count, tokens, width, generator=generator).to(place.torch_dtype).double() for count in sizes
        ]
        slope = torch.randn(1, tokens, heads[0], width, generator=generator).to(place.torch_dtype).double()
        results = []
        for on_device in (False, True):
            parts = [
                (part.to(place.torch_device, place.torch_dtype) if on_device else part).clone().requires_grad_()
                for part in made
            ]
            layout = batch.to(place.torch_device).layout if on_device else batch.layout
            assert layout is not None
            if on_device:
                with place.autocast():
                    out, _ = attention.packed_attention(None, *parts, None, layout=layout, scaling=width**-0.5)
            else:
                out = loop(*parts, layout, width**-0.5)
            out.backward(slope.to(out.device, out.dtype))
            results.append([out, *(part.grad for part in parts)])
        expected, found = results
        for name, one, other in zip(("output", "query", "key", "value"), found, expected, strict=True):
            assert one is not None and other is not None
            assert apart(one, other) < ONE_PRODUCT[dtype], f"{backend}: {name}"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("where", [kernel_devices.ON_A_GPU])
def test_the_backend_that_a_gpu_offers_is_proved_on_a_model_and_taken(where: Where, dtype: str) -> None:
    place = kernel_devices.chosen(where, dtype)
    model = architectures.made(architectures.CONFIGS["qwen2"]).to(place.torch_device, place.weight_dtype)
    packing, why = choose_packing(model, dialogues(12, 64), Packing(300, 0, backend=None), place)
    assert why == f"packed rows of up to 300 tokens, attention by {place.attention}"
    assert packing.backend == place.attention
