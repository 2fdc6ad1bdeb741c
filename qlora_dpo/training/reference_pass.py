"""Finds the reference that a recipe names, asks it before the first step, and proves that the answers are its own."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.data.lazy_sequence import concatenate_sequences, select_items
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model.base import load_base, load_tokenizer, tokenizer_fingerprints, vocabulary_fingerprint
from qlora_dpo.model.device import Device
from qlora_dpo.model.memory import USABLE_FRACTION, cache_dequantized_if_fits, free_bytes, malloc_retain
from qlora_dpo.model.saved_adapter import SavedAdapter, check_base_matches, find_saved_adapter
from qlora_dpo.model.sources import ModelSource, fetch_model
from qlora_dpo.preference.objective import needs_reference
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.packing_choice import choose_packing
from qlora_dpo.preference.reference import compute_reference_logps, fresh_reference_logps, model_logps
from qlora_dpo.preference.reference_adapter import ADAPTER_OFF, ReferenceAdapter
from qlora_dpo.preference.reference_cache import ReferenceLogpCache, reference_cache_dir
from qlora_dpo.preference.start_checks import check_cached_logps, check_first_loss
from qlora_dpo.preference.token_weights import make_token_weighting
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import AdapterReference, EmaReference, ModelReference
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.checkpoint.save import TrainState
from qlora_dpo.training.data_order import DataOrder
from qlora_dpo.training.oom_retry import retry_with_smaller_rows

NUM_CHECKED_PAIRS = 4
"""Pairs on which the answers are proved."""


@dataclass(frozen=True)
class ReferenceSpec:
    """What a recipe names beside its base, found and checked: adapters by their folder, another model as reference."""

    init_adapter: SavedAdapter | None = None
    """Where training starts; None: from a new adapter."""
    reference_adapter: SavedAdapter | None = None
    """The adapter that is the reference."""
    reference_model: ModelSource | None = None
    """The model that is the reference."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those of a run's state: a run may only be resumed beside the same adapters and model."""
        reference = self.reference_adapter or self.reference_model
        return ({"init_from": self.init_adapter.fingerprint} if self.init_adapter else {}) | (
            {"reference": reference.fingerprint} if reference else {}
        )

    @property
    def notes(self) -> list[str]:
        """What could not be checked, a sentence each."""
        return list(
            dict.fromkeys(each.note for each in (self.init_adapter, self.reference_adapter) if each and each.note)
        )


@dataclass(frozen=True)
class PreparedModel:
    """The base with its adapter, how pairs are laid out for training and for asking, and what answers as reference."""

    model: PeftModel
    packing: Packing
    reference_packing: Packing
    reference_adapter: ReferenceAdapter = ADAPTER_OFF


@dataclass(frozen=True)
class Question:
    """Which pairs the reference is asked about, and where its answers are kept."""

    train: Sequence[EncodedPair]
    heldout: Sequence[EncodedPair]
    recipe: Recipe
    device: Device
    plan: DataOrder
    store: ReferenceLogpCache

    @property
    def few(self) -> list[int]:
        """The training pairs on which the answers are proved, as indices."""
        return self.plan.batch_indices(1)[:NUM_CHECKED_PAIRS]

    @property
    def beforehand(self) -> Sequence[EncodedPair]:
        """The training pairs that the run will see."""
        return select_items(self.train, self.plan.seen_indices)


@dataclass(frozen=True)
class ReferenceLogps:
    """The reference's log-probabilities (P, 2) of both sets of pairs; NaN where it is asked later."""

    train_P2: Tensor
    heldout_P2: Tensor


def resolve_reference(recipe: Recipe, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> ReferenceSpec:
    """Find what `recipe` names; loads no weights.

    Raises RecipeError or ModelError for an adapter of another shape or base, and for a model with another vocabulary.
    """
    template = tokenizer_fingerprints(tokenizer)["template"]

    def find_adapter(folder: str, key: str) -> SavedAdapter:
        return check_base_matches(find_saved_adapter(Path(folder), key, recipe.lora), recipe.model, source, template)

    table = recipe.reference
    frozen = find_adapter(table.path, "reference.path") if isinstance(table, AdapterReference) else None
    start = frozen if recipe.lora.init_from is None else find_adapter(recipe.lora.init_from, "lora.init_from")
    other = None
    if isinstance(table, ModelReference):
        other = fetch_model(table.model_table())
        if vocabulary_fingerprint(load_tokenizer(other)) != vocabulary_fingerprint(tokenizer):
            raise ModelError(
                f"reference.name = {table.name}: its tokenizer has another vocabulary than {source.name} has, so it "
                "would be asked about other texts; name a model of the same family"
            )
    return ReferenceSpec(start, frozen, other)


def check_sync_steps(recipe: Recipe, data_order: DataOrder) -> None:
    """Raise RecipeError for a reference that is to move after more steps than the run has."""
    table = recipe.reference
    if isinstance(table, EmaReference) and table.ref_model_sync_steps > data_order.total_steps:
        raise RecipeError(
            f"reference.ref_model_sync_steps is {table.ref_model_sync_steps}, and the run has {data_order.total_steps} "
            "steps, so the reference would never move; write a smaller number"
        )


def question(
    recipe: Recipe,
    named: ReferenceSpec,
    source: ModelSource,
    device: Device,
    plan: DataOrder,
    *sides: Sequence[EncodedPair],
) -> Question:
    """What to ask, and the store of those answers: one of the reference's weights, quantization and arithmetic."""
    table, weighed = recipe.model, make_token_weighting(recipe.objective)
    if isinstance(recipe.reference, ModelReference) and named.reference_model is not None:
        source, table = named.reference_model, recipe.reference.model_table()
    folder = reference_cache_dir(
        source, table, device, weighed, named.reference_adapter.fingerprint if named.reference_adapter else ""
    )
    train, heldout = sides
    return Question(train, heldout, recipe, device, plan, ReferenceLogpCache(folder))


def precompute_reference_logps(what: Question, prepared_model: PreparedModel, run_log: RunLog) -> ReferenceLogps:
    """Ask the model itself, with its adapter off or as it is held. What moves, or rides along, is left for later.

    Raises ModelError if the first loss would not be ln 2 although policy and reference are the same, or if the cache
    holds the answers of another reference.
    """
    recipe, pairs, store = what.recipe, what.train, what.store
    if not needs_reference(recipe.objective):
        run_log.info(f"reference: none, {recipe.objective.loss_type} compares with no other model")
        return ReferenceLogps(torch.zeros(len(pairs), 2), torch.zeros(len(what.heldout), 2))
    few = [pairs[i] for i in what.few]
    if prepared_model.reference_adapter.ema is not None:
        run_log.info("reference: a copy of the adapter that follows it, asked in every step and every evaluation")
        _check_reference_logps(
            what,
            prepared_model,
            fresh_reference_logps(
                prepared_model.model, few, prepared_model.packing, what.device, prepared_model.reference_adapter
            ),
        )
        return ReferenceLogps(*(torch.full((len(side), 2), torch.nan) for side in (pairs, what.heldout)))
    # in its only epoch each pair is asked once in any case: then it is asked along with its step, and the first
    # step need not wait for the last pair; TRL asks in every step by itself
    own = recipe.train.engine == "qlora_dpo"
    rides_along = recipe.train.num_train_epochs == 1 or not own
    now = select_items(pairs, what.plan.batch_indices(1)) if rides_along else what.beforehand
    fill_reference_cache(what, prepared_model, now, run_log)
    asked = ReferenceLogps(store.get(pairs), store.get(what.heldout))
    later = rides_along and own and bool(asked.train_P2.isnan().any())
    run_log.info(_cache_summary(what, now) + (", the others along with the only step they are in" if later else ""))
    _check_reference_logps(what, prepared_model, asked.train_P2[what.few])
    return asked


def fill_reference_cache(
    what: Question, prepared_model: PreparedModel, train_pairs: Sequence[EncodedPair], run_log: RunLog
) -> None:
    """Compute and keep what the store does not know of `now` and the held-out pairs, in smaller rows if memory runs
    out; what was computed until then stays. Raises DoesNotFitError if smaller rows do not help.
    """
    # nothing of this state is kept but the rows that were found to fit
    rows, state = replace(prepared_model, packing=prepared_model.reference_packing), TrainState(0, {}, {})
    with run_log.phase("reference", len(train_pairs) + len(what.heldout)) as advance:
        for some in (train_pairs, what.heldout):
            progress = _MonotonicProgress(advance)

            def work(
                here: PreparedModel, some: Sequence[EncodedPair] = some, progress: _MonotonicProgress = progress
            ) -> Tensor:
                return compute_reference_logps(
                    here.model, some, what.store, here.packing, what.device, progress.restart(), here.reference_adapter
                )

            retry_with_smaller_rows("reference pass", work, rows, state, run_log.info)


class _MonotonicProgress:
    """Tells how many pairs are known, each once, although a pass may begin anew and count them again."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance, self.reported = advance, 0

    def restart(self) -> Callable[[int], None]:
        """What a pass counts with from its beginning."""
        counted = 0

        def count(pairs: int) -> None:
            nonlocal counted
            counted += pairs
            if counted > self.reported:
                self.advance(counted - self.reported)
                self.reported = counted

        return count


def _check_reference_logps(what: Question, prepared_model: PreparedModel, reference_P2: Tensor) -> None:
    """Prove what the reference says of a few pairs: against the policy if both are the same, else against itself."""
    few = [what.train[i] for i in what.few]
    if what.recipe.starts_as_reference:
        live_P2 = model_logps(prepared_model.model, few, prepared_model.packing, what.device)
        check_first_loss(live_P2, reference_P2, getattr(what.recipe.objective, "beta", 0.1), what.device)
    else:
        check_cached_logps(
            fresh_reference_logps(
                prepared_model.model, few, prepared_model.packing, what.device, prepared_model.reference_adapter
            ),
            reference_P2,
            what.device,
        )


def precompute_with_reference_model(
    what: Question,
    reference_spec: ReferenceSpec,
    pad_token_id: int,
    run_log: RunLog,
    verified_caches: set[Path] | None = None,
) -> ReferenceLogps | None:
    """Load the other model that is the reference, ask it about every pair of the run, and free it; None without one.

    The stores of answers that this process has `proved` need no proof again, so if every pair is known, no model.
    Raises ModelError if the cache holds the answers of another model.
    """
    if reference_spec.reference_model is None or not isinstance(what.recipe.reference, ModelReference):
        return None
    verified_caches = set() if verified_caches is None else verified_caches
    now, device = what.beforehand, what.device
    if what.store.folder in verified_caches and not bool(what.store.get([*now, *what.heldout]).isnan().any()):
        run_log.info(f"{_cache_summary(what, now)}; {reference_spec.reference_model.name} is not loaded again")
        return ReferenceLogps(what.store.get(what.train), what.store.get(what.heldout))
    model: Any = load_base(reference_spec.reference_model, what.recipe.reference.model_table(), device)
    cache_dequantized_if_fits(
        model, device, int(free_bytes(device) * USABLE_FRACTION / 2)
    )  # the other half is for the pass
    if device.type == "cpu":
        malloc_retain()
    row_tokens, weighting = what.recipe.train.row_tokens, make_token_weighting(what.recipe.objective)
    padded = Packing(row_tokens, pad_token_id, backend=None, token_weighting=weighting)
    packing, _ = choose_packing(model, concatenate_sequences([now, what.heldout]), padded, device)
    fill_reference_cache(what, PreparedModel(model, packing, packing), now, run_log)
    run_log.info(f"{_cache_summary(what, now)}; {reference_spec.reference_model.name} is freed")
    asked = ReferenceLogps(what.store.get(what.train), what.store.get(what.heldout))
    few = [what.train[i] for i in what.few]
    check_cached_logps(model_logps(model, few, packing, device), asked.train_P2[what.few], device)
    verified_caches.add(what.store.folder)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return asked


def _cache_summary(what: Question, train_pairs: Sequence[EncodedPair]) -> str:
    total, computed = len(train_pairs) + len(what.heldout), what.store.num_computed()
    return f"reference: {computed} pairs computed, {total - computed} from the cache"


def reference_metadata(recipe: Recipe, reference_spec: ReferenceSpec) -> dict[str, Any]:
    """What run.json says of the start and of the reference."""
    table = recipe.reference
    reference: dict[str, Any] = {"kind": "base" if table is None else table.kind}
    if not needs_reference(recipe.objective):
        reference = {"kind": "none"}
    elif reference_spec.reference_adapter is not None:
        reference |= {
            "name": reference_spec.reference_adapter.folder.name,
            "fingerprint": reference_spec.reference_adapter.fingerprint,
        }
    elif isinstance(table, ModelReference) and reference_spec.reference_model is not None:
        other = reference_spec.reference_model
        reference |= {"name": other.name, "hub_id": other.hub_id, "revision": other.revision}
        reference |= {"fingerprint": other.fingerprint, "quantization": table.quantization}
    elif isinstance(table, EmaReference):
        reference = table.model_dump()
    start = (
        {"name": reference_spec.init_adapter.folder.name, "fingerprint": reference_spec.init_adapter.fingerprint}
        if reference_spec.init_adapter
        else None
    )
    return {"init_from": start, "reference": reference}
