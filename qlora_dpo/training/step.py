"""The gradient of one optimizer step: the mean loss over its pairs, however they are split into micro-batches."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from qlora_dpo.model import processes
from qlora_dpo.model.lora import trainable
from qlora_dpo.preference import shares
from qlora_dpo.preference.logps import score
from qlora_dpo.preference.metrics import Sums
from qlora_dpo.preference.objective import (
    Logps,
    Losses,
    beta_at,
    dynamic_beta,
    needs_reference,
    needs_whole_step,
    objective,
    slopes,
    together,
    weighs_pairs,
)
from qlora_dpo.preference.pack import MicroBatch, collate, micro_batches
from qlora_dpo.preference.reference import ride_along
from qlora_dpo.recipe_objective import BetaDpo
from qlora_dpo.training.checkpoint import State
from qlora_dpo.training.random_states import random_states, restore

if TYPE_CHECKING:
    from qlora_dpo.training.loop import Job

VANISHING = 0.05
"""A pair with less than this share of the first step's gradient has little more to teach."""

Backward = Callable[[Tensor], Any]


class Left(Exception):
    """A step was left between two of its micro-batches, since the run shall stop; nothing of it counts."""


def gradient(
    model: PeftModel,
    job: "Job",
    state: State,
    backward: Backward,
    sums: Sums,
    leave: Callable[[], bool] = lambda: False,
) -> list[int]:
    """Add up the gradient of the step after `state.step`; return the pairs whose loss is not finite, as indices.

    Raises Left where `leave` says so and more than one micro-batch is still to come. Of several processes each does its
    own pairs.
    """
    indices = job.plan.indices(state.step + 1)
    pairs = [job.train.pairs[i] for i in indices]
    own = shares.own(pairs)
    batches = micro_batches([pairs[i] for i in own], job.packing)
    groups = shares.in_step([[indices[own[i]] for i in group] for group in batches])
    processes.seed(job.recipe.train.seed, state.step)
    if needs_whole_step(job.recipe.objective) and (len(groups) > 1 or processes.count() > 1):
        return _of_pairs_that_depend_on_each_other(model, job, state, groups, backward, sums, leave)
    wrong = list[int]()
    for group in _until_left(groups, leave, 0):
        if group is None:
            backward(0 * _uncounted(model, job, state, sums).chosen_logp_P.sum())
            continue
        logps = _logps(model, job, state, group, sums)
        losses = _losses(logps, job, state, sums)
        backward(losses.total_P.sum() / len(indices))
        wrong += _not_finite(losses.total_P, group)
    return wrong


def joined(model: PeftModel, state: State, before: Sequence[float], wrong: list[int]) -> list[int]:
    """Make the step whole in every process: the gradient, what `state` has counted since `before`, and the pairs whose
    loss is not finite, which are returned.
    """
    if processes.count() == 1:
        return wrong
    processes.add_up_gradients(list(trainable(model).values()))
    since = [now - then for now, then in zip(state.counts(), before, strict=True)]
    state.set_counts([then + more for then, more in zip(before, processes.total(since), strict=True)])
    return sorted(set(processes.of_all({"wrong": torch.tensor(wrong, dtype=torch.int64)})["wrong"].tolist()))


def _of_pairs_that_depend_on_each_other(
    model: PeftModel,
    job: "Job",
    state: State,
    groups: Sequence[list[int] | None],
    backward: Backward,
    sums: Sums,
    leave: Callable[[], bool],
) -> list[int]:
    """Ask for all log-probabilities first, and for their gradients once it is known what the loss makes of them."""
    draws = list[dict[str, Tensor]]()

    def ask() -> Logps:
        parts = list[Logps]()
        # a process without pairs says so in the form that the others expect; none leaves before they have heard from it
        alone = processes.count() == 1
        for group in _until_left(groups or [None], leave if alone else lambda: False, len(groups)):
            draws.append(random_states())
            with torch.no_grad():
                parts.append(
                    _uncounted(model, job, state, sums).none()
                    if group is None
                    else _logps(model, job, state, group, sums)
                )
        return together(parts)

    mine = processes.all_or_none(ask)
    pairs, everything = len(mine.chosen_logp_P), shares.of_all(mine)
    start = processes.rows_before(pairs)
    own = slice(start, start + pairs)
    names = ("chosen_logp_P", "rejected_logp_P", "chosen_whole_P")
    leaves = {name: getattr(everything, name).clone().requires_grad_() for name in names}
    # all have the same losses, so one of them counts
    counts = (state, sums) if processes.is_main() else (copy.deepcopy(state), copy.deepcopy(sums))
    losses = _losses(replace(everything, **leaves), job, *counts)
    state.margin_mean = counts[0].margin_mean
    found = torch.autograd.grad(losses.total_P.sum() / len(losses.total_P), list(leaves.values()), allow_unused=True)
    for group, draw in zip(_until_left(groups, leave, 0), draws, strict=bool(groups)):
        restore(draw)  # the same dropout as when it was asked
        some = [job.train.pairs[i] for i in group or job.plan.indices(1)[:1]]
        scores = score(model, collate(some, job.packing).to(job.device.torch_device), job.device, metrics=False)
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
    return _not_finite(losses.total_P[own], [index for group in groups for index in group or ()])


def _until_left(
    groups: Sequence[list[int] | None], leave: Callable[[], bool], later: int
) -> Iterator[list[int] | None]:
    """The `groups`, after which `later` more passes follow. The last pass of a step is worth waiting for, no other, and
    where weights are sharded none can be left, since the others are in it too.
    """
    for number, group in enumerate(groups):
        if number and len(groups) - number + later > 1 and leave() and not processes.sharded():
            raise Left
        yield group


def _logps(model: PeftModel, job: "Job", state: State, indices: Sequence[int], sums: Sums) -> Logps:
    """What policy and reference say of some training pairs."""
    place, side = job.device.torch_device, job.train
    batch = collate([side.pairs[i] for i in indices], job.packing).to(place)
    reference_P2 = _reference(model, job, indices, batch).to(place)
    scores = score(model, batch, job.device, likely=weighs_pairs(job.recipe.objective))
    sums.add_scores(scores, batch.tokens)
    state.num_tokens += batch.tokens
    return scores.beside(reference_P2, side.columns.of(list(indices)).to(place))


def _uncounted(model: PeftModel, job: "Job", state: State, sums: Sums) -> Logps:
    """What policy and reference say of one pair, by a process that has none or has done its own; uncounted."""
    return _logps(model, job, copy.deepcopy(state), job.plan.indices(1)[:1], copy.deepcopy(sums))


def _losses(logps: Logps, job: "Job", state: State, sums: Sums) -> Losses:
    """The losses of some pairs at this step's beta."""
    table = job.recipe.objective
    beta = beta_at(table, state.step + 1, job.plan.total_steps)
    if isinstance(table, BetaDpo):
        ratio_P2 = torch.stack([logps.chosen_logp_P, logps.rejected_logp_P], 1).detach() - logps.reference_P2
        beta, state.margin_mean = dynamic_beta(ratio_P2[:, 0] - ratio_P2[:, 1], state.margin_mean, table, beta)
    losses = objective(logps, table, beta)
    sums.add_losses(losses)
    slope_P = slopes(losses, logps)
    if state.step == 0:
        state.first_slope += float(slope_P.mean()) * len(slope_P) / len(job.plan.indices(1))
    else:
        state.since_eval.vanished += int((slope_P < VANISHING * state.first_slope).sum())
    state.since_eval.add(losses.total_P)
    return losses


def _reference(model: PeftModel, job: "Job", indices: Sequence[int], batch: MicroBatch) -> Tensor:
    """What the reference says of the batch's pairs, (P, 2): as asked before the run, or asked now, and kept unless it
    moves.
    """
    if job.held.follows is not None:
        return ride_along(model, batch, job.device, job.held)
    known_P2 = job.train.reference_P2[list(indices)]
    unknown = [i for i, nan in zip(indices, known_P2.isnan().any(1).tolist(), strict=True) if nan]
    if not needs_reference(job.recipe.objective):
        return known_P2
    if not (processes.any_of(bool(unknown)) if processes.sharded() else unknown):
        return known_P2
    asked_P2 = ride_along(model, batch, job.device, job.held)
    new_P2 = asked_P2[[n for n, i in enumerate(indices) if i in unknown]].cpu()
    job.train.reference_P2[unknown] = new_P2
    job.store.add([job.train.pairs[i] for i in unknown], new_P2)
    return asked_P2


def _not_finite(total_P: Tensor, indices: Sequence[int]) -> list[int]:
    finite = total_P.detach().isfinite().tolist()
    return [index for index, each in zip(indices, finite, strict=True) if not each]
