"""The gradient of one optimizer step: the mean loss over its pairs, however they are split into micro-batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_dpo.model.distributed import processes
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.model.transfer import copy_batched
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.logps import Scores, score_batch
from qlora_dpo.preference.metrics import MetricSums, make_metric_sums
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
from qlora_dpo.preference.pack import MicroBatch, Packing, collate, micro_batches
from qlora_dpo.preference.reference import batch_reference_logps
from qlora_dpo.recipe.objective import BetaDpo
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states
from qlora_dpo.training.checkpoint.state import StepTotals, TrainState
from qlora_dpo.training.context import StepAborted, TrainContext

SMALL_GRAD = 0.05
"""A pair with less than this share of the first step's gradient has little more to teach."""

Backward = Callable[[Tensor], Any]


@dataclass(frozen=True)
class StepResult:
    """What a step's pairs have shown beside their gradient. None of it counts until the loop commits it."""

    totals: StepTotals
    """Sums over this rank's pairs; after `all_reduce_step` over those of all ranks."""
    nonfinite: list[int]
    """Pairs whose loss is NaN or infinite, as indices into the training pairs."""
    metrics: MetricSums
    """Of this rank's pairs."""
    reference_indices: list[int]
    reference_P2: Tensor
    """Reference log-probabilities that were computed along with the step, (P, 2) on the CPU, of `reference_indices`."""


@dataclass(frozen=True)
class _Step:
    """The fixed inputs of one step. `number` counts from 1."""

    model: PeftModel
    context: TrainContext
    packing: Packing
    number: int
    margin_mean: float
    backward: Backward
    should_stop: Callable[[], bool]

    def batch(self, indices: Sequence[int]) -> MicroBatch:
        """The pairs of these indices as tensors on the device."""
        pairs = [self.context.train.pairs[i] for i in indices]
        return collate(pairs, self.packing).to(self.context.device.torch_device)


@dataclass
class _Accumulated:
    """What the micro-batches so far have shown, on the device; the host reads it once, after the last pass."""

    metrics: MetricSums
    margin_mean: float
    tokens: int = 0
    indices: list[int] = field(default_factory=list)
    loss_P: list[Tensor] = field(default_factory=list)
    grad_P: list[Tensor] = field(default_factory=list)
    reference_indices: list[int] = field(default_factory=list)
    reference_P2: list[Tensor] = field(default_factory=list)

    def add_forward(self, output: "_Forward", indices: Sequence[int]) -> None:
        """Count a forward pass over the pairs of `indices`."""
        self.metrics.add_scores(output.scores, output.tokens)
        self.tokens += output.tokens
        if output.new_reference_P2 is not None:
            self.reference_indices += [indices[n] for n in output.new_reference]
            self.reference_P2.append(output.new_reference_P2)

    def add_losses(self, indices: Sequence[int], losses: Losses | None, loss_P: Tensor, grad_P: Tensor) -> None:
        """Count the losses (P,) of some pairs and how strongly each depends on its log-probabilities.

        `losses` go into the metrics; None where another rank counts them.
        """
        if losses is not None:
            self.metrics.add_losses(losses)
        self.indices += indices
        self.loss_P.append(loss_P.detach())
        self.grad_P.append(grad_P)


@dataclass(frozen=True)
class _Forward:
    """What policy and reference say about a micro-batch."""

    logps: Logps
    scores: Scores
    tokens: int
    new_reference: list[int] = field(default_factory=list)
    """Places in the micro-batch of pairs whose reference log-probabilities were not known before this pass."""
    new_reference_P2: Tensor | None = None


def accumulate_gradients(
    model: PeftModel,
    context: TrainContext,
    state: TrainState,
    packing: Packing,
    backward: Backward,
    should_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Compute the gradient of the step after `state.step`, in rows as `packing` says, and return what it has shown.

    Nothing but the parameters' `grad` is changed, and the random generators, so a step is retried by dropping the
    result. Each rank computes its own pairs; `all_reduce_step` sums over the ranks. Raises StepAborted if
    `should_stop` becomes true while more than one micro-batch is left.
    """
    for parameter in trainable_parameters(model).values():
        parameter.grad = None
    batch = context.data_order.batch_indices(state.step + 1)
    pairs = [context.train.pairs[i] for i in batch]
    local = rank_split.rank_indices(pairs)
    local_groups = micro_batches([pairs[i] for i in local], packing)
    groups = rank_split.pad_group_count([[batch[local[i]] for i in group] for group in local_groups])
    processes.seed(context.recipe.train.seed, state.step)
    step = _Step(model, context, packing, state.step + 1, state.margin_mean, backward, should_stop)
    if needs_whole_step(context.recipe.objective) and (len(groups) > 1 or processes.world_size() > 1):
        return _result(_two_pass_gradients(step, groups), state)
    accumulated = _new_accumulated(step)
    for group in _until_stopped(groups, should_stop):
        if group is None:
            backward(0 * _dummy_forward(step).chosen_logp_P.sum())
            continue
        output = _forward(step, group)
        accumulated.add_forward(output, group)
        losses = compute_losses(output.logps, context.recipe.objective, _beta(step, output.logps, accumulated))
        accumulated.add_losses(group, losses, losses.total_P, loss_gradients(losses, output.logps))
        backward(losses.total_P.sum() / len(batch))
    return _result(accumulated, state)


def all_reduce_step(model: PeftModel, result: StepResult) -> StepResult:
    """Sum the gradient over all ranks, in place, and the totals of `result`; every rank learns of nonfinite losses."""
    if processes.world_size() == 1:
        return result
    processes.all_reduce_gradients(list(trainable_parameters(model).values()))
    nonfinite = processes.all_gather({"pairs": torch.tensor(result.nonfinite, dtype=torch.int64)})["pairs"]
    return replace(result, totals=result.totals.all_reduce(), nonfinite=sorted(set(nonfinite.tolist())))


def _two_pass_gradients(step: _Step, groups: Sequence[list[int] | None]) -> _Accumulated:
    """The gradient of a loss that compares the pairs of a step with each other (GradCache, Gao et al. 2021).

    A first pass without autograd gives all log-probabilities, from which the loss and its gradient with respect to
    each of them follow; a second pass takes that gradient on to the parameters.
    """
    accumulated = _new_accumulated(step)
    rng_states = list[dict[str, Tensor]]()

    def first_pass() -> Logps:
        parts = list[Logps]()
        # ranks exchange their log-probabilities after this pass, so with several of them none may stop within it
        should_stop = step.should_stop if processes.world_size() == 1 else lambda: False
        for group in _until_stopped(groups or [None], should_stop, passes_after=len(groups)):
            rng_states.append(get_rng_states())
            with torch.no_grad():
                if group is None:
                    parts.append(_dummy_forward(step).empty())
                    continue
                output = _forward(step, group)
            accumulated.add_forward(output, group)
            parts.append(output.logps)
        return concat_logps(parts)

    local = processes.run_or_raise_everywhere(first_pass)
    pairs, gathered = len(local.chosen_logp_P), rank_split.all_gather_logps(local)
    start = processes.rank_offset(pairs)
    names = ("chosen_logp_P", "rejected_logp_P", "chosen_logp_all_P")
    leaves = {name: getattr(gathered, name).clone().requires_grad_() for name in names}
    logps = replace(gathered, **leaves)
    losses = compute_losses(logps, step.context.recipe.objective, _beta(step, logps, accumulated))
    grad_P = loss_gradients(losses, logps)
    loss = losses.total_P.sum() / len(losses.total_P)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    first = start
    for group, rng in zip(_until_stopped(groups, step.should_stop), rng_states, strict=bool(groups)):
        set_rng_states(rng)  # the same dropout as in the first pass
        batch = step.batch(group or step.context.data_order.batch_indices(1)[:1])
        scores = score_batch(step.model, batch, step.context.device, metrics=False)
        if group is None:
            step.backward(0 * scores.chosen_logp_P.sum())
            continue
        rows = slice(first, first + len(group))
        terms = [
            (getattr(scores, name) * grad[rows]).sum()
            for name, grad in zip(names, grads, strict=True)
            if grad is not None
        ]
        step.backward(torch.stack(terms).sum())
        first += len(group)
    indices = [index for group in groups for index in group or ()]
    # every rank computes the same losses of all pairs, so rank 0 alone adds them to the metrics
    counted = losses if processes.is_main() else None
    accumulated.add_losses(indices, counted, losses.total_P[start : start + pairs], grad_P[start : start + pairs])
    return accumulated


def _until_stopped(
    groups: Sequence[list[int] | None], should_stop: Callable[[], bool], passes_after: int = 0
) -> Iterator[list[int] | None]:
    """The `groups`, after which `passes_after` more passes follow; raises StepAborted between two of them.

    The last pass of a step is always waited for, and with sharded weights all of them, since the other ranks are
    inside the same pass.
    """
    for number, group in enumerate(groups):
        passes_left = len(groups) - number + passes_after
        if number and passes_left > 1 and should_stop() and not processes.is_sharded():
            raise StepAborted
        yield group


def _forward(step: _Step, indices: Sequence[int]) -> _Forward:
    """Forward pass of policy and, where its log-probabilities are not known yet, of the reference."""
    context, data = step.context, step.context.train
    batch = step.batch(indices)
    known_P2 = data.reference_P2[list(indices)]
    columns = {name: value for name, value in vars(data.columns.select(list(indices))).items() if value is not None}
    moved = copy_batched(columns | {"reference": known_P2}, context.device.torch_device)
    reference_P2, new_reference = _live_reference(step, known_P2, batch)
    if reference_P2 is None:
        reference_P2 = moved["reference"]
    del moved["reference"]
    scores = score_batch(
        step.model,
        batch,
        context.device,
        metrics=context.is_logged(step.number),
        wpo_weights=uses_wpo_weighting(context.recipe.objective),
    )
    logps = scores.with_reference(reference_P2, LossColumns(**moved))
    # all of them, as a rule: then no index tensor has to be copied to the device
    new_P2 = reference_P2 if len(new_reference) == len(indices) else reference_P2[new_reference]
    return _Forward(logps, scores, batch.tokens, new_reference, new_P2 if new_reference else None)


def _dummy_forward(step: _Step) -> Logps:
    """Forward pass over the first pair of the run, by a rank that has no pairs or no more; nothing of it counts."""
    return _forward(step, step.context.data_order.batch_indices(1)[:1]).logps


def _live_reference(step: _Step, known_P2: Tensor, batch: MicroBatch) -> tuple[Tensor | None, list[int]]:
    """The reference's log-probabilities (P, 2) of the batch, on the device, and the places of those worth keeping.

    None where all are known beforehand. An EMA reference is computed in every step and never kept.
    """
    context = step.context
    if context.reference_adapter.ema is not None:
        return batch_reference_logps(step.model, batch, context.device, context.reference_adapter), []
    if not needs_reference(context.recipe.objective):
        return None, []
    unknown: list[int] = known_P2.isnan().any(1).nonzero()[:, 0].tolist()
    # with sharded weights a forward pass is collective, so either every rank computes the reference or none does
    if not (processes.all_reduce_any(bool(unknown)) if processes.is_sharded() else unknown):
        return None, []
    return batch_reference_logps(step.model, batch, context.device, context.reference_adapter), unknown


def _beta(step: _Step, logps: Logps, accumulated: _Accumulated) -> float | None:
    """beta-DPO's beta for these pairs, whose running mean of margins moves on; None where the recipe's own holds."""
    table = step.context.recipe.objective
    if not isinstance(table, BetaDpo):
        return None
    ratio_P2 = torch.stack([logps.chosen_logp_P, logps.rejected_logp_P], 1).detach() - logps.reference_P2
    margin_P = ratio_P2[:, 0] - ratio_P2[:, 1]
    beta, accumulated.margin_mean = dynamic_beta(margin_P, accumulated.margin_mean, table, table.beta)
    return beta


def _new_accumulated(step: _Step) -> _Accumulated:
    return _Accumulated(make_metric_sums(step.context.recipe.objective), step.margin_mean)


def _result(accumulated: _Accumulated, state: TrainState) -> StepResult:
    """Read what was accumulated on the device. Here the host waits for the device, once per step."""
    losses, grads = list[float](), list[float]()
    if accumulated.indices:
        read = [torch.cat(accumulated.loss_P).double(), torch.cat(accumulated.grad_P).double()]
        losses, grads = torch.stack(read).tolist()
    nonfinite = [index for index, loss in zip(accumulated.indices, losses, strict=True) if not math.isfinite(loss)]
    totals = StepTotals(
        tokens=accumulated.tokens,
        pairs=len(losses),
        loss=math.nan if nonfinite else math.fsum(losses),
        grad=sum(grads),
        small_grad_pairs=sum(grad < SMALL_GRAD * state.first_step_grad for grad in grads) if state.step else 0,
        margin_mean=accumulated.margin_mean,
    )
    reference_P2 = torch.cat(accumulated.reference_P2).cpu() if accumulated.reference_P2 else torch.empty(0, 2)
    return StepResult(totals, nonfinite, accumulated.metrics, accumulated.reference_indices, reference_P2)
