"""How long a run will take, by part: how many pairs go through the model how often, times the pace of this machine."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora_dpo.data.encoded import EncodedPair, pair_lengths
from qlora_dpo.planning.layer_timing import LayerTiming
from qlora_dpo.preference.kl import KL_PAIRS
from qlora_dpo.preference.objective import needs_reference, needs_whole_step
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.reference import EmaReference, ModelReference
from qlora_dpo.training.data_order import make_data_order


@dataclass(frozen=True)
class PassCounts:
    """How many pairs go through the model in a whole run; a pair counts as often as it does."""

    steps: int
    evaluations: int
    trained_pairs: int
    """Forward and backward."""
    extra_forward_pairs: int
    """Training pairs that are asked once more, since their loss depends on the other pairs of their step."""
    reference_train_pairs: int
    """Training pairs that the reference is asked about; all are counted, also those whose answers are in the cache."""
    reference_heldout_pairs: int
    evaluated_pairs: int
    """Held-out pairs, in all evaluations; those of which `kl` is measured twice more."""
    uses_reference_model: bool = False
    """True if the reference is another model, whose pace is not known."""


@dataclass(frozen=True)
class TokensPerPair:
    """What one pair is to the model, on average, as it is laid out."""

    tokens: float
    states: float
    """Those that predict an answer token, and so reach the head."""


@dataclass(frozen=True)
class LayerCounts:
    """What a pass does in the layers."""

    total: int
    recomputed: int = 0
    """Layers that compute their forward pass again in the backward pass: the first ones."""
    below_adapter: int = 0
    """Layers below the first one with an adapter, through which no gradient goes."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds by part of a run, without reading data and weights and without answers to prompts."""

    pass_counts: PassCounts
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)
    """Of the reference (if one is asked), the steps and the evaluations; empty if they are not known."""
    probe_seconds: float = 0.0
    """What finding out the pace took."""
    unknown_reason: str = ""

    @property
    def total_seconds(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds_by_part.values())


def count_passes(recipe: Recipe, pairs: int, heldout: int, *, multiple_rows: bool) -> PassCounts:
    """What a run over so many training and held-out pairs does; `several_rows` if a step goes through in several."""
    plan, table = make_data_order(pairs, recipe.train), recipe.train
    epochs, rest = divmod(plan.total_steps, plan.steps_per_epoch)
    trained = epochs * pairs + rest * table.batch_size
    # one at step 0, then every so many steps and after the last one
    evaluations = 1 + math.ceil(plan.total_steps / (table.eval_steps or plan.steps_per_epoch))
    asks, moves = needs_reference(recipe.objective), isinstance(recipe.reference, EmaReference)
    return PassCounts(
        steps=plan.total_steps,
        evaluations=evaluations,
        trained_pairs=trained,
        extra_forward_pairs=trained if multiple_rows and needs_whole_step(recipe.objective) else 0,
        reference_train_pairs=(trained if moves else min(trained, pairs)) if asks else 0,
        reference_heldout_pairs=(heldout * evaluations if moves else heldout) if asks else 0,
        evaluated_pairs=evaluations * (heldout + 2 * min(heldout, KL_PAIRS)),
        uses_reference_model=asks and isinstance(recipe.reference, ModelReference),
    )


def mean_tokens_per_pair(
    pairs: Sequence[EncodedPair], sample: Sequence[EncodedPair], packing: Packing
) -> TokensPerPair:
    """The mean over `pairs`, each as much less than its prompt and answers as `sample` of them are when laid out."""
    batches = [collate([sample[index] for index in group], packing) for group in micro_batches(sample, packing)]
    all_P3, some_P3 = pair_lengths(pairs), pair_lengths(sample)
    tokens = sum(each.input_ids_BL.numel() for each in batches) / int(some_P3.sum())
    states = sum(len(each.state_R) for each in batches) / int(some_P3[:, 1:].sum())
    return TokensPerPair(tokens * float(all_P3.sum(axis=1).mean()), states * float(all_P3[:, 1:].sum(axis=1).mean()))


def estimate_seconds(
    pass_counts: PassCounts, timing: LayerTiming, layers: LayerCounts, train: TokensPerPair, heldout: TokensPerPair
) -> dict[str, float]:
    """Seconds by part; without the reference where none is asked, or one whose pace is not known."""

    def forward(each: TokensPerPair) -> float:
        return layers.total * timing.layer_forward * each.tokens + timing.head_forward * each.states

    trained = layers.total - layers.below_adapter
    again = max(0, layers.recomputed - layers.below_adapter)
    in_layers = trained * timing.layer_step + (layers.below_adapter + again) * timing.layer_forward
    step = in_layers * train.tokens + timing.head_step * train.states
    reference = pass_counts.reference_train_pairs * forward(train) + pass_counts.reference_heldout_pairs * forward(
        heldout
    )
    return {
        **({"reference": reference} if reference and not pass_counts.uses_reference_model else {}),
        "steps": pass_counts.trained_pairs * step + pass_counts.extra_forward_pairs * forward(train),
        "evaluations": pass_counts.evaluated_pairs * forward(heldout),
    }
