"""Shards decoder layers across ranks with PyTorch's FSDP2."""

import os

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes


def fsdp2_shard(body: nn.Module, layers: list[nn.Module], frozen: set[nn.Parameter], device: Device) -> None:
    """Keep only this rank's shard of each `frozen` parameter; all of them belong to `layers`."""
    mesh, reshard = init_device_mesh(device.type, (processes.world_size(),)), _reshard_after_forward()
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, ignored_params=set(layer.parameters()) - frozen)
    # the root shards no parameter itself, but FSDP2 expects the call of sharded layers to begin in an FSDP root
    fully_shard(body, mesh=mesh, reshard_after_forward=reshard, ignored_params=set(body.parameters()) - frozen)


def fsdp2_local_tensor(parameter: nn.Parameter) -> Tensor:
    """The shard of a parameter that is on this rank."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def fsdp2_unshard(body: nn.Module) -> None:
    """Gather every layer and keep it gathered."""
    for module in _fsdp_modules(body):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def fsdp2_reshard(body: nn.Module) -> None:
    """Undo `fsdp2_unshard`."""
    for module in _fsdp_modules(body):
        module.set_reshard_after_forward(_reshard_after_forward(), recurse=False)
        module.reshard()


def _fsdp_modules(body: nn.Module) -> list[FSDPModule]:
    return [module for module in body.modules() if isinstance(module, FSDPModule)]


def _reshard_after_forward() -> bool:
    """Whether a layer is freed after its forward pass and gathered again for backward; a key of accelerate's file."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
