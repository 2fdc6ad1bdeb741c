"""All that is read before the first weight: the source of the base, its tokenizer, the pairs, and the reference."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qlora_dpo.data.encode import PairSet, load_pairs
from qlora_dpo.data.encoded import (
    have_rejected,
    pair_rows,
    pairs_without_rejected,
    sequence_lengths,
)
from qlora_dpo.data.progress import ProgressCallback, no_progress
from qlora_dpo.data.templates.template_settings import apply_template_settings
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model.base import (
    check_stored_quantization,
    template_fingerprint,
    tokenizer_fingerprints,
    vocabulary_fingerprint,
)
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.saved_adapter import SavedAdapter, check_base_matches, find_saved_adapter
from qlora_dpo.model.sources import ModelSource, fetch_model
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.preference.metrics import REJECTED_METRICS
from qlora_dpo.preference.objective import needs_reference
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.token_weights import make_token_weighting
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.objective import Sft
from qlora_dpo.recipe.reference import AdapterReference, EmaReference, ModelReference
from qlora_dpo.training.data_order import DataOrder, make_data_order
from qlora_dpo.training.loss_columns import column_keys

logger = logging.getLogger(__name__)

TABLES_OF_POSITIONS = ("gpt2", "gptj", "codegen", "gpt_bigcode", "openai-gpt", "ctrl", "opt", "biogpt", "gpt_neo")
"""Model types that look their positions up in a table, which ends at `max_position_embeddings`."""


@dataclass(frozen=True)
class ReferenceSpec:
    """The adapters and models that a recipe names beside its base, found and checked."""

    init_adapter: SavedAdapter | None = None
    """The adapter that training starts from; None for a new one."""
    reference_adapter: SavedAdapter | None = None
    """The adapter that is the reference."""
    reference_model: ModelSource | None = None
    """The model that is the reference."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """Part of a run's state: a run may only be resumed beside the same adapters and model."""
        reference = self.reference_adapter or self.reference_model
        return ({"init_from": self.init_adapter.fingerprint} if self.init_adapter else {}) | (
            {"reference": reference.fingerprint} if reference else {}
        )

    @property
    def notes(self) -> list[str]:
        """What could not be checked, one sentence each."""
        return list(
            dict.fromkeys(saved.note for saved in (self.init_adapter, self.reference_adapter) if saved and saved.note)
        )


@dataclass
class PreparedData:
    """A recipe with all that was read for it before the first weight."""

    recipe: Recipe
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    train: PairSet
    heldout: PairSet
    reference_spec: ReferenceSpec = field(default_factory=ReferenceSpec)
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by part of the run; later parts are added."""
    train_with_rejected: PairSet | None = None
    """The training pairs with both answers, of which `train` may have the chosen ones alone."""
    verified_caches: set[Path] = field(default_factory=set)
    """Reference caches that this process has checked against the model they belong to."""

    @cached_property
    def order(self) -> DataOrder:
        """Which pairs each optimizer step sees."""
        rows = pair_rows(self.train.encoded)
        is_chats = self.train_with_rejected is not None and not have_rejected(self.train_with_rejected.encoded)
        starts = tuple(np.flatnonzero(np.diff(rows, prepend=-1)).tolist()) if is_chats else None
        chat_starts = starts if starts is not None and len(starts) < len(rows) else None
        return make_data_order(len(rows), self.recipe.train, chat_starts)

    @cached_property
    def tokenizer_fingerprints(self) -> dict[str, str]:
        """`tokenizer_fingerprints` of the tokenizer, which take half a second for a large vocabulary."""
        return tokenizer_fingerprints(self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """The padding token, which `load_tokenizer` makes sure of."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def padded(self) -> Packing:
        """Padded batches within the recipe's row size, with the token weights of its objective."""
        weighting = make_token_weighting(self.recipe.objective)
        return Packing(self.recipe.train.row_tokens, self.pad_token_id, backend=None, token_weighting=weighting)


def prepare_data(
    recipe: Recipe,
    fetch_source: Callable[[ModelTable], ModelSource] = fetch_model,
    other_recipes: Sequence[Recipe] = (),
    watch: ProgressCallback = no_progress,
) -> PreparedData:
    """Fetch the base's files with `fetch_source`, read and encode both sets of pairs; loads no weights.

    Keeps the columns that this objective and those of `other_recipes` read. `watch` receives progress. Rank 0 of each
    machine reads first, and the other ranks find the result in the cache.
    """
    with processes.main_process_first():
        return _prepare(recipe, fetch_source, other_recipes, watch)


def _prepare(
    recipe: Recipe,
    fetch_source: Callable[[ModelTable], ModelSource],
    other_recipes: Sequence[Recipe],
    watch: ProgressCallback,
) -> PreparedData:
    seconds: dict[str, float] = {}
    with timed(seconds, "fetch"):
        source = fetch_source(recipe.model)
        check_stored_quantization(source, recipe.model)
        tokenizer = load_tokenizer(source)
        for sentence in apply_template_settings(tokenizer, recipe.model, source.name):
            logger.info(sentence)
        reference = resolve_reference(recipe, source, tokenizer)
    with timed(seconds, "encode"):
        seed = recipe.train.seed
        columns = {
            name: key for reader in (*other_recipes, recipe) for name, key in column_keys(reader.objective).items()
        }
        groups = {recipe.samples.group_by: "samples.group_by"} if recipe.samples.group_by else {}
        supervised = any(isinstance(each.objective, Sft) for each in (*other_recipes, recipe))
        train = load_pairs(recipe.data, "train", tokenizer, seed, columns, watch, supervised=supervised)
        heldout = load_pairs(recipe.data, "eval", tokenizer, seed, columns | groups, watch, supervised=supervised)
        for each in (*other_recipes, recipe):
            check_answers(train, heldout, each)
        check_positions(source, train, heldout)
    return PreparedData(
        recipe, source, tokenizer, _for_objective(train, recipe), _comparable(heldout), reference, seconds, train
    )


def check_answers(train: PairSet, heldout: PairSet, recipe: Recipe) -> None:
    """Raise RecipeError for an objective, or a metric, that compares two answers where rows have one."""
    if isinstance(recipe.objective, Sft):
        metric = recipe.train.metric_for_best_model
        if metric in REJECTED_METRICS and not have_rejected(heldout.encoded):
            raise RecipeError(
                f'train.metric_for_best_model is "{metric}", and the held-out rows have one answer each; write "loss", '
                '"perplexity" or "mean_token_accuracy"'
            )
        return
    for pairs in (train, heldout):
        if not have_rejected(pairs.encoded):
            raise RecipeError(
                f"{pairs.audit.source}: holds answers without a rejected one, which only "
                f'loss_type = "sft" trains on, not "{recipe.objective.loss_type}"; set [objective], or give pairs'
            )


def check_positions(source: ModelSource, train: PairSet, heldout: PairSet) -> None:
    """Raise RecipeError for sequences longer than the base's table of positions; say so of rotary positions.

    A rotary model computes any position, but has not learned those beyond its config's `max_position_embeddings`.
    """
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError):  # whoever builds the model says so in a sentence
        return
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(int(sequence_lengths(pairs.encoded).max(initial=0)) for pairs in (train, heldout))
    if not isinstance(limit, int) or longest <= limit:
        return
    found = f"{source.name}: the longest pair has {longest:,} tokens, and the model has {limit:,} positions"
    if config.model_type in TABLES_OF_POSITIONS:
        raise RecipeError(f"{found}; set data.max_length to at most {limit}")
    if getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None):
        logger.info(f"{found}, beyond which it has learned nothing; set data.max_length to at most {limit}")


def reuse_prepared_data(prepared: PreparedData, recipe: Recipe) -> PreparedData:
    """The same base and pairs for another recipe; reads nothing but the adapters that it names."""
    seconds: dict[str, float] = {}
    with timed(seconds, "fetch"):
        reference = resolve_reference(recipe, prepared.source, prepared.tokenizer)
    read = prepared.train_with_rejected or prepared.train
    return PreparedData(
        recipe,
        prepared.source,
        prepared.tokenizer,
        _for_objective(read, recipe),
        prepared.heldout,
        reference,
        seconds,
        read,
        prepared.verified_caches,
    )


def _comparable(heldout: PairSet) -> PairSet:
    """The held-out pairs, all with a rejected answer or all without one."""
    if have_rejected(heldout.encoded):
        return heldout
    return replace(heldout, encoded=pairs_without_rejected(heldout.encoded))


def _for_objective(train: PairSet, recipe: Recipe) -> PairSet:
    """The training pairs as the objective takes them; held-out pairs keep both answers, for the accuracy."""
    return replace(train, encoded=pairs_without_rejected(train.encoded)) if isinstance(recipe.objective, Sft) else train


def resolve_reference(recipe: Recipe, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> ReferenceSpec:
    """Find the adapters and the model that `recipe` names; loads no weights.

    Raises RecipeError or ModelError for an adapter of another shape or base, and for a model with another vocabulary.
    """
    template = template_fingerprint(tokenizer)

    def saved(folder: str, key: str) -> SavedAdapter:
        return check_base_matches(find_saved_adapter(Path(folder), key, recipe.lora), recipe.model, source, template)

    table = recipe.reference
    adapter = saved(table.path, "reference.path") if isinstance(table, AdapterReference) else None
    start = adapter if recipe.lora.init_from is None else saved(recipe.lora.init_from, "lora.init_from")
    model = None
    if isinstance(table, ModelReference):
        model = fetch_model(table.model_table())
        if vocabulary_fingerprint(load_tokenizer(model)) != vocabulary_fingerprint(tokenizer):
            raise ModelError(
                f"reference.name = {table.name}: its tokenizer has another vocabulary than {source.name} has, so it "
                "would be asked about other texts; name a model of the same family"
            )
    return ReferenceSpec(start, adapter, model)


def check_sync_steps(recipe: Recipe, order: DataOrder) -> None:
    """Raise RecipeError for an EMA reference that would not move before the run ends."""
    table = recipe.reference
    if isinstance(table, EmaReference) and table.ref_model_sync_steps > order.total_steps:
        raise RecipeError(
            f"reference.ref_model_sync_steps is {table.ref_model_sync_steps}, and the run has {order.total_steps} "
            "steps, so the reference would never move; write a smaller number"
        )


def reference_metadata(recipe: Recipe, spec: ReferenceSpec) -> dict[str, Any]:
    """What run.json says about the start and the reference."""
    table = recipe.reference
    reference: dict[str, Any] = {"kind": "base" if table is None else table.kind}
    if not needs_reference(recipe.objective):
        reference = {"kind": "none"}
    elif spec.reference_adapter is not None:
        reference |= {"name": spec.reference_adapter.folder.name, "fingerprint": spec.reference_adapter.fingerprint}
    elif isinstance(table, ModelReference) and spec.reference_model is not None:
        model = spec.reference_model
        reference |= {"name": model.name, "hub_id": model.hub_id, "revision": model.revision}
        reference |= {"fingerprint": model.fingerprint, "quantization": table.quantization}
    elif isinstance(table, EmaReference):
        reference = table.model_dump()
    start = (
        {"name": spec.init_adapter.folder.name, "fingerprint": spec.init_adapter.fingerprint}
        if spec.init_adapter
        else None
    )
    return {"init_from": start, "reference": reference}


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[part]`."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[part] = seconds.get(part, 0.0) + time.monotonic() - started
