"""Shares the base's decoder layers out among the processes, where accelerate's config file asks for FSDP2.

Each process keeps its part of every frozen layer, and gathers a layer when its turn comes. Adapter, embeddings, last
norm and head stay whole in each: gradients, optimizer and checkpoints are those of processes that share nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from qlora_dpo.errors import RecipeError
from qlora_dpo.model import processes
from qlora_dpo.model.budget import checkpointable
from qlora_dpo.model.device import Device
from qlora_dpo.recipe_model import LoraTable, ModelTable


def insist_on_shardable(model: ModelTable, lora: LoraTable) -> None:
    """Raise RecipeError for what cannot be sharded."""
    if model.quantization == "int8":
        raise RecipeError(
            'model.quantization = "int8" cannot be sharded, since FSDP2 shards no integers; take "nf4", or '
            "recipes/accelerate/ddp.yaml"
        )
    if lora.use_dora and model.quantization != "none":
        raise RecipeError(
            "lora.use_dora reads whole 4-bit weights, which sharded layers do not have; leave it out, or take "
            "recipes/accelerate/ddp.yaml"
        )


def share_out(model: Any, device: Device) -> str:
    """Leave this process its part of each frozen layer of a PEFT model; says what it keeps.

    All frozen weights must be floats, as 4-bit ones are if they were loaded so (model/base.py).
    """
    whole = model.get_base_model()
    body = getattr(whole, whole.base_model_prefix)
    layers = checkpointable(body)
    if not layers:
        raise RecipeError(f"{type(whole).__name__} has no decoder layers that could be sharded; train without FSDP2")
    before = _bytes(body)
    mesh = init_device_mesh(device.type, (processes.count(),))
    reshard = _reshards()
    shared = {parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, ignored_params=set(layer.parameters()) - shared)
    # the root, which holds nothing itself: what calls the body must not meet sharded layers without it
    fully_shard(body, mesh=mesh, reshard_after_forward=reshard, ignored_params=set(body.parameters()) - shared)
    if device.type == "cuda":  # pragma: cuda
        torch.cuda.empty_cache()
    return (
        f"weights: {len(layers)} layers are shared out among {processes.count()} processes (FSDP2): "
        f"{_bytes(body) / 2**20:,.1f} MiB of {before / 2**20:,.1f} are kept here"
    )


def _bytes(model: nn.Module) -> int:
    """Bytes of the weights that this process holds."""
    held = (each.to_local() if hasattr(each, "to_local") else each for each in model.parameters())
    return sum(each.numel() * each.element_size() for each in held)


def gather(model: nn.Module) -> None:
    """Make every layer whole again in each process, which need not go on together from here."""
    for each in _sharded(model):
        each.set_reshard_after_forward(False, recurse=False)
        each.unshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Make every layer whole for a while, so that a process can use the model alone."""
    kept = _sharded(model)
    gather(model)
    yield
    for each in kept:
        each.set_reshard_after_forward(_reshards(), recurse=False)
        each.reshard()


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reshards() -> bool:
    """Whether a layer is gathered anew for its backward pass; `fsdp_reshard_after_forward` in accelerate's file."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
