"""Bytes per token that a model's layers keep for the backward pass, and how checkpointing changes them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.model.decoder_layers import checkpointable_layers, unwrap_peft
from qlora_dpo.model.live_tensors import LiveTensorBytes


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes per token of one layer's saved activations, of its input, and of its temporary tensors."""

    layer: float
    """Bytes per token that one layer saves for its backward pass."""
    layer_input: float
    """Bytes per token of the layer's input, which is all that a checkpointed layer keeps."""
    working: float = 0.0
    """Peak bytes per token that one layer's backward pass allocates on top of the saved activations."""
    forward: float = 0.0
    """Peak bytes per token of a forward pass without gradients, which saves nothing."""

    def bytes(self, tokens: int, layers: int, checkpointed: int) -> float:
        """Peak bytes of saved activations for `tokens` tokens if `checkpointed` of the `layers` are checkpointed.

        At the peak one checkpointed layer has been recomputed, so that it holds its full activations.
        """
        recomputed = self.layer if checkpointed else 0.0
        return tokens * ((layers - checkpointed) * self.layer + checkpointed * self.layer_input + recomputed)


def measure_activation_bytes(model: Any, forward: Callable[[], Tensor], tokens: int) -> ActivationBytes:
    """Run `forward` over `tokens` tokens and measure what autograd saves per token and layer."""
    return _forward_recorded(model, forward, tokens)[0]


def _forward_recorded(model: Any, forward: Callable[[], Tensor], tokens: int) -> tuple[ActivationBytes, Tensor]:
    """`measure_activation_bytes`, and the output of `forward`, whose backward pass can still be run."""
    layers, hidden_size = checkpointable_layers(model), model.config.get_text_config().hidden_size
    input_itemsize = model.get_input_embeddings().weight.dtype.itemsize
    parameter_storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def record_saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameter_storages:
            saved[storage._cdata] = storage.nbytes()
        return tensor.detach()  # a node that saves its own output would otherwise hold itself, and all before it

    def record_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal input_itemsize
        if inputs and isinstance(
            inputs[0], Tensor
        ):  # the hidden states may have another dtype than the stored embeddings
            input_itemsize = inputs[0].dtype.itemsize

    hooks = [layer.register_forward_pre_hook(record_input) for layer in layers[:1]]
    try:
        with torch.autograd.graph.saved_tensors_hooks(record_saved, lambda tensor: tensor):
            output = forward()
    finally:
        for hook in hooks:
            hook.remove()
    layer = sum(saved.values()) / tokens / max(1, len(layers))
    return ActivationBytes(layer=layer, layer_input=hidden_size * input_itemsize), output


def measure_pass(model: Any, forward: Callable[[], Tensor], tokens: int) -> ActivationBytes:
    """What `forward` over `tokens` tokens saves, and takes beside that, per token; tensors may be real or fake.

    The pass without gradients is measured with the adapter of `model`, without which it takes no more.
    """
    with LiveTensorBytes() as live:
        kept, end_TD = _forward_recorded(unwrap_peft(model), forward, tokens)
        before, live.peak = live.now, live.now
        end_TD.sum().backward()
    with torch.no_grad(), LiveTensorBytes() as without_gradients:
        forward()
    return replace(kept, working=(live.peak - before) / tokens, forward=without_gradients.peak / tokens)
