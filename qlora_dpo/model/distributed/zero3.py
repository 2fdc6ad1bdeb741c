"""Shares decoder layers out among the processes by DeepSpeed's ZeRO-3.

DeepSpeed has no part in the optimizer here: its engine without one gathers each layer when its turn comes, as it does
for a model that only answers, and gathers it anew for the backward pass.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import deepspeed_engine

ENGINE = "_zero3_engine"
"""The attribute of the decoder body under which its engine is found."""
ALWAYS_IN_USE = -1
"""Counted as a module that always needs a parameter, so that DeepSpeed never lets it go."""


def zero3_shard(body: nn.Module, layers: list[nn.Module], frozen: set[nn.Parameter], device: Device) -> None:
    """Leave this process its part of each of the `frozen` parameters, which lie in `layers`."""
    deepspeed_engine.require_deepspeed()
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        set_z3_leaf_module(layer, True)  # gathered and left as one, whoever asks for a weight in it
    # not a submodule, since the engine holds the body
    object.__setattr__(body, ENGINE, deepspeed_engine.initialize_engine(3, device, model=body))
    whole: list[Any] = [each for each in body.parameters() if each not in frozen]
    for each in whole:
        each.ds_active_sub_modules.add(ALWAYS_IN_USE)
    _gather(whole)


def zero3_local_tensor(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this process holds."""
    return parameter if parameter.numel() or not hasattr(parameter, "ds_tensor") else parameter.ds_tensor


def zero3_unshard(body: nn.Module) -> None:
    """Make every layer whole, and let it stay so."""
    hooks = _engine(body).optimizer
    hooks.release_backward_leftovers()  # the first layer, whose input asks for no gradient that would end its turn
    hooks.destroy()
    _gather(_partitioned(body))


def zero3_reshard(body: nn.Module) -> None:
    """Undo `zero3_unshard`."""
    for each in _partitioned(body):
        each.partition()
    _engine(body).optimizer.setup_zero_stage3_hooks()


def _engine(body: nn.Module) -> Any:
    return body.__dict__[ENGINE]


def _partitioned(body: nn.Module) -> list[Any]:
    parameters: list[Any] = list(body.parameters())
    return [each for each in parameters if ALWAYS_IN_USE not in each.ds_active_sub_modules]


def _gather(parameters: Sequence[Any]) -> None:
    if parameters:
        parameters[0].all_gather(param_list=list(parameters))
