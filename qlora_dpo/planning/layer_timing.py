"""How fast this machine is with a model, found out without its weights: one layer of random ones is timed.

V vocabulary.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_dpo.data.encoded import EncodedPair, pair_lengths
from qlora_dpo.model import attention
from qlora_dpo.model.decoder_layers import layer_stack
from qlora_dpo.model.device import Device
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.model.malloc import malloc_retain, malloc_trim
from qlora_dpo.model.quantized import cache_dequantized, compute_with_dequantized_weights
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference.logps import hidden_states, score_batch
from qlora_dpo.preference.pack import STATES_PER_CHUNK, MicroBatch, Packing, collate, micro_batches
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable

MAX_VOCAB_SIZE = {"cpu": 2**14, "cuda": 2**17}
"""Words of the probe's vocabulary at most. The head works in tiles of fewer, so its time grows with their number."""
MAX_PASS_SECONDS = 0.3
"""How long a pass may take; one that would take longer is timed on fewer pairs."""
MIN_TIMING_SECONDS, MAX_REPEATS = 0.4, 9
"""A pass is repeated for so long, or so often."""


@dataclass(frozen=True)
class LayerTiming:
    """Seconds of the parts of a pass; `step` is a forward pass that keeps what its backward pass needs, and that."""

    layer_forward: float
    """Of one layer, for one token."""
    layer_step: float
    head_forward: float
    """Of embeddings, last norm and head, for one state that predicts an answer token."""
    head_step: float
    probe_seconds: float
    """What finding that out took."""


def measure_layer_timing(
    source: ModelSource, recipe: Recipe, device: Device, pairs: Sequence[EncodedPair], packing: Packing, *, dense: bool
) -> LayerTiming:
    """Time one layer and the head on the largest row of `pairs`, as a run on `device` would compute them.

    All layers are taken to be as fast as the first. With `dense`, its weights are kept in the compute dtype.
    Raises RuntimeError for a model whose layers are not found, and whatever the model raises.
    """
    began = time.monotonic()
    model, share = _build_one_layer_model(source, recipe, device, packing, dense)
    rows = [[pairs[index] for index in group] for group in micro_batches(pairs, packing)]
    row = max(rows, key=lambda row: pair_lengths(row).sum())

    def collate_pairs(count: int) -> MicroBatch:
        batch, words = collate(row[:count], packing), model.get_input_embeddings().num_embeddings
        narrow = replace(batch, input_ids_BL=batch.input_ids_BL % words, target_N=batch.target_N % words)
        return narrow.to(device.torch_device)

    with _malloc_as_in_training(device):
        one = collate_pairs(1)
        _median_seconds(partial(_run_layers, model, one, device, backward=True), device, 1)
        alone = _median_seconds(partial(_run_layers, model, one, device, backward=True), device, 1)
        batch, states = collate_pairs(max(1, int(MAX_PASS_SECONDS / alone))), collate_pairs(_pairs_per_head_chunk(row))
        forward, step = (partial(_run_layers, model, batch, device, backward=each) for each in (False, True))
        whole = _median_seconds(forward, device), _median_seconds(step, device)
        with _without_layers(model):
            rest = _median_seconds(forward, device), _median_seconds(step, device)
            head = [
                _median_seconds(partial(_run_layers_and_head, model, states, device, backward=each), device)
                for each in (False, True)
            ]
    tokens, answers = batch.input_ids_BL.numel(), len(states.state_R)
    return LayerTiming(
        layer_forward=_layer_seconds(whole[0], rest[0]) / tokens,
        layer_step=_layer_seconds(whole[1], rest[1]) / tokens,
        head_forward=head[0] * share / answers,
        head_step=head[1] * share / answers,
        probe_seconds=time.monotonic() - began,
    )


def _pairs_per_head_chunk(row: Sequence[EncodedPair]) -> int:
    """How many pairs fill a chunk of the head with states."""
    ends = np.cumsum(pair_lengths(row)[:, 1:].sum(axis=1))
    return int(np.searchsorted(ends, STATES_PER_CHUNK)) + 1


def _layer_seconds(total: float, rest: float) -> float:
    """The layer's part. The rest is a copy and a norm, so only a hiccup can make it the larger one."""
    return total - rest if total > rest else total


def _build_one_layer_model(
    source: ModelSource, recipe: Recipe, device: Device, packing: Packing, dense: bool
) -> tuple[Any, float]:
    """The model with one layer, random weights and the adapter, and how many times more words it should have."""
    config = copy.deepcopy(AutoConfig.from_pretrained(source.folder, trust_remote_code=False))
    text = config.get_text_config()
    layers, words = text.num_hidden_layers, text.vocab_size
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == layers:  # the kind of each layer
            setattr(text, name, value[:1])
    text.num_hidden_layers, text.vocab_size = 1, min(words, MAX_VOCAB_SIZE[device.type])
    text.pad_token_id = None  # it may be none of the words that are left
    with device.torch_device:
        base: Any = AutoModelForCausalLM.from_config(config, dtype=device.weight_dtype, trust_remote_code=False)
    base.config.use_cache = False
    base.requires_grad_(False).eval()
    if not dense and recipe.model.quantization != "none":
        _quantize_linears(base, recipe.model, device)
    if dense:
        cache_dequantized(base, device.torch_dtype)
    if packing.backend is not None:
        attention.enable_packed_attention(base)
    model = attach_lora(base, recipe.lora.model_copy(update={"layers_to_transform": None}), recipe.train.seed)
    fuse_lora(model, device.torch_dtype)
    if layer_stack(model) is None:
        raise RuntimeError("its layers are not in one list")
    # what comes before the second layer of a real model needs a gradient too
    base.get_input_embeddings().register_forward_hook(_require_grad_hook)
    return model.train(), words / text.vocab_size


def _require_grad_hook(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _quantize_linears(base: Any, table: ModelTable, device: Device) -> None:
    """Store the linear layers but the head as `load_base` would."""
    head = base.get_output_embeddings()
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                setattr(parent, name, _quantized_linear(layer, table, device).requires_grad_(False).eval())
    compute_with_dequantized_weights(base)


def _quantized_linear(layer: nn.Linear, table: ModelTable, device: Device) -> nn.Module:
    sizes, made = (layer.in_features, layer.out_features, layer.bias is not None), Any
    if table.quantization == "int8":
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        kind, double = table.quantization, table.double_quant
        made = bnb.nn.Linear4bit(*sizes, device.torch_dtype, double, kind, device="meta")
        made.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=double, module=made
        )
    made.bias = layer.bias
    quantized: nn.Module = made.to(device.torch_device)
    return quantized


def _run_layers(model: Any, batch: MicroBatch, device: Device, *, backward: bool) -> None:
    """A pass through all but the head."""
    with torch.set_grad_enabled(backward):
        end_TD = hidden_states(model, batch, device)
    if backward:
        end_TD.sum().backward()
        model.zero_grad()


def _run_layers_and_head(model: Any, batch: MicroBatch, device: Device, *, backward: bool) -> None:
    """A pass through embeddings, layers, if there are any, and head."""
    with torch.set_grad_enabled(backward):
        scores = score_batch(model, batch, device)
    if backward:
        (scores.chosen_logp_P.sum() - scores.rejected_logp_P.sum()).backward()
        model.zero_grad()


@contextmanager
def _without_layers(model: Any) -> Iterator[None]:
    holder = layer_stack(model)
    layers, holder.layers = holder.layers, nn.ModuleList()
    yield
    holder.layers = layers


@contextmanager
def _malloc_as_in_training(device: Device) -> Iterator[None]:
    """Inside, the C library keeps what is freed, as in a run on a CPU."""
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


def _median_seconds(fn: Callable[[], None], device: Device, repeats: int = MAX_REPEATS) -> float:
    """Median seconds of `work`, after one time that does not count where there are several."""
    if repeats > 1:
        fn()
    taken = list[float]()
    while not taken or (len(taken) < repeats and sum(taken) < MIN_TIMING_SECONDS):
        _synchronize(device)
        began = time.perf_counter()
        fn()
        _synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _synchronize(device: Device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
