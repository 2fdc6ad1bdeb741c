"""The adapter weights used as reference policy: none (disabled), a frozen copy, or an EMA copy (TR-DPO)."""

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
    """The reference policy's adapter weights by parameter name; None: the adapter is disabled.

    With `ema` they follow the policy, so log-probabilities cannot be cached.
    """

    weights: Mapping[str, Tensor] | None = None
    ema: EmaReference | None = None


ADAPTER_OFF = ReferenceAdapter()


def clone_adapter(model: PeftModel) -> dict[str, Tensor]:
    """A copy of the adapter's current weights on the same device, a few MB."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


@contextmanager
def as_reference(model: nn.Module, reference: ReferenceAdapter = ADAPTER_OFF) -> Iterator[None]:
    """Run `model` as the reference. Nothing is copied: the adapter's parameters point to the reference's weights."""
    if reference.weights is None:
        with adapter_disabled(model):
            yield
        return
    policy_weights = {name: parameter.data for name, parameter in trainable_parameters(model).items()}
    _set_adapter_weights(model, reference.weights)
    try:
        yield
    finally:
        _set_adapter_weights(model, policy_weights)


def _set_adapter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in trainable_parameters(model).items():
        parameter.data = weights[name]


@torch.no_grad()
def sync_reference(model: nn.Module, reference: ReferenceAdapter, step: int) -> None:
    """Update an EMA reference after optimizer step `step`, every `ref_model_sync_steps` steps.

    Gorbatovski et al. 2024: every tau steps reference = alpha * policy + (1 - alpha) * reference. The matrices A and B
    of an adapter are averaged, as TRL averages all weights; their product is close to the average of the products.
    """
    if reference.ema is None or reference.weights is None or step % reference.ema.ref_model_sync_steps:
        return
    alpha = reference.ema.ref_model_mixup_alpha
    for name, parameter in trainable_parameters(model).items():
        reference.weights[name].mul_(1 - alpha).add_(parameter, alpha=alpha)
