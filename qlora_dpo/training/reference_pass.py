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
from qlora_dpo.data.lazy_sequence import joined, picked
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model.base import load_base, load_tokenizer, tokenizer_fingerprints, vocabulary_fingerprint
from qlora_dpo.model.device import Device
from qlora_dpo.model.memory import USABLE, free_bytes, keep_dense_if_it_fits, keep_freed_memory
from qlora_dpo.model.saved_adapter import SavedAdapter, find_saved, insist_on_base
from qlora_dpo.model.sources import Source, fetch
from qlora_dpo.preference.objective import needs_reference
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.packing_choice import choose_packing, logps_by_rows
from qlora_dpo.preference.reference import (
    Store,
    asked_now,
    guard_cached,
    guard_first_loss,
    reference_logps,
    store_folder,
)
from qlora_dpo.preference.reference_adapter import OFF, Held
from qlora_dpo.preference.token_weights import counted
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import AdapterReference, EmaReference, ModelReference
from qlora_dpo.tracking.run_log import Tracker
from qlora_dpo.training.checkpoint.save import State
from qlora_dpo.training.data_order import Plan
from qlora_dpo.training.oom_retry import as_it_fits

GUARDED = 4
"""Pairs on which the answers are proved."""


@dataclass(frozen=True)
class Named:
    """What a recipe names beside its base, found and checked: adapters by their folder, another model as reference."""

    start: SavedAdapter | None = None
    """Where training starts; None: from a new adapter."""
    frozen: SavedAdapter | None = None
    """The adapter that is the reference."""
    other: Source | None = None
    """The model that is the reference."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Those of a run's state: a run may only be resumed beside the same adapters and model."""
        reference = self.frozen or self.other
        return ({"init_from": self.start.fingerprint} if self.start else {}) | (
            {"reference": reference.fingerprint} if reference else {}
        )

    @property
    def notes(self) -> list[str]:
        """What could not be checked, a sentence each."""
        return list(dict.fromkeys(each.note for each in (self.start, self.frozen) if each and each.note))


@dataclass(frozen=True)
class Model:
    """The base with its adapter, how pairs are laid out for training and for asking, and what answers as reference."""

    model: PeftModel
    packing: Packing
    rows: Packing
    held: Held = OFF


@dataclass(frozen=True)
class Question:
    """Which pairs the reference is asked about, and where its answers are kept."""

    train: Sequence[EncodedPair]
    heldout: Sequence[EncodedPair]
    recipe: Recipe
    device: Device
    plan: Plan
    store: Store

    @property
    def few(self) -> list[int]:
        """The training pairs on which the answers are proved, as indices."""
        return self.plan.indices(1)[:GUARDED]

    @property
    def beforehand(self) -> Sequence[EncodedPair]:
        """The training pairs that the run will see."""
        return picked(self.train, self.plan.seen)


@dataclass(frozen=True)
class Asked:
    """The reference's log-probabilities (P, 2) of both sets of pairs; NaN where it is asked later."""

    train_P2: Tensor
    heldout_P2: Tensor


def find_named(recipe: Recipe, source: Source, tokenizer: PreTrainedTokenizerBase) -> Named:
    """Find what `recipe` names; loads no weights.

    Raises RecipeError or ModelError for an adapter of another shape or base, and for a model with another vocabulary.
    """
    template = tokenizer_fingerprints(tokenizer)["template"]

    def saved(folder: str, key: str) -> SavedAdapter:
        return insist_on_base(find_saved(Path(folder), key, recipe.lora), recipe.model, source, template)

    table = recipe.reference
    frozen = saved(table.path, "reference.path") if isinstance(table, AdapterReference) else None
    start = frozen if recipe.lora.init_from is None else saved(recipe.lora.init_from, "lora.init_from")
    other = None
    if isinstance(table, ModelReference):
        other = fetch(table.model_table())
        if vocabulary_fingerprint(load_tokenizer(other)) != vocabulary_fingerprint(tokenizer):
            raise ModelError(
                f"reference.name = {table.name}: its tokenizer has another vocabulary than {source.name} has, so it "
                "would be asked about other texts; name a model of the same family"
            )
    return Named(start, frozen, other)


def insist_on_moves(recipe: Recipe, plan: Plan) -> None:
    """Raise RecipeError for a reference that is to move after more steps than the run has."""
    table = recipe.reference
    if isinstance(table, EmaReference) and table.ref_model_sync_steps > plan.total_steps:
        raise RecipeError(
            f"reference.ref_model_sync_steps is {table.ref_model_sync_steps}, and the run has {plan.total_steps} "
            "steps, so the reference would never move; write a smaller number"
        )


def question(
    recipe: Recipe, named: Named, source: Source, device: Device, plan: Plan, *sides: Sequence[EncodedPair]
) -> Question:
    """What to ask, and the store of those answers: one of the reference's weights, quantization and arithmetic."""
    table, weighed = recipe.model, counted(recipe.objective)
    if isinstance(recipe.reference, ModelReference) and named.other is not None:
        source, table = named.other, recipe.reference.model_table()
    folder = store_folder(source, table, device, weighed, named.frozen.fingerprint if named.frozen else "")
    train, heldout = sides
    return Question(train, heldout, recipe, device, plan, Store(folder))


def ask(what: Question, loaded: Model, tracker: Tracker) -> Asked:
    """Ask the model itself, with its adapter off or as it is held. What moves, or rides along, is left for later.

    Raises ModelError if the first loss would not be ln 2 although policy and reference are the same, or if the cache
    holds the answers of another reference.
    """
    recipe, pairs, store = what.recipe, what.train, what.store
    if not needs_reference(recipe.objective):
        tracker.note(f"reference: none, {recipe.objective.loss_type} compares with no other model")
        return Asked(torch.zeros(len(pairs), 2), torch.zeros(len(what.heldout), 2))
    few = [pairs[i] for i in what.few]
    if loaded.held.follows is not None:
        tracker.note("reference: a copy of the adapter that follows it, asked in every step and every evaluation")
        _guard(what, loaded, asked_now(loaded.model, few, loaded.packing, what.device, loaded.held))
        return Asked(*(torch.full((len(side), 2), torch.nan) for side in (pairs, what.heldout)))
    # in its only epoch each pair is asked once in any case: then it is asked along with its step, and the first
    # step need not wait for the last pair; TRL asks in every step by itself
    own = recipe.train.engine == "qlora_dpo"
    rides_along = recipe.train.num_train_epochs == 1 or not own
    now = picked(pairs, what.plan.indices(1)) if rides_along else what.beforehand
    compute_reference(what, loaded, now, tracker)
    asked = Asked(store.look_up(pairs), store.look_up(what.heldout))
    later = rides_along and own and bool(asked.train_P2.isnan().any())
    tracker.note(_counted(what, now) + (", the others along with the only step they are in" if later else ""))
    _guard(what, loaded, asked.train_P2[what.few])
    return asked


def compute_reference(what: Question, loaded: Model, now: Sequence[EncodedPair], tracker: Tracker) -> None:
    """Compute and keep what the store does not know of `now` and the held-out pairs, in smaller rows if memory runs
    out; what was computed until then stays. Raises DoesNotFitError if smaller rows do not help.
    """
    # nothing of this state is kept but the rows that were found to fit
    rows, state = replace(loaded, packing=loaded.rows), State(0, {}, {})
    with tracker.phase("reference", len(now) + len(what.heldout)) as advance:
        for some in (now, what.heldout):
            progress = _Progress(advance)

            def work(here: Model, some: Sequence[EncodedPair] = some, progress: _Progress = progress) -> Tensor:
                return reference_logps(
                    here.model, some, what.store, here.packing, what.device, progress.anew(), here.held
                )

            as_it_fits("reference pass", work, rows, state, tracker.note)


class _Progress:
    """Tells how many pairs are known, each once, although a pass may begin anew and count them again."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance, self.told = advance, 0

    def anew(self) -> Callable[[int], None]:
        """What a pass counts with from its beginning."""
        counted = 0

        def count(pairs: int) -> None:
            nonlocal counted
            counted += pairs
            if counted > self.told:
                self.advance(counted - self.told)
                self.told = counted

        return count


def _guard(what: Question, loaded: Model, answers_P2: Tensor) -> None:
    """Prove what the reference says of a few pairs: against the policy if both are the same, else against itself."""
    few = [what.train[i] for i in what.few]
    if what.recipe.starts_as_reference:
        live_P2 = logps_by_rows(loaded.model, few, loaded.packing, what.device)
        guard_first_loss(live_P2, answers_P2, getattr(what.recipe.objective, "beta", 0.1), what.device)
    else:
        guard_cached(asked_now(loaded.model, few, loaded.packing, what.device, loaded.held), answers_P2, what.device)


def ask_other(
    what: Question, named: Named, pad_token_id: int, tracker: Tracker, proved: set[Path] | None = None
) -> Asked | None:
    """Load the other model that is the reference, ask it about every pair of the run, and free it; None without one.

    The stores of answers that this process has `proved` need no proof again, so if every pair is known, no model.
    Raises ModelError if the cache holds the answers of another model.
    """
    if named.other is None or not isinstance(what.recipe.reference, ModelReference):
        return None
    proved = set() if proved is None else proved
    now, device = what.beforehand, what.device
    if what.store.folder in proved and not bool(what.store.look_up([*now, *what.heldout]).isnan().any()):
        tracker.note(f"{_counted(what, now)}; {named.other.name} is not loaded again")
        return Asked(what.store.look_up(what.train), what.store.look_up(what.heldout))
    model: Any = load_base(named.other, what.recipe.reference.model_table(), device)
    keep_dense_if_it_fits(model, device, int(free_bytes(device) * USABLE / 2))  # the other half is for the pass
    if device.type == "cpu":
        keep_freed_memory()
    packing, _ = choose_packing(model, joined([now, what.heldout]), what.recipe.train.row_tokens, pad_token_id, device)
    packing = replace(packing, counted=counted(what.recipe.objective))
    compute_reference(what, Model(model, packing, packing), now, tracker)
    tracker.note(f"{_counted(what, now)}; {named.other.name} is freed")
    asked = Asked(what.store.look_up(what.train), what.store.look_up(what.heldout))
    few = [what.train[i] for i in what.few]
    guard_cached(logps_by_rows(model, few, packing, device), asked.train_P2[what.few], device)
    proved.add(what.store.folder)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return asked


def _counted(what: Question, now: Sequence[EncodedPair]) -> str:
    total, computed = len(now) + len(what.heldout), what.store.computed_by_all()
    return f"reference: {computed} pairs computed, {total - computed} from the cache"


def facts(recipe: Recipe, named: Named) -> dict[str, Any]:
    """What run.json says of the start and of the reference."""
    table = recipe.reference
    reference: dict[str, Any] = {"kind": "base" if table is None else table.kind}
    if not needs_reference(recipe.objective):
        reference = {"kind": "none"}
    elif named.frozen is not None:
        reference |= {"name": named.frozen.folder.name, "fingerprint": named.frozen.fingerprint}
    elif isinstance(table, ModelReference) and named.other is not None:
        other = named.other
        reference |= {"name": other.name, "hub_id": other.hub_id, "revision": other.revision}
        reference |= {"fingerprint": other.fingerprint, "quantization": table.quantization}
    elif isinstance(table, EmaReference):
        reference = table.model_dump()
    start = {"name": named.start.folder.name, "fingerprint": named.start.fingerprint} if named.start else None
    return {"init_from": start, "reference": reference}
