"""Shards decoder layers across ranks with DeepSpeed's ZeRO-3.

The DeepSpeed engine has no optimizer here: it gathers each layer for its forward pass, as for inference, and again for
its backward pass.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import deepspeed_engine

ENGINE = "_zero3_engine"
"""Name of the decoder body's attribute that holds its engine."""
ALWAYS_IN_USE = -1
"""Id of a module that does not exist, registered as using a parameter so that DeepSpeed never releases it."""


def zero3_shard(body: nn.Module, layers: list[nn.Module], frozen: set[nn.Parameter], device: Device) -> None:
    """Keep only this rank's shard of each `frozen` parameter; all of them belong to `layers`."""
    deepspeed_engine.require_deepspeed()
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers:
        set_z3_leaf_module(layer, True)  # gathered and released as one, whichever of its weights is read
    # not registered as a submodule, since the engine itself holds the body
    object.__setattr__(body, ENGINE, deepspeed_engine.initialize_engine(3, device, model=body))
    replicated: list[Any] = [parameter for parameter in body.parameters() if parameter not in frozen]
    for parameter in replicated:
        parameter.ds_active_sub_modules.add(ALWAYS_IN_USE)
    _gather(replicated)


def zero3_local_tensor(parameter: nn.Parameter) -> Tensor:
    """The shard of a parameter that is on this rank."""
    return parameter if parameter.numel() or not hasattr(parameter, "ds_tensor") else parameter.ds_tensor


def zero3_unshard(body: nn.Module) -> None:
    """Gather every layer and keep it gathered."""
    hooks = _engine(body).optimizer
    # the first layer's input needs no gradient, so no backward hook has released that layer
    hooks.release_backward_leftovers()
    hooks.destroy()
    _gather(_sharded_parameters(body))


def zero3_reshard(body: nn.Module) -> None:
    """Undo `zero3_unshard`."""
    for parameter in _sharded_parameters(body):
        parameter.partition()
    _engine(body).optimizer.setup_zero_stage3_hooks()


def _engine(body: nn.Module) -> Any:
    return body.__dict__[ENGINE]


def _sharded_parameters(body: nn.Module) -> list[Any]:
    parameters: list[Any] = list(body.parameters())
    return [parameter for parameter in parameters if ALWAYS_IN_USE not in parameter.ds_active_sub_modules]


def _gather(parameters: Sequence[Any]) -> None:
    if parameters:
        parameters[0].all_gather(param_list=list(parameters))
