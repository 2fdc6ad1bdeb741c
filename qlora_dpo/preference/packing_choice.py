"""Decides how pairs are laid out for a model, packed rows or padded batches, and proves it on a few of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair, sequence_lengths
from qlora_dpo.errors import ModelError, is_out_of_memory
from qlora_dpo.model import attention
from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.model.device import Device
from qlora_dpo.preference.logps import hidden_states, score_batch
from qlora_dpo.preference.pack import Packing, collate, micro_batches

PROBE_PAIRS = 8
"""Pairs on which a layout is proved."""


def choose_packing(model: Any, pairs: Sequence[EncodedPair], padded: Packing, device: Device) -> tuple[Packing, str]:
    """The layout for `pairs` and why; packed if the model gives every pair the log-probabilities it has padded.

    The shortest pairs are tried with each backend, the device's own first, in rows within the budget. Raises ModelError
    if the model gives them log-probabilities that are not finite.
    """
    few = shortest_pairs(pairs, PROBE_PAIRS)
    expected_P2 = batched_logps(model, few, padded, device)
    _check_finite(expected_P2, device)
    if reason := attention.packing_unsupported_reason(unwrap_peft(model), int(sequence_lengths(pairs).max())):
        return padded, f"padded batches, since {reason}"
    before = attention.enable_packed_attention(unwrap_peft(model))
    failed = ""
    for backend in dict.fromkeys((device.attention, "batched")):
        packed = replace(padded, backend=backend)
        try:
            found_P2 = batched_logps(model, few, packed, device)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise  # no fault of the layout
            first = str(error).splitlines()[0].partition(". ")[0]  # torch goes on to list every backend it knows
            failed += f"{backend} fails ({first}); "
            continue
        if not _allclose(found_P2, expected_P2, device):
            failed += f"{backend} gives other log-probabilities than padded batches; "
        elif _leaks_across_spans(model, few, packed, device):
            failed += f"with {backend} a token changes answers that it is no part of; "
        else:
            return packed, f"{failed}packed rows of up to {padded.token_budget} tokens, attention by {backend}"
    unwrap_peft(model).set_attn_implementation(before)
    return padded, f"padded batches, since in packed rows {failed.removesuffix('; ')}"


def shortest_pairs(pairs: Sequence[EncodedPair], count: int) -> list[EncodedPair]:
    """So many of the pairs with the shortest sequences, the shortest first."""
    places = np.argsort(sequence_lengths(pairs), kind="stable")[:count]
    return [pairs[place] for place in places.tolist()]


@torch.no_grad()
def batched_logps(model: Any, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> Tensor:
    """Log-probabilities (P, 2) of a few pairs by the model as it is now, on the CPU, in rows within the budget."""
    logps_P2 = torch.zeros(len(pairs), 2)
    for group in micro_batches(pairs, packing):
        some = [pairs[index] for index in group]
        scores = score_batch(model, collate(some, packing).to(device.torch_device), device, metrics=False)
        logps_P2[group] = torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], dim=1).cpu()
    return logps_P2


def _leaks_across_spans(model: Any, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> bool:
    """True if a row of `pairs` mixes what it must keep apart."""
    groups = micro_batches(pairs, packing)
    return any(_mixes_row(model, [pairs[index] for index in group], packing, device) for group in groups)


def _check_finite(logp_P2: Tensor, device: Device) -> None:
    """Raise ModelError for log-probabilities that no comparison could judge, since NaN differs from itself."""
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
def _mixes_row(model: Any, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> bool:
    """True if other tokens at the ends of every second span change the state of any token that does not see them.

    In 16 bits a leak can be smaller than the rounding of `_allclose`. Here the shapes are the same both times, so without
    a leak not one bit changes; only where tokens are sorted to experts may it be a rounding.
    """
    batch = collate(pairs, packing).to(device.torch_device)
    shared_L, inside_L = (torch.zeros_like(batch.input_ids_BL[0], dtype=torch.bool) for _ in range(2))
    spans = batch.layout.spans if batch.layout else ()
    for start, stop in (stretch for span in spans for stretch in span.prefix):
        shared_L[start:stop] = True
    for span in spans[::2]:
        inside_L[span.start : span.stop] = ~shared_L[span.start : span.stop]
    other_BL = torch.where(inside_L, (batch.input_ids_BL - 1).abs(), batch.input_ids_BL)
    before_TD, after_TD = (
        hidden_states(model, each, device)[~inside_L].float() for each in (batch, replace(batch, input_ids_BL=other_BL))
    )
    moved_T = (after_TD - before_TD).norm(dim=1) / before_TD.norm(dim=1)
    return bool((moved_T > device.tolerance).any())


def _allclose(found: Tensor, expected: Tensor, device: Device) -> bool:
    """True if they differ by rounding only: by 1e-4 of their L2 norm in float32, by 2 % in 16 bits.

    Measured on SmolLM2 in bf16: rounding moves eight pairs by 0.5 %, an answer that sees the other one by over 30 %;
    a single short answer may move by 3 %.
    """
    return bool((found - expected).norm() <= device.tolerance * expected.norm())
