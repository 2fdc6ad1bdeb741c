"""Shares the base's decoder layers out among the processes, where accelerate's config file asks for it.

Each process keeps its part of every frozen layer, and gathers a layer when its turn comes. Adapter, embeddings, last
norm and head stay whole in each: gradients, optimizer and checkpoints are those of processes that share nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.memory import checkpointable
from qlora_dpo.recipe.model import LoraTable, ModelTable

NAMES = {"fsdp2": "FSDP2", "zero3": "DeepSpeed's ZeRO-3"}


def insist_on_shardable(model: ModelTable, lora: LoraTable) -> None:
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


def share_out(model: Any, device: Device) -> str:
    """Leave this process its part of each frozen layer of a PEFT model; says what it keeps.

    For FSDP2 all frozen weights must be floats, as 4-bit ones are if they were loaded so (model/base.py).
    """
    body, way, name = _body(model), _way(), NAMES[processes.sharing()]
    layers = checkpointable(body)
    if not layers:
        whole = type(model.get_base_model()).__name__
        raise RecipeError(f"{whole} has no decoder layers that could be sharded; train without {name}")
    before = held_bytes(body)
    frozen = {each for layer in layers for each in layer.parameters() if not each.requires_grad}
    way.split(body, layers, frozen, device)
    if device.type == "cuda":  # pragma: cuda
        torch.cuda.empty_cache()
    return (
        f"weights: {len(layers)} layers are shared out among {processes.count()} processes ({name}): "
        f"{held_bytes(body) / 2**20:,.1f} MiB of {before / 2**20:,.1f} are kept here"
    )


def held_bytes(model: nn.Module) -> int:
    """Bytes of the weights that this process holds."""
    return sum(held(each).numel() * each.element_size() for each in model.parameters())


def held(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this process holds."""
    part: Tensor = _way().held(parameter)
    return part


def gather(model: Any) -> None:
    """Make every layer whole again in each process, which need not go on together from here."""
    if processes.sharded():
        _way().gather(_body(model))


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Make every layer whole for a while, so that a process can use the model alone."""
    gather(model)
    yield
    if processes.sharded():
        _way().split_again(_body(model))


def _body(model: Any) -> nn.Module:
    """What holds the decoder layers of a PEFT model, and is called with token ids."""
    whole = model.get_base_model()
    body: nn.Module = getattr(whole, whole.base_model_prefix)
    return body


def _way() -> ModuleType:
    """What shards here; imported only where it is asked for."""
    if processes.sharing() == "zero3":
        from qlora_dpo.model.distributed import zero3

        return zero3
    from qlora_dpo.model.distributed import fsdp2

    return fsdp2
