"""How long a run will take, by part: how many pairs go through the model how often, times the pace of this machine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora_dpo.data.encoded import EncodedPair, lengths
from qlora_dpo.planning.layer_timing import Pace
from qlora_dpo.preference.kl import PAIRS
from qlora_dpo.preference.objective import needs_reference, needs_whole_step
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import EmaReference, ModelReference
from qlora_dpo.training.data_order import make_plan


@dataclass(frozen=True)
class Passes:
    """How many pairs go through the model in a whole run; a pair counts as often as it does."""

    steps: int
    evaluations: int
    trained: int
    """Forward and backward."""
    before: int
    """Training pairs that are asked once more, since their loss depends on the other pairs of their step."""
    reference_train: int
    """Training pairs that the reference is asked about; all are counted, also those whose answers are in the cache."""
    reference_heldout: int
    evaluated: int
    """Held-out pairs, in all evaluations; those of which `kl` is measured twice more."""
    other: bool = False
    """True if the reference is another model, whose pace is not known."""


@dataclass(frozen=True)
class Amount:
    """What one pair is to the model, on average, as it is laid out."""

    tokens: float
    states: float
    """Those that predict an answer token, and so reach the head."""


@dataclass(frozen=True)
class Layers:
    """What a pass does in the layers."""

    count: int
    recomputed: int = 0
    """Layers that compute their forward pass again in the backward pass: the first ones."""
    below: int = 0
    """Layers below the first one with an adapter, through which no gradient goes."""


@dataclass(frozen=True)
class Timetable:
    """Seconds by part of a run, without reading data and weights and without answers to prompts."""

    passes: Passes
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of the reference (if one is asked), the steps and the evaluations; empty if they are not known."""
    probe: float = 0.0
    """What finding out the pace took."""
    why_not: str = ""

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())


def passes(recipe: Recipe, pairs: int, heldout: int, *, several_rows: bool) -> Passes:
    """What a run over so many training and held-out pairs does; `several_rows` if a step goes through in several."""
    plan, table = make_plan(pairs, recipe.train), recipe.train
    epochs, rest = divmod(plan.total_steps, plan.steps_per_epoch)
    trained = epochs * pairs + rest * table.batch_size
    # one at step 0, then every so many steps and after the last one
    evaluations = 1 + math.ceil(plan.total_steps / (table.eval_steps or plan.steps_per_epoch))
    asks, moves = needs_reference(recipe.objective), isinstance(recipe.reference, EmaReference)
    return Passes(
        steps=plan.total_steps,
        evaluations=evaluations,
        trained=trained,
        before=trained if several_rows and needs_whole_step(recipe.objective) else 0,
        reference_train=(trained if moves else min(trained, pairs)) if asks else 0,
        reference_heldout=(heldout * evaluations if moves else heldout) if asks else 0,
        evaluated=evaluations * (heldout + 2 * min(heldout, PAIRS)),
        other=asks and isinstance(recipe.reference, ModelReference),
    )


def amount(pairs: Sequence[EncodedPair], some: Sequence[EncodedPair], packing: Packing) -> Amount:
    """The mean over `pairs`, each as much less than its prompt and answers as `some` of them are when laid out."""
    batches = [collate([some[index] for index in group], packing) for group in micro_batches(some, packing)]
    all_P3, some_P3 = lengths(pairs), lengths(some)
    tokens = sum(each.input_ids_BL.numel() for each in batches) / int(some_P3.sum())
    states = sum(len(each.state_R) for each in batches) / int(some_P3[:, 1:].sum())
    return Amount(tokens * float(all_P3.sum(axis=1).mean()), states * float(all_P3[:, 1:].sum(axis=1).mean()))


def seconds(done: Passes, pace: Pace, layers: Layers, train: Amount, heldout: Amount) -> dict[str, float]:
    """Seconds by part; without the reference where none is asked, or one whose pace is not known."""

    def forward(each: Amount) -> float:
        return layers.count * pace.layer_forward * each.tokens + pace.head_forward * each.states

    trained = layers.count - layers.below
    again = max(0, layers.recomputed - layers.below)
    in_layers = trained * pace.layer_step + (layers.below + again) * pace.layer_forward
    step = in_layers * train.tokens + pace.head_step * train.states
    reference = done.reference_train * forward(train) + done.reference_heldout * forward(heldout)
    return {
        **({"reference": reference} if reference and not done.other else {}),
        "steps": done.trained * step + done.before * forward(train),
        "evaluations": done.evaluated * forward(heldout),
    }
