"""The gradient of one optimizer step: the mean loss over its pairs, however they are split into micro-batches."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_dpo.model.distributed import processes
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.model.transfer import copy_batched
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.metrics import MetricSums
from qlora_dpo.preference.objective import (
    Logps,
    LossColumns,
    Losses,
    compute_losses,
    concat_logps,
    dynamic_beta,
    loss_gradients,
    needs_reference,
    needs_whole_step,
    uses_wpo_weighting,
)
from qlora_dpo.preference.pack import MicroBatch, collate, micro_batches
from qlora_dpo.preference.reference import batch_reference_logps
from qlora_dpo.recipe.objective import BetaDpo, reward_beta
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states
from qlora_dpo.training.checkpoint.save import TrainState

if TYPE_CHECKING:
    from qlora_dpo.training.loop import TrainContext

VANISHING_GRAD_RATIO = 0.05
"""A pair with less than this share of the first step's gradient has little more to teach."""

Backward = Callable[[Tensor], Any]


@dataclass
class _StepStats:
    """What the pairs of a step have shown so far, on the device: it is read once, when the step's last pass is done."""

    indices: list[int] = field(default_factory=list)
    loss_P: list[Tensor] = field(default_factory=list)
    grad_P: list[Tensor] = field(default_factory=list)
    new_reference: list[tuple[list[int], Tensor]] = field(default_factory=list)
    """Pairs whose reference log-probabilities were computed along with the step, and those, (P, 2)."""

    def add(self, indices: Sequence[int], losses: Losses, grad_P: Tensor) -> None:
        """Note the losses of some pairs and how much their log-probabilities move them."""
        self.indices += indices
        self.loss_P.append(losses.total_P.detach())
        self.grad_P.append(grad_P)


class StepAborted(Exception):
    """A step was left between two of its micro-batches, since the run shall stop; nothing of it counts."""


def accumulate_gradients(
    model: PeftModel,
    context: "TrainContext",
    state: TrainState,
    backward: Backward,
    sums: MetricSums,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[int]:
    """Add up the gradient of the step after `state.step`; return the pairs whose loss is not finite, as indices.

    Raises Left where `leave` says so and more than one micro-batch is still to come. Of several processes each does its
    own pairs.
    """
    indices = context.data_order.batch_indices(state.step + 1)
    pairs = [context.train.pairs[i] for i in indices]
    own = rank_split.rank_indices(pairs)
    batches = micro_batches([pairs[i] for i in own], context.packing)
    groups = rank_split.pad_group_count([[indices[own[i]] for i in group] for group in batches])
    processes.seed(context.recipe.train.seed, state.step)
    seen = _StepStats()
    if needs_whole_step(context.recipe.objective) and (len(groups) > 1 or processes.world_size() > 1):
        _two_pass_gradients(model, context, state, groups, backward, sums, should_stop, seen)
    else:
        for group in _until_stopped(groups, should_stop, 0):
            if group is None:
                backward(0 * _dummy_forward(model, context, state, sums).chosen_logp_P.sum())
                continue
            losses, slope_P = _compute_losses(
                _compute_logps(model, context, state, group, sums, seen), context, state, sums
            )
            backward(losses.total_P.sum() / len(indices))
            seen.add(group, losses, slope_P)
    _cache_reference_logps(context, seen)
    return _update_state(context, state, seen)


def is_logged(context: "TrainContext", step: int) -> bool:
    """True if the metrics of `step` are logged, whatever happens in it."""
    return step in (1, context.data_order.total_steps) or step % context.recipe.train.logging_steps == 0


def all_reduce_step(
    model: PeftModel, state: TrainState, counts_before: Sequence[float], nonfinite: list[int]
) -> list[int]:
    """Make the step whole in every process: the gradient, what `state` has counted since `before`, and the pairs whose
    loss is not finite, which are returned.
    """
    if processes.world_size() == 1:
        return nonfinite
    processes.all_reduce_gradients(list(trainable_parameters(model).values()))
    since = [now - then for now, then in zip(state.counts(), counts_before, strict=True)]
    state.set_counts([then + more for then, more in zip(counts_before, processes.all_reduce_sum(since), strict=True)])
    return sorted(set(processes.all_gather({"wrong": torch.tensor(nonfinite, dtype=torch.int64)})["wrong"].tolist()))


def _two_pass_gradients(
    model: PeftModel,
    context: "TrainContext",
    state: TrainState,
    groups: Sequence[list[int] | None],
    backward: Backward,
    sums: MetricSums,
    should_stop: Callable[[], bool],
    stats: _StepStats,
) -> None:
    """Ask for all log-probabilities first, and for their gradients once it is known what the loss makes of them."""
    draws = list[dict[str, Tensor]]()

    def first_pass() -> Logps:
        parts = list[Logps]()
        # a process without pairs says so in the form that the others expect; none leaves before they have heard from it
        alone = processes.world_size() == 1
        for group in _until_stopped(groups or [None], should_stop if alone else lambda: False, len(groups)):
            draws.append(get_rng_states())
            with torch.no_grad():
                parts.append(
                    _dummy_forward(model, context, state, sums).empty()
                    if group is None
                    else _compute_logps(model, context, state, group, sums, stats)
                )
        return concat_logps(parts)

    mine = processes.run_or_raise_everywhere(first_pass)
    pairs, everything = len(mine.chosen_logp_P), rank_split.all_gather_logps(mine)
    start = processes.rank_offset(pairs)
    own = slice(start, start + pairs)
    names = ("chosen_logp_P", "rejected_logp_P", "chosen_logp_all_P")
    leaves = {name: getattr(everything, name).clone().requires_grad_() for name in names}
    # all have the same losses, so one of them counts
    counted = sums if processes.is_main() else copy.deepcopy(sums)
    losses, slope_P = _compute_losses(replace(everything, **leaves), context, state, counted)
    found = torch.autograd.grad(losses.total_P.sum() / len(losses.total_P), list(leaves.values()), allow_unused=True)
    for group, draw in zip(_until_stopped(groups, should_stop, 0), draws, strict=bool(groups)):
        set_rng_states(draw)  # the same dropout as when it was asked
        some = [context.train.pairs[i] for i in group or context.data_order.batch_indices(1)[:1]]
        scores = score_batch(
            model, collate(some, context.packing).to(context.device.torch_device), context.device, metrics=False
        )
        if group is None:
            backward(0 * scores.chosen_logp_P.sum())
            continue
        here = slice(start, start + len(group))
        backward(
            torch.stack(
                [
                    (getattr(scores, name) * slope[here]).sum()
                    for name, slope in zip(names, found, strict=True)
                    if slope is not None
                ]
            ).sum()
        )
        start += len(group)
    indices = [index for group in groups for index in group or ()]
    stats.add(indices, replace(losses, total_P=losses.total_P[own]), slope_P[own])


def _until_stopped(
    groups: Sequence[list[int] | None], should_stop: Callable[[], bool], remaining_passes: int
) -> Iterator[list[int] | None]:
    """The `groups`, after which `later` more passes follow. The last pass of a step is worth waiting for, no other, and
    where weights are sharded none can be left, since the others are in it too.
    """
    for number, group in enumerate(groups):
        if number and len(groups) - number + remaining_passes > 1 and should_stop() and not processes.is_sharded():
            raise StepAborted
        yield group


def _compute_logps(
    model: PeftModel,
    context: "TrainContext",
    state: TrainState,
    indices: Sequence[int],
    sums: MetricSums,
    stats: _StepStats,
) -> Logps:
    """What policy and reference say of some training pairs."""
    place, side = context.device.torch_device, context.train
    batch = collate([side.pairs[i] for i in indices], context.packing).to(place)
    known_P2 = side.reference_P2[list(indices)]
    columns = {name: value for name, value in vars(side.columns.select(list(indices))).items() if value is not None}
    moved = copy_batched(columns | {"reference": known_P2}, place)
    moved |= _missing_reference_logps(model, context, indices, known_P2, batch, stats)
    likely, metrics = uses_wpo_weighting(context.recipe.objective), is_logged(context, state.step + 1)
    scores = score_batch(model, batch, context.device, metrics=metrics, wpo_weights=likely)
    sums.add_scores(scores, batch.tokens)
    state.num_tokens += batch.tokens
    return scores.with_reference(moved.pop("reference"), LossColumns(**moved))


def _dummy_forward(model: PeftModel, context: "TrainContext", state: TrainState, sums: MetricSums) -> Logps:
    """What policy and reference say of one pair, by a process that has none or has done its own; uncounted."""
    return _compute_logps(
        model, context, copy.deepcopy(state), context.data_order.batch_indices(1)[:1], copy.deepcopy(sums), _StepStats()
    )


def _compute_losses(
    logps: Logps, context: "TrainContext", state: TrainState, sums: MetricSums
) -> tuple[Losses, Tensor]:
    """The losses of some pairs at this step's beta, and how much their log-probabilities move each (P,)."""
    table = context.recipe.objective
    beta = reward_beta(table)
    if isinstance(table, BetaDpo):
        ratio_P2 = torch.stack([logps.chosen_logp_P, logps.rejected_logp_P], 1).detach() - logps.reference_P2
        beta, state.margin_mean = dynamic_beta(ratio_P2[:, 0] - ratio_P2[:, 1], state.margin_mean, table, beta)
    losses = compute_losses(logps, table, beta)
    sums.add_losses(losses)
    return losses, loss_gradients(losses, logps)


def _missing_reference_logps(
    model: PeftModel,
    context: "TrainContext",
    indices: Sequence[int],
    known_P2: Tensor,
    batch: MicroBatch,
    stats: _StepStats,
) -> dict[str, Tensor]:
    """The reference's log-probabilities of the batch's pairs, (P, 2) on the device, where they are not known before the
    step: the reference moves, or this is the first step that needs them.
    """
    if context.reference_adapter.ema is not None:
        return {"reference": batch_reference_logps(model, batch, context.device, context.reference_adapter)}
    unknown = known_P2.isnan().any(1).nonzero()[:, 0].tolist()
    if not needs_reference(context.recipe.objective):
        return {}
    if not (processes.all_reduce_any(bool(unknown)) if processes.is_sharded() else unknown):
        return {}
    reference_P2 = batch_reference_logps(model, batch, context.device, context.reference_adapter)
    # all of them, as a rule: then nothing is picked out by numbers that would have to be copied to the device
    new_P2 = reference_P2 if len(unknown) == len(indices) else reference_P2[unknown]
    stats.new_reference.append(([indices[n] for n in unknown], new_P2))
    return {"reference": reference_P2}


def _cache_reference_logps(context: "TrainContext", stats: _StepStats) -> None:
    """Keep what was computed of the reference along with the step for later steps and later runs."""
    if not stats.new_reference:
        return
    indices = [index for some, _ in stats.new_reference for index in some]
    new_P2 = torch.cat([some_P2 for _, some_P2 in stats.new_reference]).cpu()
    context.train.reference_P2[indices] = new_P2
    context.reference_cache.add([context.train.pairs[i] for i in indices], new_P2)


def _update_state(context: "TrainContext", state: TrainState, stats: _StepStats) -> list[int]:
    """Note in `state` what the step's pairs have shown, and return those whose loss is not finite, as indices.

    Here the host waits for the device, once a step.
    """
    if not stats.indices:
        return []
    losses, moves = torch.stack([torch.cat(stats.loss_P).double(), torch.cat(stats.grad_P).double()]).tolist()
    if state.step == 0:
        state.first_slope += sum(moves) / len(context.data_order.batch_indices(1))
    else:
        state.since_eval.vanished += sum(slope < VANISHING_GRAD_RATIO * state.first_slope for slope in moves)
    state.since_eval.add(losses)
    return [index for index, loss in zip(stats.indices, losses, strict=True) if not math.isfinite(loss)]
