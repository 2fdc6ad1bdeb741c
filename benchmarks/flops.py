"""Counts the floating-point operations of a step, and measures how many a second this machine's matmul makes."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.preference.pack import MicroBatch, max_sequence_tokens
from qlora_dpo.recipe.model import LoraTable


@dataclass(frozen=True)
class Shape:
    """What decides the work of a decoder with gated MLPs and LoRA on all its linear layers."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    r: int = LoraTable().r

    @property
    def linear(self) -> int:
        """Weights of all linear layers but the head."""
        return self.layers * sum(i * o for i, o in self._projections)

    @property
    def lora(self) -> int:
        """Weights of the adapter."""
        return self.layers * self.r * sum(i + o for i, o in self._projections)

    @property
    def _projections(self) -> list[tuple[int, int]]:
        queries, keys = self.heads * self.head_width, self.key_heads * self.head_width
        attention = [(self.width, queries), (self.width, keys), (self.width, keys), (queries, self.width)]
        return [*attention, (self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]


def shape_of(folder: Path) -> Shape:
    """The shape of the model in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=heads,
        key_heads=config.get("num_key_value_heads", heads),
        head_width=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
    )


def ours(shape: Shape, batch: MicroBatch, *, recomputed: bool, reference: bool) -> float:
    """Operations of one micro-batch of ours."""
    if batch.layout is None:
        sequences, columns = batch.input_ids_BL.shape
        scores = sequences * columns * columns
    else:
        scores = sum(tile.tokens * tile.num_visible for tile in batch.layout.tiles)
    states = len(batch.state_R)
    tokens = batch.input_ids_BL.numel()
    head = 2 * states * shape.width * shape.vocabulary
    passes = _body(shape, tokens, scores, recomputed=recomputed, reference=reference)
    return passes + 2 * head + reference * head  # the log-probabilities, and their gradient in the same pass


def padded(shape: Shape, pairs: Sequence[EncodedPair], *, recomputed: bool, reference: bool, compact: bool) -> float:
    """Operations of one micro-batch of TRL's: both sequences of each pair, padded to the longest."""
    columns = max(max_sequence_tokens(pair) for pair in pairs)
    sequences = 2 * len(pairs)
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    states = scored if compact else sequences * (columns - 1)
    head = 2 * states * shape.width * shape.vocabulary
    body = _body(shape, sequences * columns, sequences * columns * columns, recomputed=recomputed, reference=reference)
    return body + 3 * head + reference * head  # its backward pass makes the logits again


def _body(shape: Shape, tokens: int, scores: int, *, recomputed: bool, reference: bool) -> float:
    """All layers: forward, again if `recomputed`, backward to inputs and adapter; `reference` is one more forward."""
    forward = 2 * tokens * shape.linear
    adapter = 2 * tokens * shape.lora
    # two products forward, and five backward with the scores made again, as fused attention does
    attended = 2 * scores * shape.heads * shape.head_width * shape.layers
    once = forward + adapter + 2 * attended
    backward = forward + 2 * adapter + 5 * attended
    return once * (1 + recomputed) + backward + reference * (forward + 2 * attended)


def matmul_rate(shape: Shape, here: Device, tokens: int = 2048) -> float:
    """Operations per second of the step's own largest product, the median over two seconds."""
    place = here.torch_device
    x_TD = torch.randn(tokens, shape.width, dtype=here.torch_dtype, device=place)
    weight_ID = torch.randn(shape.inner, shape.width, dtype=here.torch_dtype, device=place)
    seconds: list[float] = []
    while sum(seconds) < 2:
        started = time.perf_counter()
        torch.nn.functional.linear(x_TD, weight_ID)
        if here.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * tokens * shape.width * shape.inner / statistics.median(seconds)
