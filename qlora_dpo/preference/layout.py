"""Decides how pairs are laid out for a model, packed rows or padded batches, and proves it on a few of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_dpo.data.encode import EncodedPair
from qlora_dpo.model import attention, budget
from qlora_dpo.model.device import Device
from qlora_dpo.preference.logps import language_model, score
from qlora_dpo.preference.pack import Packing, collate, longest

PROVED_ON = 3


def choose_packing(
    model: Any, pairs: Sequence[EncodedPair], token_budget: int, pad_token_id: int, device: Device
) -> tuple[Packing, str]:
    """The layout for `pairs` and why; packed if the model gives every pair the log-probabilities it has padded.

    The shortest pairs are tried with each backend, the device's own first.
    """
    padded = Packing(token_budget, pad_token_id, backend=None)
    if reason := attention.why_not(language_model(model), max(longest(pair) for pair in pairs)):
        return padded, f"padded batches, since {reason}"
    few = sorted(pairs, key=longest)[:PROVED_ON]
    expected_P2 = _logps(model, few, padded, device)
    before = attention.use(language_model(model))
    failed = ""
    for backend in dict.fromkeys((device.attention, "batched")):
        packed = replace(padded, backend=backend)
        try:
            found_P2 = _logps(model, few, packed, device)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            failed += f"{backend} fails ({str(error).splitlines()[0]}); "
            continue
        if _close(found_P2, expected_P2, device):
            return packed, f"{failed}packed rows of up to {token_budget} tokens, attention by {backend}"
        failed += f"{backend} gives other log-probabilities than padded batches; "
    language_model(model).set_attn_implementation(before)
    return padded, f"padded batches, since in packed rows {failed.removesuffix('; ')}"


def checkpoint_as_needed(
    model: Any, asked: bool | Literal["auto"], pairs: Sequence[EncodedPair], packing: Packing, device: Device
) -> str:
    """Recompute the activations of all layers, of none, or of as few as memory asks for; returns what was decided."""
    layers = len(budget.checkpointable(model))
    if asked is not True and asked is not False:
        few = sorted(pairs, key=longest)[:PROVED_ON]
        batch = collate(few, packing).to(device.torch_device)
        per_token = budget.kept(
            language_model(model), lambda: score(model.train(), batch, device).chosen_logp_P, batch.input_ids_BL.numel()
        )
        tokens = max(packing.token_budget, max(map(longest, pairs)))
        free = budget.free_bytes(device)
        count = budget.layers_to_checkpoint(per_token, layers, tokens, free)
        budget.checkpoint(model, count)
        need = per_token.bytes(tokens, layers, 0) / 2**30
        return (
            f"memory: a backward pass over {tokens} tokens needs {need:.1f} GiB, {free / 2**30:.1f} GiB are free: "
            + (f"{count} of {layers} layers are recomputed" if count else "nothing is recomputed")
        )
    budget.checkpoint(model, layers if asked else 0)
    return f"memory: {'every layer' if asked else 'nothing'} is recomputed in the backward pass, as the recipe says"


@torch.no_grad()
def _logps(model: Any, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> Tensor:
    scores = score(model, collate(pairs, packing).to(device.torch_device), device, metrics=False)
    return torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], dim=1).cpu()


def _close(found: Tensor, expected: Tensor, device: Device) -> bool:
    """True if they differ by rounding only: 1e-4 of the value in float32, 2 % in 16 bits."""
    tolerance = 1e-4 if device.compute_dtype == "fp32" else 2e-2
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
