"""Restores a base model after a run, so that the next run finds it as it was loaded."""

from collections.abc import Callable
from typing import Any

from torch import nn


def snapshot_base(base: nn.Module) -> Callable[[], None]:
    """Record the modules of `base`, their attributes and hooks, and which parameters require gradients.

    Returns a function that restores them. Restoring removes anything attached since, by PEFT, `fuse_lora` or gradient
    checkpointing, even partially. Tensor values are not copied: nothing here changes the base's weights.
    """
    modules = [(module, _copy_attributes(vars(module))) for module in base.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in base.parameters()]

    def restore_base() -> None:
        for module, saved_attributes in modules:
            attributes = vars(module)
            attributes.clear()
            for name, (value, content) in saved_attributes.items():
                attributes[name] = value
                if content is not None:
                    value.clear()
                    value.update(content)
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None

    return restore_base


def _copy_attributes(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, with a shallow copy if it is a dictionary or a set: submodules, parameters, hooks."""
    return {
        name: (value, value.copy() if isinstance(value, dict | set) else None) for name, value in attributes.items()
    }
