"""Shares decoder layers out among the processes by PyTorch's FSDP2."""

import os

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes


def fsdp2_shard(body: nn.Module, layers: list[nn.Module], frozen: set[nn.Parameter], device: Device) -> None:
    """Leave this process its part of each of the `frozen` parameters, which lie in `layers`."""
    mesh, reshard = init_device_mesh(device.type, (processes.world_size(),)), _reshards()
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, ignored_params=set(layer.parameters()) - frozen)
    # the root, which holds nothing itself: what calls the body must not meet sharded layers without it
    fully_shard(body, mesh=mesh, reshard_after_forward=reshard, ignored_params=set(body.parameters()) - frozen)


def fsdp2_local_tensor(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this process holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def fsdp2_unshard(body: nn.Module) -> None:
    """Make every layer whole, and let it stay so."""
    for each in _sharded(body):
        each.set_reshard_after_forward(False, recurse=False)
        each.unshard()


def fsdp2_reshard(body: nn.Module) -> None:
    """Undo `fsdp2_unshard`."""
    for each in _sharded(body):
        each.set_reshard_after_forward(_reshards(), recurse=False)
        each.reshard()


def _sharded(body: nn.Module) -> list[FSDPModule]:
    return [module for module in body.modules() if isinstance(module, FSDPModule)]


def _reshards() -> bool:
    """Whether a layer is gathered anew for its backward pass; `fsdp_reshard_after_forward` in accelerate's file."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
