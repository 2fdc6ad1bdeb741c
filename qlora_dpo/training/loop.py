"""The training loop: in each step a forward and a backward pass per micro-batch, then the optimizer."""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from qlora_dpo.errors import DoesNotFitError, Interrupted, ProcessEndedError, SourceError
from qlora_dpo.model.decoder_layers import checkpointable_layers
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.model.malloc import limit_heap
from qlora_dpo.preference.reference_adapter import sync_reference
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training import optim
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states
from qlora_dpo.training.checkpoint.save import checkpoint_dir, load_checkpoint, load_ema_reference, save_checkpoint
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.context import StepAborted, TrainContext
from qlora_dpo.training.data_order import is_due
from qlora_dpo.training.evaluate import keep_row_tokens, row_packing, run_evaluation
from qlora_dpo.training.interrupts import StopReason, StopRequest, catch_stop_signals, stop_reason
from qlora_dpo.training.nonfinite import check_finite, check_skipped_steps, halve_loss_scale
from qlora_dpo.training.oom_retry import enable_gradient_checkpointing, row_attempts
from qlora_dpo.training.throughput import MetricsWindow
from qlora_dpo.training.train_step import StepResult, accumulate_gradients, all_reduce_step

logger = logging.getLogger(__name__)


def train_loop(
    model: PeftModel, context: TrainContext, state: TrainState, run_log: RunLog, resume_from: Path | None = None
) -> TrainState:
    """Train `model` in place and return the final state with all evaluations.

    Raises Interrupted after SIGINT or SIGTERM and at the deadline, with a checkpoint saved, RunError when loss or
    gradient stop being finite, DoesNotFitError when memory runs out with the smallest rows as well, and SourceError if
    the disk has no room for the checkpoint that an interrupted run needs.
    """
    table, order = context.recipe.train, context.data_order
    tools = _make_optimization(model, context)
    if resume_from is not None:
        state = _restored(resume_from, state, model, tools, context)
    if processes.sharding_strategy() == "zero2":
        tools = _sharded_by_zero2(tools, model, context)
    if not state.evals:
        run_evaluation(model, context, state, run_log)

    model.train()
    is_limited = context.device.type == "cpu" and context.planned_bytes > 0
    heap = limit_heap(checkpointable_layers(model), context.planned_bytes) if is_limited else nullcontext()
    with catch_stop_signals() as stop, context.reference_cache, heap:
        loop = _Loop(model, context, state, tools, run_log, stop, MetricsWindow(context))
        while state.step < order.total_steps:
            began = time.monotonic()
            try:
                learning_rate, grad_norm = _take_step(loop)
            except StepAborted as aborted:
                saved = _save(loop)
                raise Interrupted(
                    f"stopped within step {state.step + 1}, which begins anew; {saved} is saved, --resume goes on from "
                    "there"
                ) from aborted
            run_log.step(state.step)
            is_last, ends_epoch = state.step == order.total_steps, order.ends_epoch(state.step)
            is_logged = context.is_logged(state.step)
            if is_logged:
                run_log.log_train(loop.window.record(state, grad_norm, learning_rate))
                loop.window = MetricsWindow(context)
            if order.evaluates_after(state.step, table.eval_steps):
                with loop.window.paused(), optim.eval_weights(tools.optimizer):
                    run_evaluation(model, context, state, run_log)
            now = time.monotonic()
            if reason := stop_reason(stop.is_requested, not is_last and now + (now - began) > context.deadline):
                saved = _save(loop)
                kind = ProcessEndedError if reason is StopReason.PROCESS_ENDED else Interrupted
                raise kind(
                    f"stopped after step {state.step}{reason.value}; {saved} is saved, --resume goes on from there"
                )
            if not is_last and (state.stopped or is_due(state.step, table.save_steps, ends_epoch)):
                with loop.window.paused(), run_log.pause():
                    _save_if_space(loop)
            if state.stopped:
                if not is_logged:
                    run_log.log_train(loop.window.record(state, grad_norm, learning_rate))
                break
    optim.finalize(tools.optimizer)
    return state


@dataclass(frozen=True)
class _Optimization:
    """What turns gradients into steps."""

    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    accelerated: Any
    """The optimizer behind accelerate's wrapper, which skips a step whose scaled gradients overflow, or behind
    ZeRO-2's, which holds this rank's part of its state."""
    schedule: LambdaLR


@dataclass
class _Loop:
    """The loop's live objects between two steps."""

    model: PeftModel
    context: TrainContext
    state: TrainState
    tools: _Optimization
    run_log: RunLog
    stop: StopRequest
    window: MetricsWindow


def _make_optimization(model: PeftModel, context: TrainContext) -> _Optimization:
    """Accelerator, optimizer and learning-rate schedule at step 0."""
    device, table = context.device, context.recipe.train
    mixed_precision = "no" if device.compute_dtype == "fp32" else device.compute_dtype
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
    optimizer = optim.create_optimizer(
        trainable_parameters(model), table, device, context.recipe.lora.loraplus_lr_ratio
    )
    schedule = optim.create_scheduler(optimizer, table, context.data_order.total_steps)
    return _Optimization(accelerator, optimizer, accelerator.prepare_optimizer(optimizer), schedule)


def _sharded_by_zero2(tools: _Optimization, model: PeftModel, context: TrainContext) -> _Optimization:
    """`tools` with the optimizer's state sharded over the ranks."""
    from qlora_dpo.training.zero2_optimizer import Zero2Optimizer  # DeepSpeed is an extra

    parameters = list(trainable_parameters(model).values())
    return replace(tools, accelerated=Zero2Optimizer(tools.optimizer, parameters, context.device))


def _take_step(loop: _Loop) -> tuple[float, float]:
    """Take one optimizer step and commit it; returns its learning rate and the norm of its gradient before clipping.

    Which loss scale suits this model and this objective in fp16 is not known before the first step has been taken.
    Until then a scale at which the gradient overflows is halved and the same step is computed again: sppo_hard needs
    2 ** 7 and cal_dpo 2 ** 2, where torch begins with 2 ** 16. Raises RunError if no scale fits.
    """
    context, state, tools = loop.context, loop.state, loop.tools
    step, batch = state.step + 1, context.data_order.batch_indices(state.step + 1)
    scaler, attempts, rng_states = tools.accelerator.scaler, 1, get_rng_states()
    result, grad_norm = _gradient(loop)
    while not (scaler is None or state.has_stepped or result.nonfinite or math.isfinite(grad_norm)):
        set_rng_states(rng_states)
        scaler.update(halve_loss_scale(step, scaler.get_scale()))
        attempts, (result, grad_norm) = attempts + 1, _gradient(loop)
    if scaler is not None and attempts > 1:
        logger.info(
            f"step {step} was computed {attempts} times, since its gradient overflows fp16 at loss scales above "
            f"{scaler.get_scale():,.0f}"
        )
    parameters = trainable_parameters(loop.model)
    rows, nonfinite_rows = ([context.train.pairs[i].row for i in indices] for indices in (batch, result.nonfinite))
    is_scaled, fp16 = scaler is not None and state.has_stepped, context.device.compute_dtype == "fp16"
    check_finite(step, grad_norm, parameters, nonfinite_rows, rows, scaled=is_scaled, fp16=fp16)
    learning_rate = float(tools.schedule.get_last_lr()[0])
    tools.accelerated.step()
    skipped = bool(tools.accelerator.optimizer_step_was_skipped)
    _commit(loop, result, len(batch), skipped=skipped)
    check_skipped_steps(step, state.skipped_in_a_row, parameters, nonfinite_rows, rows)
    if not skipped:
        tools.schedule.step()
    sync_reference(loop.model, context.reference_adapter, state.step)
    return learning_rate, grad_norm


def _commit(loop: _Loop, result: StepResult, batch_size: int, *, skipped: bool) -> None:
    """Count the step just taken: the only place where the result of a step changes anything."""
    train, indices = loop.context.train, result.reference_indices
    loop.state.commit(result.totals, batch_size, skipped=skipped)
    loop.window.add(result.metrics)
    if indices:
        train.set_reference(indices, result.reference_P2)
        loop.context.reference_cache.add([train.pairs[i] for i in indices], result.reference_P2)


def _gradient(loop: _Loop) -> tuple[StepResult, float]:
    """Accumulate the step's gradient over micro-batches and ranks, and clip it; in smaller rows if memory runs out.

    Returns the step's result and the gradient's norm before clipping. Raises StepAborted if a stop is requested in the
    middle, DoesNotFitError if smaller rows do not help, and ProcessEndedError if another rank has ended, the last two
    with a checkpoint of the step before saved.
    """
    model, context, state, accelerator = loop.model, loop.context, loop.state, loop.tools.accelerator
    packing, rng_states = row_packing(context, state), get_rng_states()
    last_try = partial(enable_gradient_checkpointing, model, context.recipe.train)
    try:
        for attempt in row_attempts(f"step {state.step + 1}", packing, last_try):
            with attempt:
                result = accumulate_gradients(
                    model, context, state, attempt.packing, partial(_backward, loop), lambda: loop.stop.is_requested
                )
        keep_row_tokens(state, packing, attempt.packing)
        result = all_reduce_step(model, result)
    except DoesNotFitError as error:
        if processes.is_sharded() and not processes.is_main():
            raise  # rank 0 saves when it finds this one gone
        if not processes.is_sharded():
            state.row_tokens = max(1, attempt.packing.token_budget // 2)  # where a resumed run begins
        saved = _save(loop)
        raise DoesNotFitError(f"{error}; {saved} is saved, and --resume goes on from there") from error
    except ProcessEndedError as error:
        set_rng_states(rng_states)
        saved = _save(loop)
        raise ProcessEndedError(
            f"stopped after step {state.step}{StopReason.PROCESS_ENDED.value}; {saved} is saved, --resume goes on from "
            "there"
        ) from error
    parameters, max_norm = trainable_parameters(model).values(), context.recipe.train.max_grad_norm
    return result, float(accelerator.clip_grad_norm_(parameters, max_norm))


def _backward(loop: _Loop, loss: Tensor) -> None:
    """Add the gradient of a micro-batch."""
    loop.tools.accelerator.backward(loss)


def _restored(
    checkpoint: Path, requested: TrainState, model: PeftModel, tools: _Optimization, context: TrainContext
) -> TrainState:
    """The state of `checkpoint`, with model, optimizer and an EMA reference as they were when it was saved."""
    state = load_checkpoint(checkpoint, requested, model, tools.optimizer, context.allowed_changes)
    state.stopped, state.stopped_by_sign = "", False
    if ema_weights := _ema_weights(context):
        load_ema_reference(checkpoint, ema_weights)
    optim.restore_scheduler(tools.schedule, tools.optimizer, state.scheduler)
    optim.restore_counters(tools.optimizer, state.counters)
    if tools.accelerator.scaler is not None and state.scaler:
        tools.accelerator.scaler.load_state_dict(state.scaler)
    return state


def _ema_weights(context: TrainContext) -> Mapping[str, Tensor] | None:
    """The weights of an EMA reference; None for a reference that stays as it is."""
    return context.reference_adapter.weights if context.reference_adapter.ema is not None else None


def _save(loop: _Loop) -> Path:
    """Write a checkpoint of everything that `_restored` restores; a collective, written by rank 0."""
    context, state, tools = loop.context, loop.state, loop.tools
    optimizer_state = tools.accelerated.state  # ZeRO-2 gathers it from all ranks
    if not processes.is_main():
        return checkpoint_dir(context.run_dir, state.step)
    state.scheduler, state.counters = tools.schedule.state_dict(), optim.get_counters(tools.optimizer)
    state.scaler = tools.accelerator.scaler.state_dict() if tools.accelerator.scaler is not None else {}
    return save_checkpoint(context.run_dir, state, loop.model, optimizer_state, _ema_weights(context))


def _save_if_space(loop: _Loop) -> None:
    """Save a checkpoint, or note why not: older checkpoints are still there, and the end of the run says so again."""
    try:
        _save(loop)
    except SourceError as error:
        loop.context.save_errors.append(str(error))
        logger.info(f"step {loop.state.step} is not saved: {error}; the run goes on, and older checkpoints stay")
