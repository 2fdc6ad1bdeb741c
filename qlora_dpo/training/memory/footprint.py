"""Sizes of base and adapter, measured without loading weights, and kept on disk."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import qlora_dpo
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.files import cached_record_path, read_cached_record, write_cached_record
from qlora_dpo.model.activation_memory import ActivationBytes, measure_pass
from qlora_dpo.model.decoder_layers import checkpointable_layers
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora, trainable_parameters
from qlora_dpo.model.packed.support import enable_packed_rows, packing_unsupported_reason
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference.logps import hidden_states
from qlora_dpo.preference.pack import Packing, collate
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states
from qlora_dpo.training.memory.meta_model import (
    base_config,
    base_weight_bytes,
    build_on_meta,
    linear_layers,
    logit_tile_bytes,
    mimic_quantized,
    optimizer_bytes,
)
from qlora_dpo.training.memory.traced_activations import activation_bytes_per_token
from qlora_dpo.training.memory.workload import Workload

FRAGMENTATION = {"cpu": 0.2, "cuda": 0.05}
"""Share of a step's allocations that is lost in holes between blocks of other lengths (benchmarks/README.md)."""


@dataclass(frozen=True)
class ModelFootprint:
    """Sizes that follow from the shapes of base and adapter, in bytes unless stated otherwise."""

    weight_bytes: Mapping[str, int]
    num_parameters: int
    """Parameters of the base."""
    num_trainable: int
    """Parameters of the adapter."""
    optimizer_state_bytes: int
    dense_bytes: int
    """The linear layers but the head in the compute dtype."""
    largest_layer_bytes: int
    """The largest linear layer in the compute dtype."""
    num_layers: int
    activations: ActivationBytes
    vocab_size: int
    """Tokens."""
    head_copy_bytes: int
    """The output head in the compute dtype, if it is stored in another."""
    head_tile_bytes: int
    head_bytes_per_token: int
    """Hidden states that the head reads, per token."""
    fragmentation: float
    """Share of a step's allocations that is lost in holes between blocks of other lengths."""
    fragmentation_bytes_per_token: int
    """Bytes by which a CPU process grows per token and recomputed layer beside all tensors: about its widest activation
    in float32, measured for two models (benchmarks/README.md). Not measured on a GPU."""
    file_bytes: int
    """The weights on disk."""
    padding_reason: str
    """Why pairs are padded; empty if they are packed."""
    unplanned_reason: str = ""
    """Why `activations` are not known, and 0, before the weights are loaded; empty if they are."""


_footprints: dict[tuple[str, ...], ModelFootprint] = {}


def measure_footprint(source: ModelSource, recipe: Recipe, device: Device, workload: Workload) -> ModelFootprint:
    """The footprint of a recipe's base and adapter; cached, also on disk: weights and row sizes do not change it."""
    config = (source.folder / "config.json").read_text(encoding="utf-8")
    quantization = recipe.model.model_dump_json(exclude={"name", "revision", "sha256"})
    lengths = f"{workload.max_sequence_tokens} {workload.max_pair_tokens}"
    key = (config, quantization, recipe.lora.model_dump_json(), recipe.train.optim, str(device), lengths)
    if key not in _footprints:
        file = cached_record_path(
            "footprints", [_code_digest(), key], ["torch", "transformers", "peft", "bitsandbytes"]
        )
        kept = _footprint_from(read_cached_record(file))
        if kept is None:
            before = get_rng_states()
            kept = _measure_footprint(source, recipe, device, workload)
            set_rng_states(before)  # attaching an adapter on meta seeds the generators, as a real one does
            if processes.is_main() and not kept.unplanned_reason:
                write_cached_record(file, asdict(kept))
        _footprints[key] = kept
    return _footprints[key]


@cache
def _code_digest() -> str:
    """SHA-256 of this package's source files, which decide what is measured."""
    digest = hashlib.sha256()
    for file in sorted(Path(qlora_dpo.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _footprint_from(record: dict[str, Any] | None) -> ModelFootprint | None:
    if record is None:
        return None
    return ModelFootprint(**{**record, "activations": ActivationBytes(**record["activations"])})


def _measure_footprint(source: ModelSource, recipe: Recipe, device: Device, workload: Workload) -> ModelFootprint:
    stored: torch.dtype | None = base_config(source).dtype
    base = build_on_meta(source, device)
    linear, itemsize = linear_layers(base), device.torch_dtype.itemsize
    weights = base_weight_bytes(base, recipe.model, device)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    elements = [layer.weight.numel() for layer in linear]
    widest = max((features for layer in linear for features in layer.weight.shape), default=0)
    padded = packing_unsupported_reason(base)
    head, width = base.get_output_embeddings().weight, base.config.get_text_config().hidden_size
    model = _with_adapter(base, recipe, device, packed=not padded)
    trained = trainable_parameters(model)
    pairs, unplanned = [workload.longest_pair()], ""
    activations, failure = _try_activations(model, device, pairs, packed=not padded)
    if failure and not padded:
        # a layer that cannot read packed rows, as the loaded model will find too
        padded = f"in packed rows {device.attention} fails ({failure})"
        model = _with_adapter(build_on_meta(source, device), recipe, device, packed=False)
        activations, failure = _try_activations(model, device, pairs, packed=False)
    if failure:
        unplanned = f"its layers cannot be run without weights ({failure})"
    return ModelFootprint(
        weight_bytes=weights,
        num_parameters=parameters,
        num_trainable=sum(parameter.numel() for parameter in trained.values()),
        optimizer_state_bytes=optimizer_bytes(trained, recipe.train),
        dense_bytes=sum(elements) * itemsize,
        largest_layer_bytes=max(elements, default=0) * itemsize,
        num_layers=len(checkpointable_layers(base)),
        activations=activations,
        vocab_size=len(head),
        head_copy_bytes=head.numel() * itemsize if head.dtype != device.torch_dtype else 0,
        head_tile_bytes=logit_tile_bytes(len(head), device),
        head_bytes_per_token=width * (4 + itemsize),
        fragmentation=FRAGMENTATION[device.type],
        fragmentation_bytes_per_token=4 * widest if device.type == "cpu" else 0,
        file_bytes=parameters * (stored or torch.float32).itemsize,
        padding_reason=padded,
        unplanned_reason=unplanned,
    )


def _with_adapter(base: Any, recipe: Recipe, device: Device, *, packed: bool) -> PeftModel:
    """`base`, on meta, as a run trains it."""
    linear = linear_layers(base)
    if packed:
        enable_packed_rows(base)
    model = attach_lora(base, recipe.lora, recipe.train.seed)
    mimic_quantized(linear, recipe.model, device)
    fuse_lora(model, device.torch_dtype)
    return model


def _try_activations(
    model: PeftModel, device: Device, pairs: Sequence[EncodedPair], *, packed: bool
) -> tuple[ActivationBytes, str]:
    """`activation_bytes_per_token`, and why it fails; any model may do what shapes alone do not allow.

    Routing to experts depends on values, and so do some masks; a kernel may have no rule for shapes.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints a traceback for each failure
    try:
        return activation_bytes_per_token(model, device, packed=packed, pairs=pairs), ""
    except QloraDpoError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].partition(". ")[0].rstrip(".")
        return ActivationBytes(0, 0), f"{type(error).__name__}: {reason}"
    finally:
        log.setLevel(level)


def measure_loaded(
    footprint: ModelFootprint, model: Any, pair: EncodedPair, packing: Packing, device: Device
) -> ModelFootprint:
    """`footprint` with the activations that were unknown before: measured on the loaded model, by one pair.

    Takes a few passes, leaves no gradients, and changes no random state.
    """
    batch, states, training = collate([pair], packing).to(device.torch_device), get_rng_states(), model.training
    model.train()
    try:
        return replace(
            footprint,
            activations=measure_pass(model, partial(hidden_states, model, batch, device), batch.input_ids_BL.numel()),
            unplanned_reason="",
        )
    finally:
        model.train(training)
        model.zero_grad()
        set_rng_states(states)
