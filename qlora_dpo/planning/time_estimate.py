"""Estimates how long a run takes, by part: how many pairs pass through the model, times this machine's speed."""

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
    """How many pairs pass through the model over a whole run; a pair counts once for every pass."""

    steps: int
    evaluations: int
    trained_pairs: int
    """Forward and backward passes."""
    extra_forward_pairs: int
    """Additional forward passes of training pairs whose loss depends on the other pairs of their step."""
    reference_train_pairs: int
    """Training pairs scored by the reference, including those whose log-probabilities may be cached."""
    reference_heldout_pairs: int
    evaluated_pairs: int
    """Held-out pairs over all evaluations; those on which `kl` is measured count twice more."""
    uses_reference_model: bool = False
    """True if the reference is another model, whose speed is unknown."""


@dataclass(frozen=True)
class TokensPerPair:
    """Mean size of a pair in a forward pass."""

    tokens: float
    states: float
    """Hidden states that predict an answer token, and so go through the head."""


@dataclass(frozen=True)
class LayerCounts:
    """How many layers a pass computes, and how."""

    total: int
    recomputed: int = 0
    """Layers whose forward pass is recomputed in the backward pass: the first ones."""
    below_adapter: int = 0
    """Layers below the first adapted one, through which no gradient flows."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a run by part, without reading data, loading weights and generating samples."""

    pass_counts: PassCounts
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)
    """Reference (if there is one), steps and evaluations; empty if unknown."""
    probe_seconds: float = 0.0
    """Seconds that measuring this machine's speed took."""
    other_load: float = 0.0
    """CPU cores that other processes kept busy meanwhile."""
    unknown_reason: str = ""

    @property
    def total_seconds(self) -> float:
        """Sum of all parts."""
        return sum(self.seconds_by_part.values())


def count_passes(recipe: Recipe, pairs: int, heldout: int, *, multiple_rows: bool) -> PassCounts:
    """Count the passes of a run over `pairs` training and `heldout` held-out pairs.

    `multiple_rows` is true if a step takes several forward passes.
    """
    order, table = make_data_order(pairs, recipe.train), recipe.train
    epochs, remaining_steps = divmod(order.total_steps, order.steps_per_epoch)
    trained = epochs * pairs + remaining_steps * table.batch_size
    # one at step 0, then one every `eval_steps` and one after the last step
    evaluations = 1 + math.ceil(order.total_steps / (table.eval_steps or order.steps_per_epoch))
    has_reference, is_ema = needs_reference(recipe.objective), isinstance(recipe.reference, EmaReference)
    return PassCounts(
        steps=order.total_steps,
        evaluations=evaluations,
        trained_pairs=trained,
        extra_forward_pairs=trained if multiple_rows and needs_whole_step(recipe.objective) else 0,
        reference_train_pairs=(trained if is_ema else min(trained, pairs)) if has_reference else 0,
        reference_heldout_pairs=(heldout * evaluations if is_ema else heldout) if has_reference else 0,
        evaluated_pairs=evaluations * (heldout + 2 * min(heldout, KL_PAIRS)),
        uses_reference_model=has_reference and isinstance(recipe.reference, ModelReference),
    )


def mean_tokens_per_pair(
    pairs: Sequence[EncodedPair], sample: Sequence[EncodedPair], packing: Packing
) -> TokensPerPair:
    """Mean tokens and states of `pairs` in a forward pass.

    `sample` is laid out to see how many tokens packing shares or padding adds; the others are scaled by the same ratio.
    """
    batches = [collate([sample[index] for index in group], packing) for group in micro_batches(sample, packing)]
    lengths_P3, sample_lengths_P3 = pair_lengths(pairs), pair_lengths(sample)
    token_ratio = sum(batch.input_ids_BL.numel() for batch in batches) / int(sample_lengths_P3.sum())
    state_ratio = sum(len(batch.state_R) for batch in batches) / int(sample_lengths_P3[:, 1:].sum())
    return TokensPerPair(
        token_ratio * float(lengths_P3.sum(axis=1).mean()), state_ratio * float(lengths_P3[:, 1:].sum(axis=1).mean())
    )


def estimate_seconds(
    pass_counts: PassCounts, timing: LayerTiming, layers: LayerCounts, train: TokensPerPair, heldout: TokensPerPair
) -> dict[str, float]:
    """Seconds by part; without "reference" if there is none, or if it is another model, whose speed is unknown."""

    def forward(size: TokensPerPair) -> float:
        return layers.total * timing.layer_forward * size.tokens + timing.head_forward * size.states

    trained_layers = layers.total - layers.below_adapter
    recomputed_layers = max(0, layers.recomputed - layers.below_adapter)
    per_token = trained_layers * timing.layer_step + (layers.below_adapter + recomputed_layers) * timing.layer_forward
    step = per_token * train.tokens + timing.head_step * train.states
    reference = pass_counts.reference_train_pairs * forward(train)
    reference += pass_counts.reference_heldout_pairs * forward(heldout)
    return {
        **({"reference": reference} if reference and not pass_counts.uses_reference_model else {}),
        "steps": pass_counts.trained_pairs * step + pass_counts.extra_forward_pairs * forward(train),
        "evaluations": pass_counts.evaluated_pairs * forward(heldout),
    }
