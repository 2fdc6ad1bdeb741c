"""Finds the decoder layers of a model, inside PEFT's wrapper or not, and selects those that are checkpointed."""

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_dpo.errors import ModelError


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper, or `model` itself if it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_body(model: Any) -> Any:
    """The transformers model without its output head; it is called with token ids and returns hidden states.

    Raises ModelError for a model that has no such part.
    """
    base = unwrap_peft(model)
    # Llama 4 keeps its decoder under another name than its class says
    inner = (child for child in base.children() if isinstance(child, PreTrainedModel))
    body = getattr(base, base.base_model_prefix, None) or next(inner, None)
    if body is None:
        raise ModelError(f"{type(base).__name__} has no decoder that can be run without its head; name another model")
    return body


def checkpointable_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers whose activations can be recomputed in the backward pass, in the model's order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def layer_stack(model: nn.Module) -> Any:
    """The module whose `layers` are exactly the checkpointable layers of `model`; None if there is no such module."""
    layers = checkpointable_layers(model)
    return next((module for module in model.modules() if list(getattr(module, "layers", ())) == layers), None)


def set_gradient_checkpointing(model: Any, count: int) -> None:
    """Recompute the activations of the first `count` layers in the backward pass; the others keep theirs."""
    if count:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for index, layer in enumerate(checkpointable_layers(model)):
        layer.gradient_checkpointing = index < count
