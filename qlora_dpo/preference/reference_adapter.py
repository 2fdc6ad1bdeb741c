"""What the adapter is while the reference answers: off, a frozen copy, or a copy that follows the policy."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from qlora_dpo.model.lora import adapter_disabled, trainable_parameters
from qlora_dpo.recipe.reference import EmaReference


@dataclass(frozen=True)
class ReferenceAdapter:
    """The weights that the adapter has while the reference answers, by the names of its parameters; None: it is off.

    With `ema` they move along with the policy, so no answer can be kept for later.
    """

    weights: Mapping[str, Tensor] | None = None
    ema: EmaReference | None = None


ADAPTER_OFF = ReferenceAdapter()


def clone_adapter(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's weights as they are now, a few MB, beside them on the device."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


@contextmanager
def as_reference(model: nn.Module, reference: ReferenceAdapter = ADAPTER_OFF) -> Iterator[None]:
    """Run `model` as the reference. Nothing is copied: the adapter's parameters point at the held weights meanwhile."""
    if reference.weights is None:
        with adapter_disabled(model):
            yield
        return
    own = {name: parameter.data for name, parameter in trainable_parameters(model).items()}
    _set_adapter_weights(model, reference.weights)
    try:
        yield
    finally:
        _set_adapter_weights(model, own)


def _set_adapter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in trainable_parameters(model).items():
        parameter.data = weights[name]


@torch.no_grad()
def sync_reference(model: nn.Module, reference: ReferenceAdapter, step: int) -> None:
    """Move the reference after optimizer step `step`, if it follows and its time has come.

    Gorbatovski et al. 2024: every tau steps reference = alpha * policy + (1 - alpha) * reference. Of an adapter it is A
    and B that are averaged, as TRL averages all weights; their product is close to the average of the products.
    """
    if reference.ema is None or reference.weights is None or step % reference.ema.ref_model_sync_steps:
        return
    alpha = reference.ema.ref_model_mixup_alpha
    for name, parameter in trainable_parameters(model).items():
        reference.weights[name].mul_(1 - alpha).add_(parameter, alpha=alpha)
