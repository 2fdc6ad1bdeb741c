"""Measures how fast this machine runs a model, by timing one layer with random weights.

V vocabulary.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import bitsandbytes as bnb
import numpy as np
import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_dpo.data.encoded import EncodedPair, pair_lengths
from qlora_dpo.model.decoder_layers import layer_stack
from qlora_dpo.model.device import Device
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.model.malloc import malloc_retain, malloc_trim
from qlora_dpo.model.packed.support import enable_packed_rows
from qlora_dpo.model.quantized import cache_dequantized, compute_with_dequantized_weights
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference.logps import hidden_states, score_batch
from qlora_dpo.preference.pack import STATES_PER_CHUNK, MicroBatch, Packing, collate, micro_batches
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable

MAX_VOCAB_SIZE = {"cpu": 2**14, "cuda": 2**17}
"""Largest vocabulary of the timed model. The head works in smaller tiles, so its time is scaled to the full one."""
MAX_PASS_SECONDS = 0.2
"""Longest pass to time, in seconds; a slower one is timed on fewer pairs."""
MAX_IDLE_LOAD = 0.1
"""Cores that other processes may keep busy on a machine that counts as idle."""
MIN_TIMING_SECONDS, MAX_REPEATS = 0.2, 9
"""A pass is repeated until either is reached."""


@dataclass(frozen=True)
class LayerTiming:
    """Seconds by part of a pass; a `step` is a forward and a backward pass."""

    layer_forward: float
    """One layer, per token."""
    layer_step: float
    head_forward: float
    """Embeddings, last norm and head, per hidden state that predicts an answer token."""
    head_step: float
    probe_seconds: float
    """Seconds that the measurement took."""
    other_load: float = 0.0
    """CPU cores that other processes kept busy meanwhile."""


def measure_layer_timing(
    source: ModelSource, recipe: Recipe, device: Device, pairs: Sequence[EncodedPair], packing: Packing, *, dense: bool
) -> LayerTiming:
    """Time one layer and the head on the largest row of `pairs`, computed as in a run on `device`.

    All layers are assumed to be as fast as the first. With `dense`, its weights are dequantized once and kept in the
    compute dtype. Raises RuntimeError for a model whose layers are not found, and whatever the model raises.
    """
    start, load = time.monotonic(), CpuLoad()
    model, vocab_scale = _build_one_layer_model(source, recipe, device, packing, dense)
    rows = [[pairs[index] for index in group] for group in micro_batches(pairs, packing)]
    row = max(rows, key=lambda row: pair_lengths(row).sum())

    def collate_pairs(count: int) -> MicroBatch:
        batch, vocab_size = collate(row[:count], packing), model.get_input_embeddings().num_embeddings
        clipped = replace(batch, input_ids_BL=batch.input_ids_BL % vocab_size, target_N=batch.target_N % vocab_size)
        return clipped.to(device.torch_device)

    with _malloc_as_in_training(device):
        one_pair = collate_pairs(1)
        _seconds(partial(_run_layers, model, one_pair, device, backward=True), device, 1)
        pair_seconds = _seconds(partial(_run_layers, model, one_pair, device, backward=True), device, 1)
        batch = collate_pairs(max(1, int(MAX_PASS_SECONDS / pair_seconds)))
        head_batch = collate_pairs(_pairs_per_head_chunk(row))
        forward, step = (partial(_run_layers, model, batch, device, backward=backward) for backward in (False, True))
        total = _seconds(forward, device), _seconds(step, device)
        with _without_layers(model):
            rest = _seconds(forward, device), _seconds(step, device)
            head = [
                _seconds(partial(_run_layers_and_head, model, head_batch, device, backward=backward), device)
                for backward in (False, True)
            ]
    tokens, states = batch.input_ids_BL.numel(), len(head_batch.state_R)
    return LayerTiming(
        layer_forward=_layer_seconds(total[0], rest[0]) / tokens,
        layer_step=_layer_seconds(total[1], rest[1]) / tokens,
        head_forward=head[0] * vocab_scale / states,
        head_step=head[1] * vocab_scale / states,
        probe_seconds=time.monotonic() - start,
        other_load=load.other_cores(),
    )


def _pairs_per_head_chunk(row: Sequence[EncodedPair]) -> int:
    """Number of pairs whose states fill one chunk of the head."""
    states_so_far = np.cumsum(pair_lengths(row)[:, 1:].sum(axis=1))
    return int(np.searchsorted(states_so_far, STATES_PER_CHUNK)) + 1


def _layer_seconds(total: float, rest: float) -> float:
    """The layer's share of `total`. The rest is a copy and a norm, so it is larger only through a hiccup in timing."""
    return total - rest if total > rest else total


def _build_one_layer_model(
    source: ModelSource, recipe: Recipe, device: Device, packing: Packing, dense: bool
) -> tuple[Any, float]:
    """The model with one layer, random weights and the adapter, and how many times larger its vocabulary really is."""
    config = copy.deepcopy(AutoConfig.from_pretrained(source.folder, trust_remote_code=False))
    text_config = config.get_text_config()
    num_layers, vocab_size = text_config.num_hidden_layers, text_config.vocab_size
    for name, value in vars(text_config).items():
        if isinstance(value, list) and len(value) == num_layers:  # one entry per layer, such as `layer_types`
            setattr(text_config, name, value[:1])
    text_config.num_hidden_layers, text_config.vocab_size = 1, min(vocab_size, MAX_VOCAB_SIZE[device.type])
    text_config.pad_token_id = None  # it may lie outside the smaller vocabulary
    with device.torch_device:
        base: Any = AutoModelForCausalLM.from_config(config, dtype=device.weight_dtype, trust_remote_code=False)
    base.config.use_cache = False
    base.requires_grad_(False).eval()
    if not dense and recipe.model.quantization != "none":
        _quantize_linears(base, recipe.model, device)
    if dense:
        cache_dequantized(base, device.torch_dtype)
    if packing.backend is not None:
        enable_packed_rows(base)
    model = attach_lora(base, recipe.lora.model_copy(update={"layers_to_transform": None}), recipe.train.seed)
    fuse_lora(model, device.torch_dtype)
    if layer_stack(model) is None:
        raise RuntimeError("its layers are not in one list")
    # as the input of every layer but the first does in a real model
    base.get_input_embeddings().register_forward_hook(_require_grad_hook)
    return model.train(), vocab_size / text_config.vocab_size


def _require_grad_hook(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _quantize_linears(base: Any, table: ModelTable, device: Device) -> None:
    """Quantize all linear layers except the head, as `load_base` would."""
    head = base.get_output_embeddings()
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                setattr(parent, name, _quantized_linear(layer, table, device).requires_grad_(False).eval())
    compute_with_dequantized_weights(base)


def _quantized_linear(layer: nn.Linear, table: ModelTable, device: Device) -> nn.Module:
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    quantized: Any
    if table.quantization == "int8":
        quantized = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        quantized.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        quant_type, double_quant = table.quantization, table.double_quant
        quantized = bnb.nn.Linear4bit(*sizes, device.torch_dtype, double_quant, quant_type, device="meta")
        quantized.weight = bnb.nn.Params4bit(
            layer.weight.data,
            requires_grad=False,
            quant_type=quant_type,
            compress_statistics=double_quant,
            module=quantized,
        )
    quantized.bias = layer.bias
    moved: nn.Module = quantized.to(device.torch_device)
    return moved


def _run_layers(model: Any, batch: MicroBatch, device: Device, *, backward: bool) -> None:
    """One pass through everything except the head."""
    with torch.set_grad_enabled(backward):
        hidden_TD = hidden_states(model, batch, device)
    if backward:
        hidden_TD.sum().backward()
        model.zero_grad()


def _run_layers_and_head(model: Any, batch: MicroBatch, device: Device, *, backward: bool) -> None:
    """One pass through embeddings, the layers that the model has at the time, and the head."""
    with torch.set_grad_enabled(backward):
        scores = score_batch(model, batch, device)
    if backward:
        (scores.chosen_logp_P.sum() - scores.rejected_logp_P.sum()).backward()
        model.zero_grad()


@contextmanager
def _without_layers(model: Any) -> Iterator[None]:
    stack = layer_stack(model)
    layers, stack.layers = stack.layers, nn.ModuleList()
    yield
    stack.layers = layers


@contextmanager
def _malloc_as_in_training(device: Device) -> Iterator[None]:
    """On a CPU, lets malloc retain freed memory inside the block, as during training."""
    if device.type == "cpu":
        malloc_retain()
    try:
        yield
    finally:
        if device.type == "cpu":
            malloc_retain(retain=False)
            malloc_trim()
        else:
            torch.cuda.empty_cache()


class CpuLoad:
    """What other processes have used of the CPU since this object was made."""

    def __init__(self) -> None:
        self.start, self.own, self.busy = time.perf_counter(), time.process_time(), _busy_seconds()

    def other_cores(self) -> float:
        """Cores that other processes kept busy, on average."""
        seconds = time.perf_counter() - self.start
        return max(0.0, _busy_seconds() - self.busy - self._own_seconds()) / seconds if seconds else 0.0

    def _own_seconds(self) -> float:
        return time.process_time() - self.own


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _seconds(fn: Callable[[], None], device: Device, repeats: int = MAX_REPEATS) -> float:
    """Seconds of a call of `fn` while nothing else runs, after one warm-up call unless `repeats` is 1.

    Those of the fastest call. Where other processes keep cores busy, threads wait for each other far longer than those
    cores would take; then one more call, in one thread, tells by its CPU seconds what the threads share.
    """
    if repeats > 1:
        fn()
    seconds, load = list[float](), CpuLoad()
    while not seconds or (len(seconds) < repeats and sum(seconds) < MIN_TIMING_SECONDS):
        _synchronize(device)
        start = time.perf_counter()
        fn()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    if device.type == "cpu" and load.other_cores() > MAX_IDLE_LOAD:
        return min(*seconds, cpu_seconds(fn) / torch.get_num_threads())
    return min(seconds)


def cpu_seconds(fn: Callable[[], None]) -> float:
    """CPU seconds of a call of `fn` in one thread, which other processes delay and hardly raise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        fn()
        return time.process_time() - start
    finally:
        torch.set_num_threads(threads)


def _synchronize(device: Device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
