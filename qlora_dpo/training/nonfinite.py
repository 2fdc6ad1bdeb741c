"""Checks that a step's losses and gradient are finite, and names the first value that is not."""

import math
from collections.abc import Mapping, Sequence

import torch

from qlora_dpo.errors import RunError
from qlora_dpo.model.lora import nonfinite_names

MAX_SKIPPED_STEPS = 5
"""Steps in a row whose scaled gradients may overflow. The scale halves each time, so more have another cause."""

MIN_LOSS_SCALE = 1.0
"""The smallest loss scale that is tried before the first step."""


def check_finite(
    step: int,
    norm: float,
    parameters: Mapping[str, torch.nn.Parameter],
    nonfinite_rows: Sequence[int],
    rows: Sequence[int],
    *,
    scaled: bool,
    fp16: bool = False,
) -> None:
    """Raise RunError if a loss or the gradient is not finite; a `scaled` gradient may be, since its step is skipped.

    `nonfinite_rows` are the data rows of pairs whose loss is not finite, `rows` those of all pairs of the step. With
    `fp16` the model computes in fp16, where a long pair may overflow although short ones do not.
    """
    overflows = not math.isfinite(norm)
    # a loss that is not finite beside a finite gradient is no overflow that a smaller scale would cure
    if (overflows and not scaled) or (nonfinite_rows and not overflows):
        raise RunError(nonfinite_message(step, parameters, nonfinite_rows, rows, fp16=fp16))


def check_skipped_steps(
    step: int,
    skipped_in_a_row: int,
    parameters: Mapping[str, torch.nn.Parameter],
    nonfinite_rows: Sequence[int],
    rows: Sequence[int],
) -> None:
    """Raise RunError if too many steps were skipped one after another."""
    if skipped_in_a_row >= MAX_SKIPPED_STEPS:
        why = nonfinite_message(step, parameters, nonfinite_rows, rows)
        raise RunError(f"{why}; {skipped_in_a_row} steps in a row were skipped")


def halve_loss_scale(step: int, scale: float) -> float:
    """Half of a loss scale at which the gradient overflows.

    Raises RunError below 1, where it is no longer the scaling that makes the gradient overflow.
    """
    if scale < 2 * MIN_LOSS_SCALE:
        raise RunError(
            f"step {step}: the gradient overflows fp16 at every loss scale down to {scale:,.0f}, so nothing was "
            'changed; set model.dtype = "fp32", or take a card with bf16 (compute capability 8.0 or newer)'
        )
    return scale / 2


def nonfinite_message(
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    nonfinite_rows: Sequence[int],
    rows: Sequence[int],
    *,
    fp16: bool = False,
) -> str:
    """Names the first nonfinite value (weights, then losses, then gradients) and the step's pairs, with advice."""
    grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    weights = [f"the weight {name}" for name in nonfinite_names(parameters)]
    losses = [f"the loss of row {row}" for row in nonfinite_rows]
    gradients = [f"the gradient of {name}" for name in nonfinite_names(grads)]
    first = [*weights, *losses, *gradients, "the norm of the gradient"][0]
    advice = "look at them, or lower train.learning_rate"
    if fp16 and losses and not weights:
        advice = (
            'they may overflow fp16, which ends at 65,504: set model.dtype = "fp32", or take a card with bf16 (compute '
            "capability 8.0 or newer)"
        )
    return (
        f"step {step}: {first} is not finite, so nothing was changed; the step's pairs are rows "
        f"{', '.join(map(str, rows))} of data.train; {advice}"
    )
