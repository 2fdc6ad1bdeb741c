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
from qlora_dpo.model.lora import trainable
from qlora_dpo.model.transfer import copied_together
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.logps import score
from qlora_dpo.preference.metrics import Sums
from qlora_dpo.preference.objective import (
    Columns,
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
from qlora_dpo.recipe.objective import BetaDpo
from qlora_dpo.training.checkpoint.rng_state import random_states, restore
from qlora_dpo.training.checkpoint.save import State

if TYPE_CHECKING:
    from qlora_dpo.training.loop import Job

VANISHING = 0.05
"""A pair with less than this share of the first step's gradient has little more to teach."""

Backward = Callable[[Tensor], Any]


@dataclass
class _Seen:
    """What the pairs of a step have shown so far, on the device: it is read once, when the step's last pass is done."""

    indices: list[int] = field(default_factory=list)
    total_P: list[Tensor] = field(default_factory=list)
    slope_P: list[Tensor] = field(default_factory=list)
    reference: list[tuple[list[int], Tensor]] = field(default_factory=list)
    """Pairs whose reference log-probabilities were computed along with the step, and those, (P, 2)."""

    def add(self, indices: Sequence[int], losses: Losses, slope_P: Tensor) -> None:
        """Note the losses of some pairs and how much their log-probabilities move them."""
        self.indices += indices
        self.total_P.append(losses.total_P.detach())
        self.slope_P.append(slope_P)


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
    own = rank_split.own(pairs)
    batches = micro_batches([pairs[i] for i in own], job.packing)
    groups = rank_split.in_step([[indices[own[i]] for i in group] for group in batches])
    processes.seed(job.recipe.train.seed, state.step)
    seen = _Seen()
    if needs_whole_step(job.recipe.objective) and (len(groups) > 1 or processes.count() > 1):
        _of_pairs_that_depend_on_each_other(model, job, state, groups, backward, sums, leave, seen)
    else:
        for group in _until_left(groups, leave, 0):
            if group is None:
                backward(0 * _uncounted(model, job, state, sums).chosen_logp_P.sum())
                continue
            losses, slope_P = _losses(_logps(model, job, state, group, sums, seen), job, state, sums)
            backward(losses.total_P.sum() / len(indices))
            seen.add(group, losses, slope_P)
    _keep_references(job, seen)
    return _count(job, state, seen)


def is_logged(job: "Job", step: int) -> bool:
    """True if the metrics of `step` are logged, whatever happens in it."""
    return step in (1, job.plan.total_steps) or step % job.recipe.train.logging_steps == 0


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
    seen: _Seen,
) -> None:
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
                    else _logps(model, job, state, group, sums, seen)
                )
        return together(parts)

    mine = processes.all_or_none(ask)
    pairs, everything = len(mine.chosen_logp_P), rank_split.of_all(mine)
    start = processes.rows_before(pairs)
    own = slice(start, start + pairs)
    names = ("chosen_logp_P", "rejected_logp_P", "chosen_whole_P")
    leaves = {name: getattr(everything, name).clone().requires_grad_() for name in names}
    # all have the same losses, so one of them counts
    counted = sums if processes.is_main() else copy.deepcopy(sums)
    losses, slope_P = _losses(replace(everything, **leaves), job, state, counted)
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
    indices = [index for group in groups for index in group or ()]
    seen.add(indices, replace(losses, total_P=losses.total_P[own]), slope_P[own])


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


def _logps(model: PeftModel, job: "Job", state: State, indices: Sequence[int], sums: Sums, seen: _Seen) -> Logps:
    """What policy and reference say of some training pairs."""
    place, side = job.device.torch_device, job.train
    batch = collate([side.pairs[i] for i in indices], job.packing).to(place)
    known_P2 = side.reference_P2[list(indices)]
    columns = {name: value for name, value in vars(side.columns.of(list(indices))).items() if value is not None}
    moved = copied_together(columns | {"reference": known_P2}, place)
    moved |= _computed_now(model, job, indices, known_P2, batch, seen)
    likely, metrics = weighs_pairs(job.recipe.objective), is_logged(job, state.step + 1)
    scores = score(model, batch, job.device, metrics=metrics, likely=likely)
    sums.add_scores(scores, batch.tokens)
    state.num_tokens += batch.tokens
    return scores.beside(moved.pop("reference"), Columns(**moved))


def _uncounted(model: PeftModel, job: "Job", state: State, sums: Sums) -> Logps:
    """What policy and reference say of one pair, by a process that has none or has done its own; uncounted."""
    return _logps(model, job, copy.deepcopy(state), job.plan.indices(1)[:1], copy.deepcopy(sums), _Seen())


def _losses(logps: Logps, job: "Job", state: State, sums: Sums) -> tuple[Losses, Tensor]:
    """The losses of some pairs at this step's beta, and how much their log-probabilities move each (P,)."""
    table = job.recipe.objective
    beta = beta_at(table, state.step + 1, job.plan.total_steps)
    if isinstance(table, BetaDpo):
        ratio_P2 = torch.stack([logps.chosen_logp_P, logps.rejected_logp_P], 1).detach() - logps.reference_P2
        beta, state.margin_mean = dynamic_beta(ratio_P2[:, 0] - ratio_P2[:, 1], state.margin_mean, table, beta)
    losses = objective(logps, table, beta)
    sums.add_losses(losses)
    return losses, slopes(losses, logps)


def _computed_now(
    model: PeftModel, job: "Job", indices: Sequence[int], known_P2: Tensor, batch: MicroBatch, seen: _Seen
) -> dict[str, Tensor]:
    """The reference's log-probabilities of the batch's pairs, (P, 2) on the device, where they are not known before the
    step: the reference moves, or this is the first step that needs them.
    """
    if job.held.follows is not None:
        return {"reference": ride_along(model, batch, job.device, job.held)}
    unknown = known_P2.isnan().any(1).nonzero()[:, 0].tolist()
    if not needs_reference(job.recipe.objective):
        return {}
    if not (processes.any_of(bool(unknown)) if processes.sharded() else unknown):
        return {}
    reference_P2 = ride_along(model, batch, job.device, job.held)
    # all of them, as a rule: then nothing is picked out by numbers that would have to be copied to the device
    new_P2 = reference_P2 if len(unknown) == len(indices) else reference_P2[unknown]
    seen.reference.append(([indices[n] for n in unknown], new_P2))
    return {"reference": reference_P2}


def _keep_references(job: "Job", seen: _Seen) -> None:
    """Keep what was computed of the reference along with the step for later steps and later runs."""
    if not seen.reference:
        return
    indices = [index for some, _ in seen.reference for index in some]
    new_P2 = torch.cat([some_P2 for _, some_P2 in seen.reference]).cpu()
    job.train.reference_P2[indices] = new_P2
    job.store.add([job.train.pairs[i] for i in indices], new_P2)


def _count(job: "Job", state: State, seen: _Seen) -> list[int]:
    """Note in `state` what the step's pairs have shown, and return those whose loss is not finite, as indices.

    Here the host waits for the device, once a step.
    """
    if not seen.indices:
        return []
    losses, moves = torch.stack([torch.cat(seen.total_P).double(), torch.cat(seen.slope_P).double()]).tolist()
    if state.step == 0:
        state.first_slope += sum(moves) / len(job.plan.indices(1))
    else:
        state.since_eval.vanished += sum(slope < VANISHING * state.first_slope for slope in moves)
    state.since_eval.add(losses)
    return [index for index, loss in zip(seen.indices, losses, strict=True) if not math.isfinite(loss)]
