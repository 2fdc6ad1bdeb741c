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

from qlora_dpo.data.audit import baselines
from qlora_dpo.errors import DoesNotFitError, Interrupted, ProcessEndedError, SourceError
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes, sharding
from qlora_dpo.model.lora import trainable
from qlora_dpo.model.memory import give_back_freed_memory
from qlora_dpo.preference.kl import kl_to_base
from qlora_dpo.preference.metrics import sums_for
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.reference import Store, asked_now
from qlora_dpo.preference.reference_adapter import OFF, Held, follow
from qlora_dpo.recipe import Recipe
from qlora_dpo.tracking.run_log import Tracker
from qlora_dpo.training import schedule_free
from qlora_dpo.training.checkpoint.best import best, out_of_patience, save_best
from qlora_dpo.training.checkpoint.rng_state import random_states, restore
from qlora_dpo.training.checkpoint.save import (
    SinceEval,
    State,
    folder_of,
    load_checkpoint,
    load_moving,
    save_checkpoint,
)
from qlora_dpo.training.data_order import Plan
from qlora_dpo.training.evaluate import Side, evaluate
from qlora_dpo.training.interrupts import ENDED, Stop, stop_when_asked, why_stop
from qlora_dpo.training.nonfinite import half_of_scale, insist_on_finite, insist_on_some_steps
from qlora_dpo.training.oom_retry import as_it_fits, recompute_all
from qlora_dpo.training.optim import make_optimizer, make_schedule, restore_schedule
from qlora_dpo.training.train_step import Left, gradient, is_logged, joined
from qlora_dpo.training.watch import Course, signs

Ask = Callable[[PeftModel], Sequence[Mapping[str, Any]]]
"""Lets the model as it is answer some held-out prompts; a record of each, as evaluation_samples.jsonl holds it."""


@dataclass(frozen=True)
class Job:
    """What a run trains on, and where it writes."""

    recipe: Recipe
    device: Device
    plan: Plan
    train: Side
    heldout: Side
    packing: Packing
    folder: Path
    store: Store
    held: Held = OFF
    """What the adapter is while the reference answers."""
    allowed: tuple[str, ...] = ()
    until: float = math.inf
    """When the run shall have ended, by `time.monotonic`."""
    ask: Ask | None = None
    """What the model answers at an evaluation, if the recipe wants it."""
    unsaved: list[str] = field(default_factory=list)
    """Why checkpoints could not be saved, a sentence each; the run goes on without them."""


def fit(model: PeftModel, job: Job, state: State, tracker: Tracker, resume: Path | None = None) -> State:
    """Train `model` in place and return the final state with all evaluations.

    Raises Interrupted after SIGINT or SIGTERM and when the time is over, with a checkpoint saved, RunError when loss or
    gradient stop being finite, DoesNotFitError when memory does not suffice for smaller rows either, and SourceError if
    the disk has no room for the checkpoint that an interrupted run needs.
    """
    table, plan = job.recipe.train, job.plan
    tools = _tools(model, job)
    if resume is not None:
        state = _restored(resume, state, model, tools, job)
    if processes.sharing() == "zero2":
        tools = _shared(tools, model, job)
    if not state.evals:
        evaluate_now(model, job, state, tracker)

    model.train()
    with stop_when_asked(tracker.note) as stop, job.store:
        at = _Course(model, job, state, tools, tracker, stop, _Window(job))
        while state.step < plan.total_steps:
            began = time.monotonic()
            try:
                rate, norm = _step(at)
            except Left as left:
                saved = _save(at)
                raise Interrupted(
                    f"stopped within step {state.step + 1}, which begins anew; {saved} is saved, --resume goes on from "
                    "there"
                ) from left
            tracker.step(state.step)
            last, epoch_ends = state.step == plan.total_steps, plan.ends_epoch(state.step)
            logged = is_logged(job, state.step)
            if logged:
                tracker.train(at.window.record(state, norm, rate))
                at.window = _Window(job)
            if last or due(state.step, table.eval_steps, epoch_ends):
                with at.window.paused(), schedule_free.averaged(tools.optimizer):
                    evaluate_now(model, job, state, tracker)
            now = time.monotonic()
            if why := why_stop(stop.asked, not last and now + (now - began) > job.until):
                saved, kind = _save(at), ProcessEndedError if why is ENDED else Interrupted
                raise kind(f"stopped after step {state.step}{why}; {saved} is saved, --resume goes on from there")
            if not last and (state.stopped or due(state.step, table.save_steps, epoch_ends)):
                with at.window.paused():
                    _save_if_there_is_room(at)
            if state.stopped:
                if not logged:
                    tracker.train(at.window.record(state, norm, rate))
                break
    schedule_free.settle(tools.optimizer)
    return state


@dataclass(frozen=True)
class _Tools:
    """What turns gradients into steps."""

    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    accelerated: Any
    """The same optimizer, as it is among processes: accelerate's skips a step whose scaled gradients overflow, ZeRO-2's
    has a part of the state."""
    schedule: LambdaLR


def _tools(model: PeftModel, job: Job) -> _Tools:
    """Accelerator, optimizer and learning-rate schedule at step 0."""
    dtype = job.device.compute_dtype
    accelerator = Accelerator(mixed_precision="no" if dtype == "fp32" else dtype, cpu=job.device.type == "cpu")
    ratio = job.recipe.lora.loraplus_lr_ratio
    optimizer = make_optimizer(trainable(model), job.recipe.train, job.device, ratio)
    schedule = make_schedule(optimizer, job.recipe.train, job.plan.total_steps)
    return _Tools(accelerator, optimizer, accelerator.prepare_optimizer(optimizer), schedule)


def _shared(tools: _Tools, model: PeftModel, job: Job) -> _Tools:
    """`tools` with the optimizer's state shared out among the processes."""
    from qlora_dpo.training.zero2_optimizer import SharedOptimizer

    parameters = list(trainable(model).values())
    return replace(tools, accelerated=SharedOptimizer(tools.optimizer, parameters, job.device))


@dataclass
class _Course:
    """A run between two of its steps."""

    model: PeftModel
    job: Job
    state: State
    tools: _Tools
    tracker: Tracker
    stop: Stop
    window: "_Window"


def _step(at: _Course) -> tuple[float, float]:
    """Take one optimizer step; returns its learning rate and the norm of its gradient before clipping."""
    job, state, tools = at.job, at.state, at.tools
    pairs = job.train.pairs
    rows = [pairs[i].row for i in job.plan.indices(state.step + 1)]
    norm, indices = _clipped_gradient(at)
    wrong, parameters = [pairs[i].row for i in indices], trainable(at.model)
    scaled = tools.accelerator.scaler is not None and state.moved
    fp16 = job.device.compute_dtype == "fp16"
    insist_on_finite(state.step + 1, norm, parameters, wrong, rows, scaled=scaled, fp16=fp16)
    rate = float(tools.schedule.get_last_lr()[0])
    tools.accelerated.step()
    skipped = bool(tools.accelerator.optimizer_step_was_skipped)
    state.count_skipped(skipped)
    insist_on_some_steps(state.step + 1, state.skipped_in_a_row, parameters, wrong, rows)
    if not skipped:
        tools.schedule.step()
    tools.accelerated.zero_grad()
    state.step += 1
    follow(at.model, job.held, state.step)
    return rate, norm


def _clipped_gradient(at: _Course) -> tuple[float, list[int]]:
    """Add up the step's gradient and clip it; returns its norm before, and the pairs whose loss is not finite.

    Which loss scale fits this model and this objective in fp16 is not known before the first step has been taken. Until
    then a scale at which the gradient overflows is halved and the same step is computed again: sppo_hard needs 2 ** 7
    and cal_dpo 2 ** 2, where torch begins with 2 ** 16. Raises RunError if no scale fits.
    """
    state, scaler, times = at.state, at.tools.accelerator.scaler, 0
    parameters, most = trainable(at.model), at.job.recipe.train.max_grad_norm
    while True:
        wrong, undo = _gradient_as_it_fits(at)
        norm = float(at.tools.accelerator.clip_grad_norm_(parameters.values(), most))
        times += 1
        if scaler is None or state.moved or wrong or math.isfinite(norm):
            break
        undo()
        scaler.update(half_of_scale(state.step + 1, scaler.get_scale()))
    if times > 1:
        at.tracker.note(
            f"step {state.step + 1} was computed {times} times, since its gradient overflows fp16 at loss scales above "
            f"{scaler.get_scale():,.0f}"
        )
    return norm, wrong


def _gradient_as_it_fits(at: _Course) -> tuple[list[int], Callable[[], None]]:
    """Add up the step's gradient, in smaller rows if memory runs out; returns the pairs whose loss is not finite, and
    what takes all of it back, as if the step had not begun.

    Raises DoesNotFitError, with a checkpoint of the step before saved, if smaller rows do not help, and so
    ProcessEndedError if another process has ended; Left where a stop is asked for in the middle.
    """
    model, state = at.model, at.state
    before, counts = copy.deepcopy(at.window.sums), state.counts()
    draws, mean = random_states(), state.margin_mean

    def undo() -> None:
        at.tools.accelerated.zero_grad()
        at.window.sums = copy.deepcopy(before)

    def undo_whole_step() -> None:
        undo()
        restore(draws)
        state.set_counts(counts)
        state.margin_mean = mean

    def work(job: Job) -> list[int]:
        return gradient(model, job, state, at.tools.accelerator.backward, at.window.sums, lambda: at.stop.asked)

    def resort() -> str:
        return recompute_all(model, at.job.recipe.train)

    try:
        wrong = as_it_fits(f"step {state.step + 1}", work, at.job, state, at.tracker.note, undo, resort)
        return joined(model, state, counts, wrong), undo_whole_step
    except DoesNotFitError as error:
        if processes.sharded() and not processes.is_main():
            raise  # the first process saves when it finds this one gone
        saved = _save(at)
        raise DoesNotFitError(f"{error}; {saved} is saved, and --resume goes on from there") from error
    except ProcessEndedError as error:
        undo_whole_step()
        saved = _save(at)
        raise ProcessEndedError(
            f"stopped after step {state.step}{ENDED}; {saved} is saved, --resume goes on from there"
        ) from error


def _restored(checkpoint: Path, asked: State, model: PeftModel, tools: _Tools, job: Job) -> State:
    """The state of `checkpoint`, with model, tools and a moving reference as they were when it was saved."""
    state = load_checkpoint(checkpoint, asked, model, tools.optimizer, job.allowed)
    state.stopped, state.stopped_by_sign = "", False
    if moving := _moving(job):
        load_moving(checkpoint, moving)
    restore_schedule(tools.schedule, tools.optimizer, state.scheduler)
    schedule_free.restore(tools.optimizer, state.counters)
    if tools.accelerator.scaler is not None and state.scaler:
        tools.accelerator.scaler.load_state_dict(state.scaler)
    return state


def _moving(job: Job) -> Mapping[str, Tensor] | None:
    """The weights of a reference that moves; None if it does not."""
    return job.held.weights if job.held.follows is not None else None


def _save(at: _Course) -> Path:
    """Write a checkpoint of everything that `_restored` puts back; of several processes the first does."""
    job, state, tools = at.job, at.state, at.tools
    optimized = tools.accelerated.state  # of ZeRO-2 a part from each process
    if not processes.is_main():
        return folder_of(job.folder, state.step)
    state.scheduler, state.counters = tools.schedule.state_dict(), schedule_free.counters(tools.optimizer)
    state.scaler = tools.accelerator.scaler.state_dict() if tools.accelerator.scaler is not None else {}
    return save_checkpoint(job.folder, state, at.model, optimized, _moving(job))


def _save_if_there_is_room(at: _Course) -> None:
    """Save, or note why not: what was saved before is still there, and the end of the run will tell."""
    try:
        _save(at)
    except SourceError as error:
        at.job.unsaved.append(str(error))
        at.tracker.note(f"step {at.state.step} is not saved: {error}; the run goes on, and older checkpoints stay")


def evaluate_now(model: PeftModel, job: Job, state: State, tracker: Tracker) -> None:
    """Evaluate on the held-out pairs, note it in the state, and tell the tracker; a moving reference is asked anew.

    Then come answers to held-out prompts, if any are wanted, and what follows for the run.
    """
    training = model.training

    def work(job: Job) -> dict[str, Any]:
        side = job.heldout.own()
        with tracker.phase("evaluate", len(side.pairs)) as advance:
            if job.held.follows is not None:
                side = replace(side, reference_P2=asked_now(model, side.pairs, job.packing, job.device, job.held))
            record = evaluate(model, side, job.recipe.objective, job.packing, job.device, advance)
        return record | {"eval_kl": kl_to_base(model, job.heldout.pairs, job.packing, job.device)}

    record = as_it_fits(
        f"evaluation after step {state.step}", work, job, state, tracker.note, lambda: model.train(training)
    )
    if job.device.type == "cpu":
        give_back_freed_memory()  # blocks of other lengths than a step's
    seen, state.since_eval = state.since_eval, SinceEval()
    if seen.pairs:
        record |= {"eval_train_loss": seen.loss / seen.pairs, "eval_vanishing": seen.vanished / seen.pairs}
    state.evals.append({"step": state.step, "epoch": job.plan.epoch(state.step), **record})
    tracker.evaluation(state.evals[-1])
    if job.ask is not None:
        with sharding.gathered(model):
            if processes.is_main():
                tracker.samples(state.step, job.ask(model))
    _keep_the_best(model, job, state, tracker)
    _look_for_signs(job, state, tracker)


def _keep_the_best(model: PeftModel, job: Job, state: State, tracker: Tracker) -> None:
    """Save the adapter if this evaluation is the best so far, and stop the run if it has waited long enough."""
    table = job.recipe.train
    if table.load_best_model_at_end and best(state.evals, table.metric_for_best_model) == state.step:
        try:
            if processes.is_main():
                save_best(job.folder, state.step, model)
            state.best = state.step
        except SourceError as error:
            job.unsaved.append(str(error))
            tracker.note(f"the best adapter so far is not kept: {error}; the run goes on")
    if state.step < job.plan.total_steps and out_of_patience(state.evals, table):
        state.stopped = (
            f"stopped early after step {state.step}: {table.early_stopping_patience} evaluations were no better by "
            f"{table.metric_for_best_model} than step {best(state.evals, table.metric_for_best_model)}"
        )
        tracker.note(state.stopped)


def _look_for_signs(job: Job, state: State, tracker: Tracker) -> None:
    """Tell the signs of trouble that are new, and stop the run if the recipe says so."""
    course = Course(state.evals, job.plan.total_steps, baselines(job.heldout.pairs), state.skipped_steps)
    told = {sign["name"] for sign in state.signs}
    for name, sentence in signs(course, job.recipe.watch).items():
        if name in told:
            continue
        state.signs.append({"step": state.step, "name": name, "sentence": sentence})
        tracker.sign(state.signs[-1])
        if name in job.recipe.watch.stop and not state.stopped_by_sign:
            state.stopped_by_sign = True
            state.stopped = f"stopped after step {state.step} by watch.stop, {name}: {sentence}"


def due(step: int, every: int | None, otherwise: bool) -> bool:
    """True if something is done after `step`: every so many steps, or where the recipe does not say, `otherwise`."""
    return otherwise if every is None else step % every == 0


class _Window:
    """The metrics and the time between two logged lines."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.sums = sums_for(job.recipe.objective)
        self.started, self.idle = time.monotonic(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the throughput what is not training."""
        began = time.monotonic()
        yield
        self.idle += time.monotonic() - began

    def record(self, state: State, norm: float, learning_rate: float) -> dict[str, Any]:
        """The line to log after `state.step`, under TRL's names; of several processes all ask for it together."""
        sums = self.sums.of_all()
        seconds = time.monotonic() - self.started - self.idle
        state.seconds += seconds
        return {
            "step": state.step,
            "epoch": self.job.plan.epoch(state.step),
            **sums.means(),
            "learning_rate": learning_rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "num_tokens": state.num_tokens,
            "pairs_per_second": sums.pairs / seconds,
            "tokens_per_second": sums.tokens / seconds,
            "seconds": state.seconds,
            "memory_bytes": peak_bytes(self.job.device),
            **({"skipped_steps": state.skipped_steps} if self.job.device.grad_scaler else {}),
        }


def peak_bytes(device: Device) -> int:
    """The most memory used so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
