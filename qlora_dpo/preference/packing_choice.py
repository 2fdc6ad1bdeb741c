"""Chooses packed rows or padded batches for a model, and checks packed rows on a few pairs.

P pairs, B x L tokens as they go through the model, T those of them that are compared, D width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair, sequence_lengths
from qlora_dpo.errors import ModelError, is_out_of_memory
from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.model.device import Device
from qlora_dpo.model.packed import attention
from qlora_dpo.model.packed.support import enable_packed_rows, packing_unsupported_reason
from qlora_dpo.preference.logps import hidden_states
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.preference.reference import model_logps

PROBE_PAIRS = 8
"""Pairs on which packed rows are compared with padded batches."""


def choose_packing(model: Any, pairs: Sequence[EncodedPair], padded: Packing, device: Device) -> tuple[Packing, str]:
    """The packing for `pairs` and the reason: packed rows if they give the same log-probabilities as `padded` batches.

    `padded` has no backend and carries the token budget and weighting, which the result keeps. The shortest pairs are
    tried with each backend, the device's own first, in rows within the budget, and with them one pair that is longer
    than the model's sliding window. Raises ModelError if their
    log-probabilities are not finite.
    """
    probe_pairs = shortest_pairs(pairs, PROBE_PAIRS)
    window = attention.shortest_window(unwrap_peft(model))
    if window is not None and (longer := shortest_pairs(pairs, 1, longer_than=window)):
        probe_pairs = [*probe_pairs[: PROBE_PAIRS - 1], *longer]
    expected_P2 = model_logps(model, probe_pairs, padded, device)
    _check_finite(expected_P2, device)
    if reason := packing_unsupported_reason(unwrap_peft(model)):
        return padded, f"padded batches, since {reason}"
    before = enable_packed_rows(unwrap_peft(model))
    failed = ""
    for backend in dict.fromkeys((device.attention, "batched")):
        packed = replace(padded, backend=backend)
        failure = _packing_failure(model, probe_pairs, packed, expected_P2, device)
        if not failure:
            return packed, f"{failed}packed rows of up to {packed.token_budget} tokens, attention by {backend}"
        failed += f"{failure}; "
    unwrap_peft(model).set_attn_implementation(before)
    return padded, f"padded batches, since in packed rows {failed.removesuffix('; ')}"


def _packing_failure(
    model: Any, pairs: Sequence[EncodedPair], packed: Packing, expected_P2: Tensor, device: Device
) -> str:
    """What is wrong with packed rows of `pairs`, or "" if they give `expected_P2` and leak nothing between spans."""
    try:
        packed_P2 = model_logps(model, pairs, packed, device)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise  # not the packing's fault
        first = str(error).splitlines()[0].partition(". ")[0]  # torch goes on to list every backend it knows
        return f"{packed.backend} fails ({first})"
    if not _allclose(packed_P2, expected_P2, device):
        return f"{packed.backend} gives other log-probabilities than padded batches"
    if _leaks_across_spans(model, pairs, packed, device):
        return f"with {packed.backend} a token changes answers that it is no part of"
    return ""


def shortest_pairs(pairs: Sequence[EncodedPair], count: int, longer_than: int = 0) -> list[EncodedPair]:
    """Of the pairs with sequences of more than `longer_than` tokens, the `count` shortest, the shortest first."""
    length_P = sequence_lengths(pairs)
    places = np.argsort(length_P, kind="stable")
    return [pairs[place] for place in places[length_P[places] > longer_than][:count].tolist()]


def _leaks_across_spans(model: Any, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> bool:
    """True if in a row of `pairs` a token changes hidden states of spans that do not see it."""
    groups = micro_batches(pairs, packing)
    return any(_row_leaks(model, [pairs[index] for index in group], packing, device) for group in groups)


def _check_finite(logp_P2: Tensor, device: Device) -> None:
    """Raise ModelError for log-probabilities that are not finite: NaN differs from itself, so no comparison holds."""
    if bool(logp_P2.isfinite().all()):
        return
    if device.compute_dtype == "fp16":
        raise ModelError(
            "this model overflows fp16: it gives the shortest pairs log-probabilities that are not finite; set "
            'model.dtype = "fp32", or take a card with bf16 (compute capability 8.0 or newer)'
        )
    raise ModelError(
        f"this model gives the shortest pairs log-probabilities that are not finite, in {device.compute_dtype}: its "
        "weights are damaged or do not belong to its config.json; fetch them again, or take another model"
    )


@torch.no_grad()
def _row_leaks(model: Any, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> bool:
    """Perturb the unshared tokens of every second span and report whether any hidden state outside them changes.

    In 16 bits a leak can be smaller than the rounding of `_allclose`. Here both rows have the same shapes, so without
    a leak not one bit changes; only where tokens are routed to experts may there be a rounding difference.
    """
    batch = collate(pairs, packing).to(device.torch_device)
    shared_L, perturbed_L = (torch.zeros_like(batch.input_ids_BL[0], dtype=torch.bool) for _ in range(2))
    spans = batch.layout.spans if batch.layout else ()
    for start, stop in (positions for span in spans for positions in span.prefix):
        shared_L[start:stop] = True
    for span in spans[::2]:
        perturbed_L[span.start : span.stop] = ~shared_L[span.start : span.stop]
    other_ids_BL = torch.where(perturbed_L, (batch.input_ids_BL - 1).abs(), batch.input_ids_BL)
    before_TD, after_TD = (
        hidden_states(model, row, device)[~perturbed_L].float()
        for row in (batch, replace(batch, input_ids_BL=other_ids_BL))
    )
    change_T = (after_TD - before_TD).norm(dim=1) / before_TD.norm(dim=1)
    return bool((change_T > device.tolerance).any())


def _allclose(actual: Tensor, expected: Tensor, device: Device) -> bool:
    """True if they differ by rounding only: by 1e-4 of their L2 norm in float32, by 2 % in 16 bits.

    Measured on SmolLM2 in bf16: rounding moves eight pairs by 0.5 %, a completion that sees the other one by over
    30 %; a single short completion may move by 3 %.
    """
    return bool((actual - expected).norm() <= device.tolerance * expected.norm())
