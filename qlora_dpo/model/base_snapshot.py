"""Remembers a base as it was loaded, so that after a run it can serve another as if nobody had touched it."""

from collections.abc import Callable
from typing import Any

from torch import nn


def snapshot_base(base: nn.Module) -> Callable[[], None]:
    """A function that puts `base` back to what it is now: its modules, their attributes and hooks, what is trained.

    Whatever was attached meanwhile, by PEFT, by `fuse_lora` or for gradient checkpointing, and however far that got,
    falls off. The values of tensors are not copied: what runs here changes none of the base's.
    """
    modules = [(module, _copy_attributes(vars(module))) for module in base.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in base.parameters()]

    def restore_base() -> None:
        for module, attributes in modules:
            own = vars(module)
            own.clear()
            for name, (value, content) in attributes.items():
                own[name] = value
                if content is not None:
                    value.clear()
                    value.update(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None

    return restore_base


def _copy_attributes(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a copy of its content, if it is a dictionary or a set: of submodules, parameters, hooks."""
    return {
        name: (value, value.copy() if isinstance(value, dict | set) else None) for name, value in attributes.items()
    }
