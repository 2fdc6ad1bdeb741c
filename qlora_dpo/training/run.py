"""One run, from its recipe to a trained model: the same way for a command, the runs of a sweep, and ranks above 0."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from qlora_dpo import run_folder
from qlora_dpo.data.encoded import data_fingerprint
from qlora_dpo.data.progress import ProgressCallback, no_progress
from qlora_dpo.data.templates.chat_template import template_date
from qlora_dpo.files import write_json
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes, sharding
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.preference.start_evaluation import start_evaluation_file
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.recipe import LoadedRecipe
from qlora_dpo.tracking import run_log as tracking
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.build_model import LoadedBase, build_model, load_base_for_run
from qlora_dpo.training.checkpoint.best import load_best
from qlora_dpo.training.checkpoint.save import newest_valid, saved_row_tokens
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.context import PreferenceDataset, SampleFn, TrainContext
from qlora_dpo.training.engine import engine_of
from qlora_dpo.training.interrupts import explain_interrupt
from qlora_dpo.training.prepare import PreparedData, check_sync_steps, prepare_data, timed
from qlora_dpo.training.reference_pass import (
    open_reference_cache,
    precompute_reference_logps,
    precompute_with_reference_model,
)
from qlora_dpo.training.throughput import peak_memory_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What a command line decides beside the recipe."""

    resume: bool = False
    allowed_changes: tuple[str, ...] = ()
    """Keys of the recipe that may differ from the checkpoint's."""
    deadline: float = math.inf
    """The last step that ends before this time of `time.monotonic` is followed by a checkpoint and Interrupted."""
    interim_eval_pairs: int | None = None
    """Held-out pairs of an evaluation on the way, between the first and the last; None for all of them."""


@dataclass
class TrainingResult:
    """A trained model with all that run.json and results.json say about it."""

    model: PeftModel
    state: TrainState
    prepared: PreparedData
    reference_pairs_computed: int
    peak_bytes: int
    save_errors: list[str]
    """Why checkpoints could not be saved, one sentence each."""

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part of the run."""
        return self.prepared.seconds


@dataclass(frozen=True)
class RunHooks:
    """What the caller adds to a run. A sweep gives `prepare` and `load_base` of its own, which share base and data."""

    check_prepared: Callable[[PreparedData], None] = lambda prepared: None
    """Called on rank 0 once data is read and before a weight is; raises to refuse the run."""
    sample_fn: Callable[[PreparedData], SampleFn | None] = lambda prepared: None
    """Makes what generates completions at evaluations."""
    before_training: Callable[[PreparedData, PeftModel, TrainContext], None] = lambda prepared, model, context: None
    """Called on rank 0 before the first step of a run that is not resumed; it changes nothing."""
    save: Callable[[TrainingResult, RunLog], None] = lambda result, run_log: None
    """Called on rank 0 with the trained model while the run log is open: saves the adapter and generates samples."""
    conclude: Callable[[TrainingResult], None] = lambda result: None
    """Called on rank 0 once the run log is closed: writes and prints the results."""
    prepare: Callable[[Recipe, ProgressCallback], PreparedData] = lambda recipe, watch: prepare_data(
        recipe, watch=watch
    )
    load_base: Callable[[PreparedData, Device], LoadedBase] = load_base_for_run
    watch: ProgressCallback = no_progress
    """Receives the progress of reading."""


def run_training(
    loaded: LoadedRecipe, folder: Path, device: Device, options: RunOptions, hooks: RunHooks
) -> TrainingResult:
    """Train the recipe into `folder`, from reading its data to `hooks.conclude`; a collective.

    Rank 0 owns the folder, writes and reports; other ranks take part in every step and leave no trace. Raises what
    `train_loop` raises, RunError for a folder that holds another run.
    """
    if not processes.is_main():
        return _train_on_other_rank(loaded, folder, device, options, hooks)
    with (
        run_folder.exclusive_run_folder(folder, loaded, resume=options.resume, log=logger.info),
        explain_interrupt(folder),
    ):
        processes.barrier()
        prepared = hooks.prepare(loaded.recipe, hooks.watch)
        hooks.check_prepared(prepared)
        audits = {"train": prepared.train.audit.to_dict(), "eval": prepared.heldout.audit.to_dict()}
        write_json(folder / run_folder.AUDIT, audits)
        resume_from, skipped = newest_valid(folder) if options.resume else (None, [])
        with open_run_log(prepared, loaded, folder, resume_from) as run_log:
            for sentence in skipped:
                logger.info(sentence)
            result = train_prepared(prepared, device, run_log, options, hooks, resume_from)
            hooks.save(result, run_log)
        hooks.conclude(result)
    return result


def _train_on_other_rank(
    loaded: LoadedRecipe, folder: Path, device: Device, options: RunOptions, hooks: RunHooks
) -> TrainingResult:
    """The part of a rank above 0 in `run_training`."""
    processes.barrier()
    prepared = hooks.prepare(loaded.recipe, no_progress)
    resume_from, _ = newest_valid(folder) if options.resume else (None, [])
    with open_run_log(prepared, loaded, folder, resume_from) as run_log:
        result = train_prepared(prepared, device, run_log, options, hooks, resume_from)
        sharding.unshard_layers(result.model)  # rank 0 generates alone
    return result


def train_prepared(
    prepared: PreparedData,
    device: Device,
    run_log: RunLog,
    options: RunOptions,
    hooks: RunHooks,
    resume_from: Path | None,
) -> TrainingResult:
    """Load the base, compute the reference, check the start, and train with the recipe's engine; a collective."""
    recipe, seconds, order = prepared.recipe, prepared.seconds, prepared.order
    is_auto = recipe.train.micro_batch_tokens == "auto"
    check_sync_steps(recipe, order)
    cache = open_reference_cache(prepared, device)
    with timed(seconds, "reference"):
        datasets = precompute_with_reference_model(prepared, device, cache, run_log)
    with timed(seconds, "load"):
        base = hooks.load_base(prepared, device)
        row_tokens = saved_row_tokens(resume_from) if is_auto and resume_from is not None else None
        loaded = build_model(base, prepared, device, row_tokens)
    with timed(seconds, "reference"):
        train, heldout = datasets or precompute_reference_logps(prepared, loaded, device, cache, run_log)
    context = TrainContext(
        recipe=recipe,
        device=device,
        data_order=order,
        train=train,
        heldout=heldout,
        packing=loaded.packing,
        run_dir=run_log.run_dir,
        reference_cache=cache,
        reference_adapter=loaded.reference_adapter,
        planned_bytes=loaded.planned_bytes,
        allowed_changes=options.allowed_changes,
        deadline=options.deadline,
        interim_eval_pairs=options.interim_eval_pairs,
        start_evaluation_file=_start_evaluation_file(recipe, heldout, cache),
        sample_fn=hooks.sample_fn(prepared),
    )
    state = TrainState(
        step=0,
        recipe=recipe.model_dump(exclude_none=True),
        fingerprints=_fingerprints(prepared),
        template_date=template_date(prepared.tokenizer),
        row_tokens=loaded.packing.token_budget if is_auto else None,
    )
    processes.check_same_on_all_ranks(state.fingerprints)
    if resume_from is None and processes.is_main():
        with timed(seconds, "forecast"):
            hooks.before_training(prepared, loaded.model, context)
    with timed(seconds, "train"):
        train_fn = engine_of(recipe).train_fn(prepared.tokenizer)
        state = train_fn(loaded.model, context, state, run_log, resume_from)
    if state.best is not None and processes.is_main():
        load_best(run_log.run_dir, state.best, loaded.model)
        logger.info(f"the adapter is that of step {state.best}, the best by {recipe.train.metric_for_best_model}")
    computed = cache.num_computed()
    return TrainingResult(
        loaded.model.eval(), state, prepared, computed, peak_memory_bytes(device), context.save_errors
    )


def open_run_log(prepared: PreparedData, loaded: LoadedRecipe, folder: Path, resume_from: Path | None) -> RunLog:
    """The run's log, to be entered with `with`; records after the step of `resume_from` are removed.

    Ranks above 0 get one that writes and shows nothing.
    """
    start = int(resume_from.name.removeprefix("step-")) if resume_from else 0
    if processes.is_main():
        for name in (tracking.METRICS, tracking.EVALUATION_SAMPLES):
            tracking.truncate_metrics(folder / name, start if resume_from else -1)
    order, eval_steps = prepared.order, loaded.recipe.train.eval_steps
    return RunLog(
        folder,
        order.total_steps,
        start_step=start,
        track=loaded.recipe.track,
        config=loaded.recipe.model_dump(exclude_none=True),
        name=folder.resolve().name,
        silent=not processes.is_main(),
        evaluation_steps=[step for step in range(1, order.total_steps + 1) if order.evaluates_after(step, eval_steps)],
    )


def _start_evaluation_file(recipe: Recipe, heldout: PreferenceDataset, cache: ReferenceLogpCache) -> Path | None:
    """Where the evaluation of step 0 is kept; None if it is made anew in every run."""
    if processes.world_size() > 1 or engine_of(recipe).is_trl:
        return None
    return start_evaluation_file(cache.folder, recipe, heldout.pairs, heldout.columns)


def _fingerprints(prepared: PreparedData) -> dict[str, str]:
    """SHA-256 of everything beside the recipe that decides what a step does."""
    return {
        "base": prepared.source.fingerprint,
        **prepared.tokenizer_fingerprints,
        "pairs": data_fingerprint(prepared.train.encoded),
        "heldout": data_fingerprint(prepared.heldout.encoded),
        **prepared.reference_spec.fingerprints,
    }
