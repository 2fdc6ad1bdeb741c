"""Computes the reference policy's log-probabilities before the first step, and checks them against a live pass."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.data.lazy_sequence import concatenate_sequences, select_items
from qlora_dpo.model.base import load_base
from qlora_dpo.model.device import Device
from qlora_dpo.model.malloc import malloc_retain
from qlora_dpo.model.memory import USABLE_FRACTION, cache_dequantized_if_fits, free_bytes, free_cached_memory
from qlora_dpo.preference.objective import needs_reference
from qlora_dpo.preference.packing_choice import choose_packing
from qlora_dpo.preference.reference import compute_reference_logps, fresh_reference_logps, model_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache, reference_cache_dir
from qlora_dpo.preference.start_checks import check_cached_logps, check_first_loss
from qlora_dpo.recipe.objective import reward_beta
from qlora_dpo.recipe.reference import ModelReference
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.build_model import PreparedModel
from qlora_dpo.training.context import PreferenceDataset
from qlora_dpo.training.engine import engine_of
from qlora_dpo.training.loss_columns import read_loss_columns
from qlora_dpo.training.oom_retry import row_attempts
from qlora_dpo.training.prepare import PreparedData

logger = logging.getLogger(__name__)

CHECKED_PAIRS = 4
"""Pairs on which the log-probabilities are checked."""

Datasets = tuple[PreferenceDataset, PreferenceDataset]
"""Training and held-out pairs with their reference log-probabilities."""


def open_reference_cache(prepared: PreparedData, device: Device) -> ReferenceLogpCache:
    """The cache for the reference's weights, quantization and arithmetic."""
    source, table, spec = prepared.source, prepared.recipe.model, prepared.reference_spec
    if isinstance(prepared.recipe.reference, ModelReference) and spec.reference_model is not None:
        source, table = spec.reference_model, prepared.recipe.reference.model_table()
    adapter = spec.reference_adapter.fingerprint if spec.reference_adapter else ""
    return ReferenceLogpCache(reference_cache_dir(source, table, device, prepared.padded.token_weighting, adapter))


def precompute_reference_logps(
    prepared: PreparedData, loaded: PreparedModel, device: Device, cache: ReferenceLogpCache, run_log: RunLog
) -> Datasets:
    """Both sets of pairs with their reference log-probabilities, from the cache or from the model with its adapter off.

    An EMA reference, and pairs seen in a single epoch, are scored during training instead. Raises ModelError if the
    first loss would not be ln 2 although policy and reference are the same, or if the cache belongs to another
    reference.
    """
    recipe, pairs, heldout = prepared.recipe, prepared.train.encoded, prepared.heldout.encoded
    if not needs_reference(recipe.objective):
        logger.info(f"reference: none, {recipe.objective.loss_type} compares with no other model")
        return _datasets(prepared, torch.zeros(len(pairs), 2), torch.zeros(len(heldout), 2))
    first_step = prepared.order.batch_indices(1)
    if loaded.reference_adapter.ema is not None:
        logger.info("reference: a copy of the adapter that follows it, computed in every step and every evaluation")
        few = [pairs[i] for i in first_step[:CHECKED_PAIRS]]
        live_P2 = fresh_reference_logps(loaded.model, few, loaded.packing, device, loaded.reference_adapter)
        _check(prepared, loaded, device, live_P2)
        return _datasets(prepared, torch.full((len(pairs), 2), torch.nan), torch.full((len(heldout), 2), torch.nan))
    # within a single epoch each pair is scored once in any case: then along with its step, and the first step need not
    # wait for the last pair; TRL computes the reference in every step by itself
    is_trl = engine_of(recipe).is_trl
    in_training = recipe.train.num_train_epochs == 1 or is_trl
    beforehand = select_items(pairs, first_step if in_training else prepared.order.seen_indices)
    fill_reference_cache(loaded, [beforehand, heldout], device, cache, run_log)
    datasets = _datasets(prepared, cache.get(pairs), cache.get(heldout))
    train_P2 = datasets[0].reference_P2
    later = in_training and not is_trl and bool(train_P2.isnan().any())
    counts = _counts(cache, len(beforehand) + len(heldout))
    logger.info(counts + (", the others along with the only step they are in" if later else ""))
    _check(prepared, loaded, device, train_P2[first_step[:CHECKED_PAIRS]])
    return datasets


def precompute_with_reference_model(
    prepared: PreparedData, device: Device, cache: ReferenceLogpCache, run_log: RunLog
) -> Datasets | None:
    """Load the other model that is the reference, score every pair of the run with it, and free it.

    None if the reference is no other model. A cache that this process has checked before needs no model if it knows
    every pair. Raises ModelError if the cache belongs to another model.
    """
    table, source = prepared.recipe.reference, prepared.reference_spec.reference_model
    if source is None or not isinstance(table, ModelReference):
        return None
    pairs, heldout = prepared.train.encoded, prepared.heldout.encoded
    seen, verified = select_items(pairs, prepared.order.seen_indices), prepared.verified_caches
    total = len(seen) + len(heldout)
    if cache.folder in verified and not bool(cache.get([*seen, *heldout]).isnan().any()):
        logger.info(f"{_counts(cache, total)}; {source.name} is not loaded again")
        return _datasets(prepared, cache.get(pairs), cache.get(heldout))
    model: Any = load_base(source, table.model_table(), device)
    cache_dequantized_if_fits(
        model, device, int(free_bytes(device) * USABLE_FRACTION / 2)
    )  # the other half is for the pass
    if device.type == "cpu":
        malloc_retain()
    packing, _ = choose_packing(model, concatenate_sequences([seen, heldout]), prepared.padded, device)
    fill_reference_cache(PreparedModel(model, packing, packing), [seen, heldout], device, cache, run_log)
    logger.info(f"{_counts(cache, total)}; {source.name} is freed")
    datasets = _datasets(prepared, cache.get(pairs), cache.get(heldout))
    indices = prepared.order.batch_indices(1)[:CHECKED_PAIRS]
    live_P2 = model_logps(model, [pairs[i] for i in indices], packing, device)
    check_cached_logps(live_P2, datasets[0].reference_P2[indices], device)
    verified.add(cache.folder)
    del model
    free_cached_memory()
    return datasets


def fill_reference_cache(
    loaded: PreparedModel,
    pair_sets: Sequence[Sequence[EncodedPair]],
    device: Device,
    cache: ReferenceLogpCache,
    run_log: RunLog,
) -> None:
    """Compute the log-probabilities that `cache` lacks, in smaller rows if memory runs out, and add them to it.

    What was computed before memory ran out stays. Raises DoesNotFitError if smaller rows do not help.
    """
    packing = loaded.reference_packing
    with run_log.phase("reference", sum(map(len, pair_sets))) as advance:
        for pairs in pair_sets:
            progress = _MonotonicProgress(advance)
            for attempt in row_attempts("reference pass", packing):
                packing = attempt.packing  # also for the next set
                with attempt:
                    count, adapter = progress.restarted(), loaded.reference_adapter
                    compute_reference_logps(loaded.model, pairs, cache, packing, device, count, adapter)


class _MonotonicProgress:
    """Reports each pair once, although a retried pass counts from its beginning again."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance, self.reported = advance, 0

    def restarted(self) -> Callable[[int], None]:
        """A counter for a pass that begins anew."""
        counted = 0

        def count(pairs: int) -> None:
            nonlocal counted
            counted += pairs
            if counted > self.reported:
                self.advance(counted - self.reported)
                self.reported = counted

        return count


def _check(prepared: PreparedData, loaded: PreparedModel, device: Device, reference_P2: Tensor) -> None:
    """Check the reference log-probabilities (P, 2) of the run's first pairs.

    Against the policy if both start out the same, else against a live pass of the reference.
    """
    indices = prepared.order.batch_indices(1)[:CHECKED_PAIRS]
    pairs, recipe = [prepared.train.encoded[i] for i in indices], prepared.recipe
    if recipe.starts_as_reference:
        live_P2 = model_logps(loaded.model, pairs, loaded.packing, device)
        check_first_loss(live_P2, reference_P2, reward_beta(recipe.objective), device)
    else:
        live_P2 = fresh_reference_logps(loaded.model, pairs, loaded.packing, device, loaded.reference_adapter)
        check_cached_logps(live_P2, reference_P2, device)


def _datasets(prepared: PreparedData, train_P2: Tensor, heldout_P2: Tensor) -> Datasets:
    table, (train, heldout) = prepared.recipe.objective, (prepared.train, prepared.heldout)
    return (
        PreferenceDataset(train.encoded, train_P2, read_loss_columns(train.pairs, table)),
        PreferenceDataset(heldout.encoded, heldout_P2, read_loss_columns(heldout.pairs, table)),
    )


def _counts(cache: ReferenceLogpCache, total: int) -> str:
    computed = cache.num_computed()
    return f"reference: {computed} pairs computed, {total - computed} from the cache"
