"""Loads the base, lays out rows for it, and attaches the adapter that training starts from; each part is checked."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.data.lazy_sequence import concatenate_sequences
from qlora_dpo.model.base import check_vocabulary, disable_dropout, load_base, merge_obstacle
from qlora_dpo.model.decoder_layers import set_gradient_checkpointing
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes, sharding
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.model.malloc import malloc_release_eagerly, malloc_retain, malloc_trim
from qlora_dpo.model.memory import cache_dequantized_if_fits, free_bytes
from qlora_dpo.model.output_head import logit_map_of
from qlora_dpo.model.packed.attention import Backend
from qlora_dpo.model.quantized import stacked_weights
from qlora_dpo.model.saved_adapter import load_adapter_weights, opened_by_peft
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.packing_choice import choose_packing, shortest_pairs
from qlora_dpo.preference.reference_adapter import ADAPTER_OFF, ReferenceAdapter, clone_adapter
from qlora_dpo.preference.start_checks import (
    check_adapter_off_is_base,
    check_matches_peft,
    check_training_mode,
    probe_logits,
)
from qlora_dpo.recipe.reference import EmaReference
from qlora_dpo.training.engine import engine_of
from qlora_dpo.training.memory.footprint import ModelFootprint, measure_footprint, measure_loaded
from qlora_dpo.training.memory.row_plan import (
    adapter_bytes,
    choose_row_plan,
    conversion_bytes,
    dense_weight_budget,
    describe_row_plan,
    largest_row_tokens,
    reference_row_tokens,
    total_step_bytes,
)
from qlora_dpo.training.memory.workload import Workload, workload_of
from qlora_dpo.training.prepare import PreparedData

logger = logging.getLogger(__name__)

PROBE_TOKENS = 128
"""Tokens of a prompt's end and of a completion's beginning on which adapter-off is compared with the base."""


def largest_token_id(pairs: Sequence[EncodedPair]) -> int:
    """The largest token id of all pairs."""
    return max(max(pair.prompt + pair.chosen + pair.rejected) for pair in pairs)


@dataclass(frozen=True)
class LoadedBase:
    """The base before an adapter is attached; the runs of a sweep share it."""

    model: PreTrainedModel
    backend: Backend | None
    """How packed rows attend; None if the model can only be given padded batches."""
    probe_pair: EncodedPair
    probe_LV: Tensor
    """The base's logits (L, V) of `probe_pair`, on the CPU, which adapter-off must reproduce."""
    is_dense: bool
    """True if the linear weights are kept in the compute dtype beside their stored form."""


@dataclass(frozen=True)
class PreparedModel:
    """The model with its adapter, how pairs are laid out for it, and which adapter weights are the reference."""

    model: PeftModel
    packing: Packing
    reference_packing: Packing
    """Of the reference pass, whose rows may be larger."""
    reference_adapter: ReferenceAdapter = ADAPTER_OFF
    planned_bytes: int = 0
    """What a step takes beyond the loaded model, with gradients and the optimizer's state; 0 if it is not known."""


def load_base_for_run(prepared: PreparedData, device: Device) -> LoadedBase:
    """Load the base as this machine computes best with it, and choose a layout that is checked on these pairs."""
    recipe, is_trl = prepared.recipe, engine_of(prepared.recipe).is_trl
    pairs = concatenate_sequences([prepared.train.encoded, prepared.heldout.encoded])
    with malloc_release_eagerly() if device.type == "cpu" else nullcontext():
        base = load_base(prepared.source, recipe.model, device)
    check_vocabulary(base, prepared.tokenizer, lambda: largest_token_id(pairs), prepared.source)
    if dropout := disable_dropout(base):
        rates = ", ".join(f"{name} {rate:g}" for name, rate in sorted(dropout.items()))
        logger.info(f"dropout: the base's own is off ({rates}), since its reference has none; lora.lora_dropout acts")
    if mapped := logit_map_of(base, device).describe():
        logger.info(f"head: {mapped}, as in the model's own forward pass")
    if recipe.model.quantization != "none" and (stacked := stacked_weights(base)):
        size = sum(weight.numel() * weight.itemsize for weight in stacked.values()) / 2**30
        names = ", ".join(sorted({name.rpartition(".layers.")[2].partition(".")[2] or name for name in stacked}))
        logger.info(
            f"quantization: {names} take {size:.1f} GiB as they are: bitsandbytes quantizes linear layers, and these "
            "hold the weights of several experts"
        )
    is_dense = False
    if not is_trl and not processes.is_sharded():
        is_dense = _cache_dequantized(base, prepared, device)
    if not is_trl and device.type == "cpu":
        malloc_retain()
    packing, reason = choose_packing(base, pairs, prepared.padded, device)
    logger.info(f"layout: {reason}")
    (pair,) = shortest_pairs(pairs, 1)
    # its logits exist whole, 0.15 GiB for 256 tokens and a vocabulary of 152k, so they wait for the check on the CPU
    pair = replace(pair, prompt=pair.prompt[-PROBE_TOKENS:], chosen=pair.chosen[:PROBE_TOKENS])
    return LoadedBase(base, packing.backend, pair, probe_logits(base, pair, device).cpu(), is_dense)


def build_model(base: LoadedBase, prepared: PreparedData, device: Device, row_tokens: int | None) -> PreparedModel:
    """Attach the adapter that training starts from, and check that with the adapter off the model is the base.

    `row_tokens` is the row size of an earlier part of this run, where the recipe leaves it to memory ("auto").
    Raises ModelError if a check fails.
    """
    recipe = prepared.recipe
    packing = replace(prepared.padded, backend=base.backend, token_budget=row_tokens or recipe.train.row_tokens)
    model, reference_adapter = _attach(base, prepared, device)
    if obstacle := merge_obstacle(model, prepared.source):
        logger.info(obstacle)
    is_trl = engine_of(recipe).is_trl
    if not is_trl:
        logger.info(fuse_lora(model, device.torch_dtype))
    if processes.is_sharded():
        logger.info(sharding.shard_layers(model, device))
    for sentence in prepared.reference_spec.notes:
        logger.info(sentence)
    is_new = prepared.reference_spec.init_adapter is None
    check_adapter_off_is_base(
        model, base.probe_LV.to(device.torch_device), base.probe_pair, packing, device, fresh=is_new
    )
    if is_new:
        check_training_mode(model, base.probe_LV.to(device.torch_device), base.probe_pair, device)
    loaded = PreparedModel(model, packing, packing, reference_adapter)
    if not is_trl:
        loaded = _with_planned_rows(loaded, base, prepared, device, row_tokens)
    if device.type == "cpu":
        malloc_trim()  # what the checks took: blocks of other lengths than a step's
    return loaded


def _cache_dequantized(base: PreTrainedModel, prepared: PreparedData, device: Device) -> bool:
    """Keep dense weights if they fit beside the adapter and a row; True if they do."""
    footprint, workload = _footprint(prepared, device)
    if footprint.unplanned_reason and device.type == "cuda":  # what a step leaves is known when the model is loaded
        return False
    free = max(0, free_bytes(device) - sum(adapter_bytes(footprint, prepared.recipe).values()))
    longest = workload.longest_pair_tokens(padded=bool(footprint.padding_reason))
    headroom = dense_weight_budget(footprint, prepared.recipe.train, longest, free, device)
    is_dense, sentence = cache_dequantized_if_fits(base, device, headroom)
    logger.info(sentence)
    return is_dense


def _footprint(prepared: PreparedData, device: Device) -> tuple[ModelFootprint, Workload]:
    """What the plan before the run was made of, and the most tokens that go through the model."""
    workload = workload_of(prepared.train, prepared.heldout, prepared.recipe)
    return measure_footprint(prepared.source, prepared.recipe, device, workload), workload


def _with_planned_rows(
    loaded: PreparedModel,
    base: LoadedBase,
    prepared: PreparedData,
    device: Device,
    row_tokens: int | None,
) -> PreparedModel:
    """`loaded` with rows as memory allows, with as many layers checkpointed as they need."""
    recipe = prepared.recipe
    footprint, workload = _footprint(prepared, device)
    if footprint.unplanned_reason:
        footprint = measure_loaded(footprint, loaded.model, base.probe_pair, loaded.packing, device)
        logger.info("memory: what a token keeps was measured on the loaded model, with one pair")
    converted = 0 if base.is_dense else conversion_bytes(footprint, recipe, device)
    still_to_come = 4 * footprint.num_trainable + footprint.optimizer_state_bytes + converted
    longest = workload.longest_pair_tokens(padded=base.backend is None)
    free = processes.all_reduce_min(max(0, free_bytes(device) - still_to_come))  # all ranks have the same rows
    rows = choose_row_plan(footprint, recipe.train, longest, free, row_tokens)
    for sentence in describe_row_plan(footprint, recipe.train, rows, longest, free):
        logger.info(f"memory: {sentence}")
    set_gradient_checkpointing(loaded.model, rows.recomputed_layers)
    row_tokens = largest_row_tokens(rows, workload, longest)
    return replace(
        loaded,
        planned_bytes=still_to_come + total_step_bytes(footprint, row_tokens, rows.recomputed_layers),
        packing=replace(loaded.packing, token_budget=rows.tokens),
        reference_packing=replace(loaded.packing, token_budget=reference_row_tokens(footprint, rows, longest, device)),
    )


def _attach(base: LoadedBase, prepared: PreparedData, device: Device) -> tuple[PeftModel, ReferenceAdapter]:
    """The base with the adapter that training starts from, and the reference; saved adapters must equal PEFT's."""
    recipe, spec = prepared.recipe, prepared.reference_spec
    saved_adapters = [
        saved for saved in dict.fromkeys((spec.reference_adapter, spec.init_adapter)) if saved is not None
    ]
    opened_LV = {}
    for saved in saved_adapters:
        with opened_by_peft(base.model, saved) as opened:
            opened_LV[saved] = probe_logits(opened, base.probe_pair, device)
    # in evaluation mode: new layers would drop out inputs
    model, reference_weights = attach_lora(base.model, recipe.lora, recipe.train.seed).eval(), None
    for saved in saved_adapters:
        load_adapter_weights(model, saved)
        check_matches_peft(model, opened_LV[saved], base.probe_pair, device, saved.folder)
        if saved == spec.reference_adapter:
            reference_weights = clone_adapter(model)
    if isinstance(recipe.reference, EmaReference):
        return model, ReferenceAdapter(clone_adapter(model), recipe.reference)
    return model, ReferenceAdapter(reference_weights)
