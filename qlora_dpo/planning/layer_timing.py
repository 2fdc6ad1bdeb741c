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

from qlora_dpo.data.encoded import EncodedPair, lengths
from qlora_dpo.model import attention
from qlora_dpo.model.device import Device
from qlora_dpo.model.fused_lora import make_lean
from qlora_dpo.model.lora import attach
from qlora_dpo.model.memory import give_back_freed_memory, keep_freed_memory
from qlora_dpo.model.quantized import compute_with_dequantized_weights, keep_dense
from qlora_dpo.model.sources import Source
from qlora_dpo.preference.logps import hidden_states, score
from qlora_dpo.preference.pack import STATES_AT_ONCE, MicroBatch, Packing, collate, micro_batches
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.training.meta_model import stack

WORDS = {"cpu": 2**14, "cuda": 2**17}
"""Words of the probe's vocabulary at most. The head works in tiles of fewer, so its time grows with their number."""
SECONDS_A_PASS = 0.3
"""How long a pass may take; one that would take longer is timed on fewer pairs."""
SECONDS, TIMES = 0.4, 9
"""A pass is repeated for so long, or so often."""


@dataclass(frozen=True)
class Pace:
    """Seconds of the parts of a pass; `step` is a forward pass that keeps what its backward pass needs, and that."""

    layer_forward: float
    """Of one layer, for one token."""
    layer_step: float
    head_forward: float
    """Of embeddings, last norm and head, for one state that predicts an answer token."""
    head_step: float
    probe: float
    """What finding that out took."""


def measure(
    source: Source, recipe: Recipe, device: Device, pairs: Sequence[EncodedPair], packing: Packing, *, dense: bool
) -> Pace:
    """Time one layer and the head on the largest row of `pairs`, as a run on `device` would compute them.

    All layers are taken to be as fast as the first. With `dense`, its weights are kept in the compute dtype.
    Raises RuntimeError for a model whose layers are not found, and whatever the model raises.
    """
    began = time.monotonic()
    model, share = _one_layer(source, recipe, device, packing, dense)
    rows = [[pairs[index] for index in group] for group in micro_batches(pairs, packing)]
    row = max(rows, key=lambda row: lengths(row).sum())

    def laid_out(count: int) -> MicroBatch:
        batch, words = collate(row[:count], packing), model.get_input_embeddings().num_embeddings
        narrow = replace(batch, input_ids_BL=batch.input_ids_BL % words, target_N=batch.target_N % words)
        return narrow.to(device.torch_device)

    with _as_in_a_run(device):
        one = laid_out(1)
        _timed(partial(_body, model, one, device, backward=True), device, 1)
        alone = _timed(partial(_body, model, one, device, backward=True), device, 1)
        batch, states = laid_out(max(1, int(SECONDS_A_PASS / alone))), laid_out(_enough(row))
        forward, step = (partial(_body, model, batch, device, backward=each) for each in (False, True))
        whole = _timed(forward, device), _timed(step, device)
        with _without_layers(model):
            rest = _timed(forward, device), _timed(step, device)
            head = [_timed(partial(_head, model, states, device, backward=each), device) for each in (False, True)]
    tokens, answers = batch.input_ids_BL.numel(), len(states.state_R)
    return Pace(
        layer_forward=_less(whole[0], rest[0]) / tokens,
        layer_step=_less(whole[1], rest[1]) / tokens,
        head_forward=head[0] * share / answers,
        head_step=head[1] * share / answers,
        probe=time.monotonic() - began,
    )


def _enough(row: Sequence[EncodedPair]) -> int:
    """How many pairs fill a chunk of the head with states."""
    ends = np.cumsum(lengths(row)[:, 1:].sum(axis=1))
    return int(np.searchsorted(ends, STATES_AT_ONCE)) + 1


def _less(whole: float, rest: float) -> float:
    """The layer's part. The rest is a copy and a norm, so only a hiccup can make it the larger one."""
    return whole - rest if whole > rest else whole


def _one_layer(source: Source, recipe: Recipe, device: Device, packing: Packing, dense: bool) -> tuple[Any, float]:
    """The model with one layer, random weights and the adapter, and how many times more words it should have."""
    config = copy.deepcopy(AutoConfig.from_pretrained(source.folder, trust_remote_code=False))
    text = config.get_text_config()
    layers, words = text.num_hidden_layers, text.vocab_size
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == layers:  # the kind of each layer
            setattr(text, name, value[:1])
    text.num_hidden_layers, text.vocab_size = 1, min(words, WORDS[device.type])
    text.pad_token_id = None  # it may be none of the words that are left
    with device.torch_device:
        base: Any = AutoModelForCausalLM.from_config(config, dtype=device.weight_dtype, trust_remote_code=False)
    base.config.use_cache = False
    base.requires_grad_(False).eval()
    if not dense and recipe.model.quantization != "none":
        _quantize(base, recipe.model, device)
    if dense:
        keep_dense(base, device.torch_dtype)
    if packing.backend is not None:
        attention.use(base)
    model = attach(base, recipe.lora.model_copy(update={"layers_to_transform": None}), recipe.train.seed)
    make_lean(model, device.torch_dtype)
    if stack(model) is None:
        raise RuntimeError("its layers are not in one list")
    # what comes before the second layer of a real model needs a gradient too
    base.get_input_embeddings().register_forward_hook(_needs_gradient)
    return model.train(), words / text.vocab_size


def _needs_gradient(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _quantize(base: Any, table: ModelTable, device: Device) -> None:
    """Store the linear layers but the head as `load_base` would."""
    head = base.get_output_embeddings()
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and layer is not head:
                setattr(parent, name, _stored(layer, table, device).requires_grad_(False).eval())
    compute_with_dequantized_weights(base)


def _stored(layer: nn.Linear, table: ModelTable, device: Device) -> nn.Module:
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


def _body(model: Any, batch: MicroBatch, device: Device, *, backward: bool) -> None:
    """A pass through all but the head."""
    with torch.set_grad_enabled(backward):
        end_TD = hidden_states(model, batch, device)
    if backward:
        end_TD.sum().backward()
        model.zero_grad()


def _head(model: Any, batch: MicroBatch, device: Device, *, backward: bool) -> None:
    """A pass through embeddings, layers, if there are any, and head."""
    with torch.set_grad_enabled(backward):
        scores = score(model, batch, device)
    if backward:
        (scores.chosen_logp_P.sum() - scores.rejected_logp_P.sum()).backward()
        model.zero_grad()


@contextmanager
def _without_layers(model: Any) -> Iterator[None]:
    holder = stack(model)
    layers, holder.layers = holder.layers, nn.ModuleList()
    yield
    holder.layers = layers


@contextmanager
def _as_in_a_run(device: Device) -> Iterator[None]:
    """Inside, the C library keeps what is freed, as in a run on a CPU."""
    if device.type == "cpu":
        keep_freed_memory()
    try:
        yield
    finally:
        if device.type == "cpu":
            keep_freed_memory(keep=False)
            give_back_freed_memory()
        else:
            torch.cuda.empty_cache()


def _timed(work: Callable[[], None], device: Device, times: int = TIMES) -> float:
    """Median seconds of `work`, after one time that does not count where there are several."""
    if times > 1:
        work()
    taken = list[float]()
    while not taken or (len(taken) < times and sum(taken) < SECONDS):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _wait(device: Device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
