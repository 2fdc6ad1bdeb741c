"""Activations that a layer saves for the backward pass, measured by running the real code on fake tensors."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.activation_memory import ActivationBytes, measure_pass
from qlora_dpo.model.decoder_layers import checkpointable_layers, layer_stack
from qlora_dpo.model.device import Device
from qlora_dpo.preference.logps import hidden_states
from qlora_dpo.preference.pack import MicroBatch, Packing, collate

PROBE_LAYERS = 2
"""Where all layers are alike, this many and twice as many are traced: each further layer adds the same."""
DUMMY_PAIRS = [
    EncodedPair(tuple(range(2, 50)), tuple(range(2, 34)), tuple(range(34, 2, -1)), row, b"") for row in range(4)
]
"""Only their lengths matter."""


def activation_bytes_per_token(
    model: PeftModel, device: Device, *, packed: bool = True, pairs: Sequence[EncodedPair] = DUMMY_PAIRS
) -> ActivationBytes:
    """Bytes a layer saves per token in packed rows, or in padded batches; `model` is on meta, with its adapter."""
    batch = collate(pairs, Packing(10**6, 0, device.attention if packed else None))
    if device.attention != "spans" and batch.layout is not None:
        batch.layout.index  # noqa: B018 - values decide which tokens these are, so they are computed before only shapes are left
    mode, training = FakeTensorMode(allow_non_fake_inputs=True), model.training
    where, many = replace(device, type="cpu"), len(checkpointable_layers(model))
    measure = partial(_measure_activations, model.train(), batch, where, mode)
    try:
        if not _has_uniform_layers(model) or many <= 2 * PROBE_LAYERS:
            return measure(many)
        more, few = measure(2 * PROBE_LAYERS), measure(PROBE_LAYERS)
        # the first layer, whose input needs no gradient, keeps less than the others
        total = few.layer * PROBE_LAYERS + (more.layer * 2 * PROBE_LAYERS - few.layer * PROBE_LAYERS) / PROBE_LAYERS * (
            many - PROBE_LAYERS
        )
        return replace(more, layer=total / many)
    finally:
        model.train(training)


def _has_uniform_layers(model: PeftModel) -> bool:
    """True if all layers have the same class, shapes and adapter."""
    kinds = {
        (type(layer), *((name, each.shape, each.requires_grad) for name, each in layer.named_parameters()))
        for layer in checkpointable_layers(model)
    }
    return len(kinds) == 1 and layer_stack(model) is not None


def _measure_activations(
    model: Any, batch: MicroBatch, device: Device, mode: FakeTensorMode, layers: int
) -> ActivationBytes:
    """`activation_bytes_per_token` of a model that has the first `layers` layers alone."""
    holder, cpu = layer_stack(model), torch.device("cpu")
    whole = holder.layers if holder is not None else []
    if holder is not None:
        holder.layers = nn.ModuleList(list(whole)[:layers])
    try:
        for module in model.modules():
            _fake_parameters(module, mode, cpu)
        with mode:
            return measure_pass(model, partial(hidden_states, model, batch, device), batch.input_ids_BL.numel())
    finally:
        model.zero_grad()
        if holder is not None:
            holder.layers = whole


def _fake_parameters(module: Any, mode: FakeTensorMode, cpu: torch.device) -> None:
    """Make the meta tensors of `module` fake CPU tensors: still only shapes, but attention and autocast work."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else FakeTensor(mode, tensor.to("meta"), cpu)

    for name, weight in module.named_parameters(recurse=False):
        if not isinstance(weight.data, FakeTensor):
            module.register_parameter(name, nn.Parameter(fake(weight.data), requires_grad=weight.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, fake(buffer))
    if isinstance(getattr(module, "dense_weight", None), torch.Tensor):
        module.dense_weight = fake(module.dense_weight)
