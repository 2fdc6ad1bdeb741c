"""Shards the base's decoder layers across ranks with FSDP2 or ZeRO-3, where accelerate's config file asks for it.

Each rank keeps its shard of every frozen layer and gathers a layer when it computes. Adapter, embeddings, final norm
and head are replicated, so gradients, optimizer and checkpoints are the same as in plain data-parallel training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.decoder_layers import checkpointable_layers, decoder_body
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.memory import free_cached_memory
from qlora_dpo.recipe.model import LoraTable, ModelTable

STRATEGY_NAMES = {"fsdp2": "FSDP2", "zero3": "DeepSpeed's ZeRO-3"}


def check_shardable(model: ModelTable, lora: LoraTable) -> None:
    """Raise RecipeError if the recipe asks for something that cannot be sharded."""
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
    """Shard the frozen decoder layers of a PEFT model; returns a sentence that says what this rank keeps.

    FSDP2 needs floating-point weights; 4-bit ones are loaded in a float storage dtype for it (model/base.py). Raises
    RecipeError for a model without decoder layers.
    """
    body, strategy = decoder_body(model), STRATEGY_NAMES[processes.sharding_strategy()]
    layers = checkpointable_layers(body)
    if not layers:
        model_class = type(model.get_base_model()).__name__
        raise RecipeError(f"{model_class} has no decoder layers that could be sharded; train without {strategy}")
    bytes_before = local_bytes(body)
    frozen = {parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad}
    _backend().shard(body, layers, frozen, device)
    if device.type == "cuda":  # pragma: cuda
        free_cached_memory()
    return (
        f"weights: {len(layers)} layers are sharded across {processes.world_size()} processes ({strategy}); "
        f"this one keeps {local_bytes(body) / 2**20:,.1f} of {bytes_before / 2**20:,.1f} MiB"
    )


def local_bytes(model: nn.Module) -> int:
    """Bytes of the weights that this rank holds."""
    shards = map(local_shard, model.parameters())
    return sum(shard.numel() * shard.element_size() for shard in shards)


def local_shard(parameter: nn.Parameter) -> Tensor:
    """The shard of a parameter that is on this rank."""
    return _backend().local_tensor(parameter)


def unshard_layers(model: Any) -> None:
    """Gather every layer on each rank and keep it there, so that ranks can run the model independently."""
    if processes.is_sharded():
        _backend().unshard(decoder_body(model))


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """Inside the context every layer is gathered, so that one rank can run the model alone."""
    unshard_layers(model)
    yield
    if processes.is_sharded():
        _backend().reshard(decoder_body(model))


class _Backend(NamedTuple):
    shard: Callable[[nn.Module, list[nn.Module], set[nn.Parameter], Device], None]
    local_tensor: Callable[[nn.Parameter], Tensor]
    unshard: Callable[[nn.Module], None]
    reshard: Callable[[nn.Module], None]


def _backend() -> _Backend:
    """The functions of the configured sharding strategy, imported only when needed."""
    if processes.sharding_strategy() == "zero3":
        from qlora_dpo.model.distributed import zero3

        return _Backend(zero3.zero3_shard, zero3.zero3_local_tensor, zero3.zero3_unshard, zero3.zero3_reshard)
    from qlora_dpo.model.distributed import fsdp2

    return _Backend(fsdp2.fsdp2_shard, fsdp2.fsdp2_local_tensor, fsdp2.fsdp2_unshard, fsdp2.fsdp2_reshard)
