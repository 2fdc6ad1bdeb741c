"""One run from its recipe to a trained model: data, base, reference, steps; each part timed and accounted for."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import assert_never

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qlora_dpo.data.encode import PairSet, load_pairs
from qlora_dpo.data.encoded import EncodedPair, pair_digests, pairs_without_rejected
from qlora_dpo.data.lazy_sequence import concatenate_sequences
from qlora_dpo.data.progress import ProgressCallback, no_progress
from qlora_dpo.errors import RecipeError
from qlora_dpo.model.base import load_base, load_tokenizer, tokenizer_fingerprints
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes, sharding
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.model.memory import (
    cache_dequantized_if_fits,
    free_bytes,
    malloc_release_eagerly,
    malloc_retain,
    malloc_trim,
    set_gradient_checkpointing,
)
from qlora_dpo.model.saved_adapter import load_adapter_weights, opened_by_peft
from qlora_dpo.model.sources import ModelSource, fetch_model
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.packing_choice import choose_packing, shortest_pairs
from qlora_dpo.preference.reference_adapter import ReferenceAdapter, clone_adapter
from qlora_dpo.preference.start_checks import check_adapter_off_is_base, check_matches_peft, probe_logits
from qlora_dpo.preference.token_weights import make_token_weighting
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.objective import Sft
from qlora_dpo.recipe.recipe import LoadedRecipe
from qlora_dpo.recipe.reference import EmaReference
from qlora_dpo.tracking import run_log as tracking
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training import reference_pass
from qlora_dpo.training.checkpoint.best import load_best
from qlora_dpo.training.checkpoint.save import TrainState, saved_row_tokens
from qlora_dpo.training.data_order import make_data_order
from qlora_dpo.training.evaluate import PreferenceDataset
from qlora_dpo.training.loop import SampleFn, TrainContext, peak_memory_bytes, train_loop
from qlora_dpo.training.loss_columns import column_keys, read_loss_columns
from qlora_dpo.training.meta_model import ModelFootprint, Workload, measure_footprint, workload_of
from qlora_dpo.training.reference_pass import (
    PreparedModel,
    ReferenceSpec,
    check_sync_steps,
    precompute_with_reference_model,
    question,
    resolve_reference,
)
from qlora_dpo.training.row_plan import (
    adapter_bytes,
    choose_row_plan,
    conversion_bytes,
    dense_weight_budget,
    describe_row_plan,
    reference_row_tokens,
)

MAX_PROBE_TOKENS = 128
"""Tokens of a prompt's end and of an answer's beginning on which it is proved that the base is the base."""


@dataclass
class PreparedData:
    """Everything that was read before the first weight: tokenizer, pairs and the source of the base."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    train: PairSet
    heldout: PairSet
    reference_spec: ReferenceSpec = field(default_factory=ReferenceSpec)
    seconds: dict[str, float] = field(default_factory=dict)
    train_with_rejected: PairSet | None = None
    """The training pairs as read, of which `train` may have the chosen answers alone."""
    verified_caches: set[Path] = field(default_factory=set)
    """Stores whose answers were proved by the other model that gave them, for the next run with the same pairs."""


@dataclass(frozen=True)
class Base:
    """The base before an adapter, how pairs are laid out for it, and its logits (L, V) of one pair, to prove it by."""

    model: PreTrainedModel
    packing: Packing
    probed: EncodedPair
    before_LV: Tensor
    dense: bool = False
    """True if the linear weights are kept in the compute dtype beside their stored form."""


BaseLoader = Callable[[PreparedData, Recipe, Device, Callable[[str], None]], Base]
"""How a run comes by its base; the last argument is told what was decided."""


@dataclass
class TrainingResult:
    """A trained model with all that run.json and results.json say about how it came to be."""

    model: PeftModel
    state: TrainState
    prepared: PreparedData
    reference_pairs_computed: int
    peak_bytes: int
    save_errors: list[str]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part of the run."""
        return self.prepared.seconds


def prepare_data(
    recipe: Recipe,
    fetch_source: Callable[[ModelTable], ModelSource] = fetch_model,
    other_recipes: Sequence[Recipe] = (),
    watch: ProgressCallback = no_progress,
) -> PreparedData:
    """Fetch the base's files as `find` does, read and encode both sets of pairs; loads no weights.

    Of the rows are kept the columns that the objective reads, and those of the `others`, which train on the same pairs.
    `watch` is told how far the reading is. Of several processes on a machine the first reads alone, and the others find
    it in the cache.
    """
    with processes.main_process_first():
        return _prepare_data(recipe, fetch_source, other_recipes, watch)


def _prepare_data(
    recipe: Recipe,
    fetch_source: Callable[[ModelTable], ModelSource],
    other_recipes: Sequence[Recipe],
    watch: ProgressCallback,
) -> PreparedData:
    seconds: dict[str, float] = {}
    with timed(seconds, "fetch"):
        source = fetch_source(recipe.model)
        tokenizer = load_tokenizer(source)
        named = resolve_reference(recipe, source, tokenizer)
    with timed(seconds, "encode"):
        seed = recipe.train.seed
        numbers = {name: key for each in (*other_recipes, recipe) for name, key in column_keys(each.objective).items()}
        groups = {recipe.samples.group_by: "samples.group_by"} if recipe.samples.group_by else {}
        train = load_pairs(recipe.data, "train", tokenizer, seed, numbers, watch)
        heldout = load_pairs(recipe.data, "eval", tokenizer, seed, numbers | groups, watch)
    return PreparedData(source, tokenizer, _drop_rejected_for_sft(train, recipe), heldout, named, seconds, train)


def reuse_prepared_data(prepared: PreparedData, recipe: Recipe) -> PreparedData:
    """The same base and pairs for another recipe; reads nothing but the adapters that it names."""
    seconds: dict[str, float] = {}
    with timed(seconds, "fetch"):
        named = resolve_reference(recipe, prepared.source, prepared.tokenizer)
    train = _drop_rejected_for_sft(prepared.train_with_rejected or prepared.train, recipe)
    return replace(prepared, train=train, reference_spec=named, seconds=seconds)


def _drop_rejected_for_sft(train: PairSet, recipe: Recipe) -> PairSet:
    """The training pairs as the objective takes them; of held-out pairs both answers are asked, for the accuracy."""
    return replace(train, encoded=pairs_without_rejected(train.encoded)) if isinstance(recipe.objective, Sft) else train


def run_training(
    prepared: PreparedData,
    recipe: Recipe,
    device: Device,
    run_log: RunLog,
    resume_from: Path | None,
    allowed_changes: tuple[str, ...] = (),
    sample_fn: SampleFn | None = None,
    deadline: float = math.inf,
    base_loader: BaseLoader | None = None,
) -> TrainingResult:
    """Load the base, ask the reference, prove the start, and train with the recipe's engine.

    A run that resumes may differ from the one before in the `allowed` keys. At evaluations the model is given to `ask`.
    The last step that ends before `until`, a time of `time.monotonic`, is followed by a checkpoint and Interrupted.
    `load` gives the base, where not `load_for` does.
    """
    seconds, pairs, heldout = prepared.seconds, prepared.train.encoded, prepared.heldout.encoded
    plan, named = make_data_order(len(pairs), recipe.train), prepared.reference_spec
    check_sync_steps(recipe, plan)
    what = question(recipe, named, prepared.source, device, plan, pairs, heldout)
    with timed(seconds, "reference"):
        asked = precompute_with_reference_model(
            what, named, pad_token_id(prepared.tokenizer), run_log, prepared.verified_caches
        )
    with timed(seconds, "load"):
        base = (base_loader or load_base_for_run)(prepared, recipe, device, run_log.info)
        chosen = recipe.train.micro_batch_tokens == "auto"
        before = saved_row_tokens(resume_from) if chosen and resume_from is not None else None
        loaded = _prepare_model(base, prepared, recipe, device, run_log.info, before)
    with timed(seconds, "reference"):
        asked = asked or reference_pass.precompute_reference_logps(what, loaded, run_log)
    model = loaded.model
    sides = (
        PreferenceDataset(pairs, asked.train_P2, read_loss_columns(prepared.train.pairs, recipe.objective)),
        PreferenceDataset(heldout, asked.heldout_P2, read_loss_columns(prepared.heldout.pairs, recipe.objective)),
    )
    job = TrainContext(
        recipe,
        device,
        plan,
        *sides,
        loaded.packing,
        run_log.run_dir,
        what.store,
        loaded.reference_adapter,
        allowed_changes,
        deadline,
        sample_fn,
    )
    state = TrainState(
        step=0,
        recipe=recipe.model_dump(exclude_none=True),
        fingerprints={
            "base": prepared.source.fingerprint,
            **tokenizer_fingerprints(prepared.tokenizer),
            "pairs": data_fingerprint(pairs),
            "heldout": data_fingerprint(heldout),
            **named.fingerprints,
        },
        row_tokens=loaded.packing.token_budget if chosen else None,
    )
    processes.check_same_on_all_ranks(state.fingerprints)
    with timed(seconds, "train"):
        match recipe.train.engine:
            case "qlora_dpo":
                state = train_loop(model, job, state, run_log, resume_from)
            case "trl":
                from qlora_dpo.training.trl_engine import train_with_trl

                if resume_from is not None or deadline < math.inf:
                    option = "--max-hours" if resume_from is None else "--resume"
                    raise RecipeError(f'{option} needs train.engine = "qlora_dpo"; TRL\'s checkpoints are pickled')
                model, state = train_with_trl(model, job, state, run_log, prepared.tokenizer)
            case never:
                assert_never(never)
    if state.best is not None and processes.is_main():
        load_best(run_log.run_dir, state.best, model)
        run_log.info(f"the adapter is that of step {state.best}, the best by {recipe.train.metric_for_best_model}")
    return TrainingResult(
        model.eval(), state, prepared, what.store.num_computed(), peak_memory_bytes(device), job.save_errors
    )


def load_base_for_run(prepared: PreparedData, recipe: Recipe, device: Device, log: Callable[[str], None]) -> Base:
    """The base as this machine computes best with it, and the layout that is proved for these pairs."""
    table, own = recipe.train, recipe.train.engine == "qlora_dpo"
    pairs, pad = (
        concatenate_sequences([prepared.train.encoded, prepared.heldout.encoded]),
        pad_token_id(prepared.tokenizer),
    )
    with malloc_release_eagerly() if device.type == "cpu" else nullcontext():
        base = load_base(prepared.source, recipe.model, device)
    dense = False
    if own and not processes.is_sharded():
        shapes, most = _footprint_and_workload(prepared, recipe, device)
        free = max(0, free_bytes(device) - sum(adapter_bytes(shapes, recipe).values()))
        longest = most.longest_pair_tokens(padded=bool(shapes.padding_reason))
        dense, words = cache_dequantized_if_fits(
            base, device, dense_weight_budget(shapes, table, longest, free, device)
        )
        log(words)
    if own and device.type == "cpu":
        malloc_retain()
    packing, why = choose_packing(base, pairs, Packing(table.row_tokens, pad, backend=None), device)
    log(f"layout: {why}")
    (probed,) = shortest_pairs(pairs, 1)
    # its logits exist whole: 0.15 GiB for 256 tokens and 152k words; until the proof they lie on the CPU
    probed = replace(probed, prompt=probed.prompt[-MAX_PROBE_TOKENS:], chosen=probed.chosen[:MAX_PROBE_TOKENS])
    return Base(base, packing, probed, probe_logits(base, probed, device).cpu(), dense)


def _footprint_and_workload(prepared: PreparedData, recipe: Recipe, device: Device) -> tuple[ModelFootprint, Workload]:
    """What the plan before the run was made of, and what goes through the model at most."""
    most = workload_of(prepared.train, prepared.heldout, recipe)
    return measure_footprint(prepared.source, recipe, device, most), most


def _prepare_model(
    base: Base,
    prepared: PreparedData,
    recipe: Recipe,
    device: Device,
    log: Callable[[str], None],
    resumed_row_tokens: int | None,
) -> PreparedModel:
    """The base with an adapter that is proved to be untrained, or the one that training goes on from.

    A part of the run before this one has had rows of so many tokens, where the recipe does not say it: "auto".
    """
    own = recipe.train.engine == "qlora_dpo"
    packing = replace(base.packing, token_budget=resumed_row_tokens or recipe.train.row_tokens)
    model, held = _attach_adapter(base.model, prepared.reference_spec, recipe, base.probed, device)
    if own:
        log(fuse_lora(model, device.torch_dtype))
    if processes.is_sharded():
        log(sharding.shard_layers(model, device))
    for sentence in prepared.reference_spec.notes:
        log(sentence)
    before_LV = base.before_LV.to(device.torch_device)
    check_adapter_off_is_base(
        model, before_LV, base.probed, packing, device, fresh=prepared.reference_spec.init_adapter is None
    )
    rows = packing
    if own:
        packing, rows = _choose_packings(model, base, prepared, recipe, device, log, resumed_row_tokens)
    if device.type == "cpu":
        malloc_trim()  # what the proofs took: blocks of other lengths than a step's
    weighed = make_token_weighting(recipe.objective)
    return PreparedModel(model, replace(packing, token_weighting=weighed), replace(rows, token_weighting=weighed), held)


def _choose_packings(
    model: PeftModel,
    base: Base,
    prepared: PreparedData,
    recipe: Recipe,
    device: Device,
    log: Callable[[str], None],
    resumed_row_tokens: int | None,
) -> tuple[Packing, Packing]:
    """The rows of training, with as many layers recomputed as memory asks for, and those of the reference pass."""
    shapes, most = _footprint_and_workload(prepared, recipe, device)
    to_come = (
        4 * shapes.num_trainable
        + shapes.optimizer_state_bytes
        + (0 if base.dense else conversion_bytes(shapes, recipe, device))
    )
    longest, free = most.longest_pair_tokens(padded=base.packing.backend is None), max(0, free_bytes(device) - to_come)
    free = processes.all_reduce_min(free)  # so that all have the same rows
    chosen = choose_row_plan(shapes, recipe.train, longest, free, resumed_row_tokens)
    for sentence in describe_row_plan(shapes, recipe.train, chosen, longest, free):
        log(f"memory: {sentence}")
    set_gradient_checkpointing(model, chosen.recomputed_layers)
    asked = reference_row_tokens(shapes, chosen, longest, device)
    return replace(base.packing, token_budget=chosen.tokens), replace(base.packing, token_budget=asked)


def _attach_adapter(
    base: PreTrainedModel, reference_spec: ReferenceSpec, recipe: Recipe, probe_pair: EncodedPair, device: Device
) -> tuple[PeftModel, ReferenceAdapter]:
    """The base with the adapter that training starts from, and what the reference is; saved adapters are proved."""
    saved = [
        each
        for each in dict.fromkeys((reference_spec.reference_adapter, reference_spec.init_adapter))
        if each is not None
    ]
    opened_LV = {}
    for each in saved:
        with opened_by_peft(base, each) as opened:
            opened_LV[each] = probe_logits(opened, probe_pair, device)
    model, frozen = attach_lora(base, recipe.lora, recipe.train.seed).eval(), None  # new layers would drop out inputs
    for each in saved:
        load_adapter_weights(model, each)
        check_matches_peft(model, opened_LV[each], probe_pair, device, each.folder)
        if each == reference_spec.reference_adapter:
            frozen = clone_adapter(model)
    if isinstance(recipe.reference, EmaReference):
        return model, ReferenceAdapter(clone_adapter(model), recipe.reference)
    return model, ReferenceAdapter(frozen)


def open_run_log(prepared: PreparedData, loaded: LoadedRecipe, folder: Path, resume_from: Path | None) -> RunLog:
    """The tracker of this run, to be entered with `with`; a resumed run's metrics are cut to its checkpoint's step.

    Of several processes the first alone writes and speaks.
    """
    start = int(resume_from.name.removeprefix("step-")) if resume_from else 0
    if processes.is_main():
        for name in (tracking.METRICS, tracking.EVALUATION_SAMPLES):
            tracking.truncate_metrics(folder / name, start if resume_from else -1)
    return RunLog(
        folder,
        make_data_order(len(prepared.train.encoded), loaded.recipe.train).total_steps,
        start_step=start,
        track=loaded.recipe.track,
        config=loaded.recipe.model_dump(exclude_none=True),
        name=folder.resolve().name,
        silent=not processes.is_main(),
    )


def data_fingerprint(pairs: Sequence[EncodedPair]) -> str:
    """SHA-256 over the token ids of all pairs in their order."""
    return hashlib.sha256(pair_digests(pairs).tobytes()).hexdigest()


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, which `load_tokenizer` makes sure of."""
    return int(tokenizer.pad_token_id or 0)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[part]`."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[part] = seconds.get(part, 0.0) + time.monotonic() - started
