"""Shares the base's decoder layers out among the processes, where accelerate's config file asks for it.

Each process keeps its part of every frozen layer, and gathers a layer when its turn comes. Adapter, embeddings, last
norm and head stay whole in each: gradients, optimizer and checkpoints are those of processes that share nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.memory import checkpointable_layers
from qlora_dpo.recipe.model import LoraTable, ModelTable

STRATEGY_NAMES = {"fsdp2": "FSDP2", "zero3": "DeepSpeed's ZeRO-3"}


def check_shardable(model: ModelTable, lora: LoraTable) -> None:
    """Raise RecipeError for what cannot be sharded."""
    if model.quantization == "int8":
        raise RecipeError(
            'model.quantization = "int8" cannot be sharded, since its weights are integers with scales of their own; '
            'take "nf4", or recipes/accelerate/ddp.yaml'
        )
    if lora.use_dora and model.quantization != "none":
        raise RecipeError(
            "lora.use_dora reads whole 4-bit weights, which sharded layers do not have; leave it out, or take "
            "recipes/accelerate/ddp.yaml"
        )


def shard_layers(model: Any, device: Device) -> str:
    """Leave this process its part of each frozen layer of a PEFT model; says what it keeps.

    For FSDP2 all frozen weights must be floats, as 4-bit ones are if they were loaded so (model/base.py).
    """
    body, name = _body(model), STRATEGY_NAMES[processes.sharding_strategy()]
    layers = checkpointable_layers(body)
    if not layers:
        whole = type(model.get_base_model()).__name__
        raise RecipeError(f"{whole} has no decoder layers that could be sharded; train without {name}")
    before = local_bytes(body)
    frozen = {each for layer in layers for each in layer.parameters() if not each.requires_grad}
    _backend().shard(body, layers, frozen, device)
    if device.type == "cuda":  # pragma: cuda
        torch.cuda.empty_cache()
    return (
        f"weights: {len(layers)} layers are shared out among {processes.world_size()} processes ({name}): "
        f"{local_bytes(body) / 2**20:,.1f} MiB of {before / 2**20:,.1f} are kept here"
    )


def local_bytes(model: nn.Module) -> int:
    """Bytes of the weights that this process holds."""
    return sum(local_shard(each).numel() * each.element_size() for each in model.parameters())


def local_shard(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this process holds."""
    return _backend().local_tensor(parameter)


def unshard_layers(model: Any) -> None:
    """Make every layer whole again in each process, which need not go on together from here."""
    if processes.is_sharded():
        _backend().unshard(_body(model))


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """Make every layer whole for a while, so that a process can use the model alone."""
    unshard_layers(model)
    yield
    if processes.is_sharded():
        _backend().reshard(_body(model))


def _body(model: Any) -> nn.Module:
    """What holds the decoder layers of a PEFT model, and is called with token ids."""
    whole = model.get_base_model()
    body: nn.Module = getattr(whole, whole.base_model_prefix)
    return body


class _Backend(NamedTuple):
    shard: Callable[[nn.Module, list[nn.Module], set[nn.Parameter], Device], None]
    local_tensor: Callable[[nn.Parameter], Tensor]
    unshard: Callable[[nn.Module], None]
    reshard: Callable[[nn.Module], None]


def _backend() -> _Backend:
    """What shards here; imported only where it is asked for."""
    if processes.sharding_strategy() == "zero3":
        from qlora_dpo.model.distributed import zero3

        return _Backend(zero3.zero3_shard, zero3.zero3_local_tensor, zero3.zero3_unshard, zero3.zero3_reshard)
    from qlora_dpo.model.distributed import fsdp2

    return _Backend(fsdp2.fsdp2_shard, fsdp2.fsdp2_local_tensor, fsdp2.fsdp2_unshard, fsdp2.fsdp2_reshard)
