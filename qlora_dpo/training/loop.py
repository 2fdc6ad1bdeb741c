"""The training loop: for each step its pairs, for each micro-batch a forward and a backward pass, then AdamW."""

import copy
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from qlora_dpo.data.audit import length_baselines
from qlora_dpo.errors import DoesNotFitError, Interrupted, ProcessEndedError, SourceError
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes, sharding
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.model.memory import malloc_trim
from qlora_dpo.preference.kl import kl_to_base
from qlora_dpo.preference.metrics import make_metric_sums
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.reference import ReferenceLogpCache, fresh_reference_logps
from qlora_dpo.preference.reference_adapter import ADAPTER_OFF, ReferenceAdapter, sync_reference
from qlora_dpo.recipe import Recipe
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training import schedule_free
from qlora_dpo.training.checkpoint.best import best_step, out_of_patience, save_best
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states
from qlora_dpo.training.checkpoint.save import (
    SinceEval,
    TrainState,
    checkpoint_dir,
    load_checkpoint,
    load_ema_reference,
    save_checkpoint,
)
from qlora_dpo.training.data_order import DataOrder
from qlora_dpo.training.evaluate import PreferenceDataset, evaluate
from qlora_dpo.training.interrupts import PROCESS_ENDED, StopRequest, catch_stop_signals, stop_reason
from qlora_dpo.training.nonfinite import check_finite, check_skipped_steps, halve_loss_scale
from qlora_dpo.training.oom_retry import enable_gradient_checkpointing, retry_with_smaller_rows
from qlora_dpo.training.optim import create_optimizer, create_scheduler, restore_scheduler
from qlora_dpo.training.train_step import StepAborted, accumulate_gradients, all_reduce_step, is_logged
from qlora_dpo.training.watch import RunHistory, find_warnings

SampleFn = Callable[[PeftModel], Sequence[Mapping[str, Any]]]
"""Lets the model as it is answer some held-out prompts; a record of each, as evaluation_samples.jsonl holds it."""


@dataclass(frozen=True)
class TrainContext:
    """What a run trains on, and where it writes."""

    recipe: Recipe
    device: Device
    data_order: DataOrder
    train: PreferenceDataset
    heldout: PreferenceDataset
    packing: Packing
    run_dir: Path
    reference_cache: ReferenceLogpCache
    reference_adapter: ReferenceAdapter = ADAPTER_OFF
    """What the adapter is while the reference answers."""
    allowed_changes: tuple[str, ...] = ()
    deadline: float = math.inf
    """When the run shall have ended, by `time.monotonic`."""
    sample_fn: SampleFn | None = None
    """What the model answers at an evaluation, if the recipe wants it."""
    save_errors: list[str] = field(default_factory=list)
    """Why checkpoints could not be saved, a sentence each; the run goes on without them."""


def train_loop(
    model: PeftModel, context: TrainContext, state: TrainState, run_log: RunLog, resume_from: Path | None = None
) -> TrainState:
    """Train `model` in place and return the final state with all evaluations.

    Raises Interrupted after SIGINT or SIGTERM and when the time is over, with a checkpoint saved, RunError when loss or
    gradient stop being finite, DoesNotFitError when memory does not suffice for smaller rows either, and SourceError if
    the disk has no room for the checkpoint that an interrupted run needs.
    """
    table, plan = context.recipe.train, context.data_order
    tools = _create_optimization(model, context)
    if resume_from is not None:
        state = _restore_checkpoint(resume_from, state, model, tools, context)
    if processes.sharding_strategy() == "zero2":
        tools = _with_zero2_optimizer(tools, model, context)
    if not state.evals:
        run_evaluation(model, context, state, run_log)

    model.train()
    with catch_stop_signals(run_log.info) as stop, context.reference_cache:
        at = _LoopState(model, context, state, tools, run_log, stop, _MetricsWindow(context))
        while state.step < plan.total_steps:
            began = time.monotonic()
            try:
                rate, norm = _train_step(at)
            except StepAborted as left:
                saved = _save_loop_state(at)
                raise Interrupted(
                    f"stopped within step {state.step + 1}, which begins anew; {saved} is saved, --resume goes on from "
                    "there"
                ) from left
            run_log.step(state.step)
            last, epoch_ends = state.step == plan.total_steps, plan.ends_epoch(state.step)
            logged = is_logged(context, state.step)
            if logged:
                run_log.log_train(at.window.record(state, norm, rate))
                at.window = _MetricsWindow(context)
            if last or is_due(state.step, table.eval_steps, epoch_ends):
                with at.window.paused(), schedule_free.eval_weights(tools.optimizer):
                    run_evaluation(model, context, state, run_log)
            now = time.monotonic()
            if why := stop_reason(stop.is_requested, not last and now + (now - began) > context.deadline):
                saved, kind = _save_loop_state(at), ProcessEndedError if why is PROCESS_ENDED else Interrupted
                raise kind(f"stopped after step {state.step}{why}; {saved} is saved, --resume goes on from there")
            if not last and (state.stopped or is_due(state.step, table.save_steps, epoch_ends)):
                with at.window.paused():
                    _try_save(at)
            if state.stopped:
                if not logged:
                    run_log.log_train(at.window.record(state, norm, rate))
                break
    schedule_free.finalize(tools.optimizer)
    return state


@dataclass(frozen=True)
class _Optimization:
    """What turns gradients into steps."""

    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    wrapped_optimizer: Any
    """The same optimizer, as it is among processes: accelerate's skips a step whose scaled gradients overflow, ZeRO-2's
    has a part of the state."""
    scheduler: LambdaLR


def _create_optimization(model: PeftModel, context: TrainContext) -> _Optimization:
    """Accelerator, optimizer and learning-rate schedule at step 0."""
    dtype = context.device.compute_dtype
    accelerator = Accelerator(mixed_precision="no" if dtype == "fp32" else dtype, cpu=context.device.type == "cpu")
    ratio = context.recipe.lora.loraplus_lr_ratio
    optimizer = create_optimizer(trainable_parameters(model), context.recipe.train, context.device, ratio)
    schedule = create_scheduler(optimizer, context.recipe.train, context.data_order.total_steps)
    return _Optimization(accelerator, optimizer, accelerator.prepare_optimizer(optimizer), schedule)


def _with_zero2_optimizer(optimization: _Optimization, model: PeftModel, context: TrainContext) -> _Optimization:
    """`tools` with the optimizer's state shared out among the processes."""
    from qlora_dpo.training.zero2_optimizer import Zero2Optimizer

    parameters = list(trainable_parameters(model).values())
    return replace(optimization, wrapped_optimizer=Zero2Optimizer(optimization.optimizer, parameters, context.device))


@dataclass
class _LoopState:
    """A run between two of its steps."""

    model: PeftModel
    context: TrainContext
    state: TrainState
    optimization: _Optimization
    run_log: RunLog
    stop_request: StopRequest
    window: "_MetricsWindow"


def _train_step(loop_state: _LoopState) -> tuple[float, float]:
    """Take one optimizer step; returns its learning rate and the norm of its gradient before clipping."""
    job, state, tools = loop_state.context, loop_state.state, loop_state.optimization
    pairs = job.train.pairs
    rows = [pairs[i].row for i in job.data_order.batch_indices(state.step + 1)]
    norm, indices = _accumulate_and_clip(loop_state)
    wrong, parameters = [pairs[i].row for i in indices], trainable_parameters(loop_state.model)
    scaled = tools.accelerator.scaler is not None and state.has_stepped
    fp16 = job.device.compute_dtype == "fp16"
    check_finite(state.step + 1, norm, parameters, wrong, rows, scaled=scaled, fp16=fp16)
    rate = float(tools.scheduler.get_last_lr()[0])
    tools.wrapped_optimizer.step()
    skipped = bool(tools.accelerator.optimizer_step_was_skipped)
    state.count_skipped(skipped)
    check_skipped_steps(state.step + 1, state.skipped_in_a_row, parameters, wrong, rows)
    if not skipped:
        tools.scheduler.step()
    tools.wrapped_optimizer.zero_grad()
    state.step += 1
    sync_reference(loop_state.model, job.reference_adapter, state.step)
    return rate, norm


def _accumulate_and_clip(loop_state: _LoopState) -> tuple[float, list[int]]:
    """Add up the step's gradient and clip it; returns its norm before, and the pairs whose loss is not finite.

    Which loss scale fits this model and this objective in fp16 is not known before the first step has been taken. Until
    then a scale at which the gradient overflows is halved and the same step is computed again: sppo_hard needs 2 ** 7
    and cal_dpo 2 ** 2, where torch begins with 2 ** 16. Raises RunError if no scale fits.
    """
    state, scaler, times = loop_state.state, loop_state.optimization.accelerator.scaler, 0
    parameters, most = trainable_parameters(loop_state.model), loop_state.context.recipe.train.max_grad_norm
    while True:
        wrong, undo = _accumulate_with_retry(loop_state)
        norm = float(loop_state.optimization.accelerator.clip_grad_norm_(parameters.values(), most))
        times += 1
        if scaler is None or state.has_stepped or wrong or math.isfinite(norm):
            break
        undo()
        scaler.update(halve_loss_scale(state.step + 1, scaler.get_scale()))
    if times > 1:
        loop_state.run_log.info(
            f"step {state.step + 1} was computed {times} times, since its gradient overflows fp16 at loss scales above "
            f"{scaler.get_scale():,.0f}"
        )
    return norm, wrong


def _accumulate_with_retry(loop_state: _LoopState) -> tuple[list[int], Callable[[], None]]:
    """Add up the step's gradient, in smaller rows if memory runs out; returns the pairs whose loss is not finite, and
    what takes all of it back, as if the step had not begun.

    Raises DoesNotFitError, with a checkpoint of the step before saved, if smaller rows do not help, and so
    ProcessEndedError if another process has ended; Left where a stop is asked for in the middle.
    """
    model, state = loop_state.model, loop_state.state
    before, counts = copy.deepcopy(loop_state.window.sums), state.counts()
    draws, mean = get_rng_states(), state.margin_mean

    def undo() -> None:
        loop_state.optimization.wrapped_optimizer.zero_grad()
        loop_state.window.sums = copy.deepcopy(before)

    def undo_whole_step() -> None:
        undo()
        set_rng_states(draws)
        state.set_counts(counts)
        state.margin_mean = mean

    def work(job: TrainContext) -> list[int]:
        return accumulate_gradients(
            model,
            job,
            state,
            loop_state.optimization.accelerator.backward,
            loop_state.window.sums,
            lambda: loop_state.stop_request.is_requested,
        )

    def resort() -> str:
        return enable_gradient_checkpointing(model, loop_state.context.recipe.train)

    try:
        wrong = retry_with_smaller_rows(
            f"step {state.step + 1}", work, loop_state.context, state, loop_state.run_log.info, undo, resort
        )
        return all_reduce_step(model, state, counts, wrong), undo_whole_step
    except DoesNotFitError as error:
        if processes.is_sharded() and not processes.is_main():
            raise  # the first process saves when it finds this one gone
        saved = _save_loop_state(loop_state)
        raise DoesNotFitError(f"{error}; {saved} is saved, and --resume goes on from there") from error
    except ProcessEndedError as error:
        undo_whole_step()
        saved = _save_loop_state(loop_state)
        raise ProcessEndedError(
            f"stopped after step {state.step}{PROCESS_ENDED}; {saved} is saved, --resume goes on from there"
        ) from error


def _restore_checkpoint(
    checkpoint: Path, current: TrainState, model: PeftModel, optimization: _Optimization, context: TrainContext
) -> TrainState:
    """The state of `checkpoint`, with model, tools and a moving reference as they were when it was saved."""
    state = load_checkpoint(checkpoint, current, model, optimization.optimizer, context.allowed_changes)
    state.stopped, state.stopped_by_sign = "", False
    if moving := _ema_reference_weights(context):
        load_ema_reference(checkpoint, moving)
    restore_scheduler(optimization.scheduler, optimization.optimizer, state.scheduler)
    schedule_free.restore_counters(optimization.optimizer, state.counters)
    if optimization.accelerator.scaler is not None and state.scaler:
        optimization.accelerator.scaler.load_state_dict(state.scaler)
    return state


def _ema_reference_weights(context: TrainContext) -> Mapping[str, Tensor] | None:
    """The weights of a reference that moves; None if it does not."""
    return context.reference_adapter.weights if context.reference_adapter.ema is not None else None


def _save_loop_state(loop_state: _LoopState) -> Path:
    """Write a checkpoint of everything that `_restored` puts back; of several processes the first does."""
    job, state, tools = loop_state.context, loop_state.state, loop_state.optimization
    optimized = tools.wrapped_optimizer.state  # of ZeRO-2 a part from each process
    if not processes.is_main():
        return checkpoint_dir(job.run_dir, state.step)
    state.scheduler, state.counters = tools.scheduler.state_dict(), schedule_free.get_counters(tools.optimizer)
    state.scaler = tools.accelerator.scaler.state_dict() if tools.accelerator.scaler is not None else {}
    return save_checkpoint(job.run_dir, state, loop_state.model, optimized, _ema_reference_weights(job))


def _try_save(loop_state: _LoopState) -> None:
    """Save, or note why not: what was saved before is still there, and the end of the run will tell."""
    try:
        _save_loop_state(loop_state)
    except SourceError as error:
        loop_state.context.save_errors.append(str(error))
        loop_state.run_log.info(
            f"step {loop_state.state.step} is not saved: {error}; the run goes on, and older checkpoints stay"
        )


def run_evaluation(model: PeftModel, context: TrainContext, state: TrainState, run_log: RunLog) -> None:
    """Evaluate on the held-out pairs, note it in the state, and tell the tracker; a moving reference is asked anew.

    Then come answers to held-out prompts, if any are wanted, and what follows for the run.
    """
    training = model.training

    def work(job: TrainContext) -> dict[str, Any]:
        side = job.heldout.for_this_rank()
        with run_log.phase("evaluate", len(side.pairs)) as advance:
            if job.reference_adapter.ema is not None:
                side = replace(
                    side,
                    reference_P2=fresh_reference_logps(
                        model, side.pairs, job.packing, job.device, job.reference_adapter
                    ),
                )
            record = evaluate(model, side, job.recipe.objective, job.packing, job.device, advance)
        return record | {"eval_kl": kl_to_base(model, job.heldout.pairs, job.packing, job.device)}

    record = retry_with_smaller_rows(
        f"evaluation after step {state.step}", work, context, state, run_log.info, lambda: model.train(training)
    )
    if context.device.type == "cpu":
        malloc_trim()  # blocks of other lengths than a step's
    seen, state.since_eval = state.since_eval, SinceEval()
    if seen.pairs:
        record |= {"eval_train_loss": seen.loss / seen.pairs, "eval_vanishing": seen.vanished / seen.pairs}
    state.evals.append({"step": state.step, "epoch": context.data_order.epoch(state.step), **record})
    run_log.log_evaluation(state.evals[-1])
    if context.sample_fn is not None:
        with sharding.unsharded(model):
            if processes.is_main():
                run_log.log_samples(state.step, context.sample_fn(model))
    _update_best(model, context, state, run_log)
    _log_new_warnings(context, state, run_log)


def _update_best(model: PeftModel, context: TrainContext, state: TrainState, run_log: RunLog) -> None:
    """Save the adapter if this evaluation is the best so far, and stop the run if it has waited long enough."""
    table = context.recipe.train
    if table.load_best_model_at_end and best_step(state.evals, table.metric_for_best_model) == state.step:
        try:
            if processes.is_main():
                save_best(context.run_dir, state.step, model)
            state.best = state.step
        except SourceError as error:
            context.save_errors.append(str(error))
            run_log.info(f"the best adapter so far is not kept: {error}; the run goes on")
    if state.step < context.data_order.total_steps and out_of_patience(state.evals, table):
        state.stopped = (
            f"stopped early after step {state.step}: {table.early_stopping_patience} evaluations were no better by "
            f"{table.metric_for_best_model} than step {best_step(state.evals, table.metric_for_best_model)}"
        )
        run_log.info(state.stopped)


def _log_new_warnings(context: TrainContext, state: TrainState, run_log: RunLog) -> None:
    """Tell the signs of trouble that are new, and stop the run if the recipe says so."""
    course = RunHistory(
        state.evals, context.data_order.total_steps, length_baselines(context.heldout.pairs), state.skipped_steps
    )
    told = {sign["name"] for sign in state.signs}
    for name, sentence in find_warnings(course).items():
        if name in told:
            continue
        state.signs.append({"step": state.step, "name": name, "sentence": sentence})
        run_log.log_warning(state.signs[-1])
        if name in context.recipe.watch.stop and not state.stopped_by_sign:
            state.stopped_by_sign = True
            state.stopped = f"stopped after step {state.step} by watch.stop, {name}: {sentence}"


def is_due(step: int, interval: int | None, default: bool) -> bool:
    """True if something is done after `step`: every so many steps, or where the recipe does not say, `otherwise`."""
    return default if interval is None else step % interval == 0


class _MetricsWindow:
    """The metrics and the time between two logged lines."""

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.sums = make_metric_sums(context.recipe.objective)
        self.started, self.idle = time.monotonic(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the throughput what is not training."""
        began = time.monotonic()
        yield
        self.idle += time.monotonic() - began

    def record(self, state: TrainState, norm: float, learning_rate: float) -> dict[str, Any]:
        """The line to log after `state.step`, under TRL's names; of several processes all ask for it together."""
        sums = self.sums.all_reduce()
        seconds = time.monotonic() - self.started - self.idle
        state.seconds += seconds
        return {
            "step": state.step,
            "epoch": self.context.data_order.epoch(state.step),
            **sums.means(),
            "learning_rate": learning_rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "num_tokens": state.num_tokens,
            "pairs_per_second": sums.pairs / seconds,
            "tokens_per_second": sums.tokens / seconds,
            "seconds": state.seconds,
            "memory_bytes": peak_memory_bytes(self.context.device),
            **({"skipped_steps": state.skipped_steps} if self.context.device.needs_grad_scaler else {}),
        }


def peak_memory_bytes(device: Device) -> int:
    """The most memory used so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
