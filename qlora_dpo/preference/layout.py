"""Decides how pairs are laid out for a model, packed rows or padded batches, and proves it on a few of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair, lengths, sequence_tokens
from qlora_dpo.errors import ModelError
from qlora_dpo.model import attention, budget, processes
from qlora_dpo.model.budget import Kept
from qlora_dpo.model.device import Device
from qlora_dpo.preference.logps import hidden_states, language_model, score
from qlora_dpo.preference.pack import Packing, collate
from qlora_dpo.recipe_train import ROW_TOKENS

PROVED_ON = 8
"""Pairs on which a layout is proved."""
MEASURED_ON = 2
"""Pairs on which it is measured what is kept of a token: few, since nothing is recomputed yet."""


def choose_packing(
    model: Any, pairs: Sequence[EncodedPair], token_budget: int, pad_token_id: int, device: Device
) -> tuple[Packing, str]:
    """The layout for `pairs` and why; packed if the model gives every pair the log-probabilities it has padded.

    The shortest pairs are tried with each backend, the device's own first. Raises ModelError if the model gives them
    log-probabilities that are not finite.
    """
    padded = Packing(token_budget, pad_token_id, backend=None)
    few = shortest(pairs, PROVED_ON)
    expected_P2 = _logps(model, few, padded, device)
    _insist_on_finite(expected_P2, device)
    if reason := attention.why_not(language_model(model), int(sequence_tokens(pairs).max())):
        return padded, f"padded batches, since {reason}"
    before = attention.use(language_model(model))
    failed = ""
    for backend in dict.fromkeys((device.attention, "batched")):
        packed = replace(padded, backend=backend)
        try:
            found_P2 = _logps(model, few, packed, device)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            failed += f"{backend} fails ({str(error).splitlines()[0]}); "
            continue
        if not _close(found_P2, expected_P2, device):
            failed += f"{backend} gives other log-probabilities than padded batches; "
        elif _mixes(model, few, packed, device):
            failed += f"with {backend} a token changes answers that it is no part of; "
        else:
            return packed, f"{failed}packed rows of up to {token_budget} tokens, attention by {backend}"
    language_model(model).set_attn_implementation(before)
    return padded, f"padded batches, since in packed rows {failed.removesuffix('; ')}"


def measured(model: Any, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> Kept:
    """What a token keeps for the backward pass, measured on a few short pairs."""
    batch = collate(shortest(pairs, MEASURED_ON), packing).to(device.torch_device)
    training = model.training
    try:
        return budget.kept(
            language_model(model), lambda: score(model.train(), batch, device).chosen_logp_P, batch.input_ids_BL.numel()
        )
    finally:
        model.train(training)


def choose_rows(
    model: Any, packing: Packing, per_token: Kept, pairs: Sequence[EncodedPair], recompute: bool, free: int
) -> tuple[Packing, str]:
    """`packing` in the largest rows that fit in `free` bytes, recomputing all layers or none, and a sentence if they
    are smaller than where memory allows; the same in all processes.
    """
    layers, longest = len(budget.checkpointable(model)), longest_alone(pairs, packing)
    recomputed, free = layers if recompute else 0, processes.least(free)
    tokens = processes.least(rows_that_fit(per_token, layers, recomputed, longest, free))
    need = per_token.bytes(ROW_TOKENS, layers, recomputed)
    why = f"memory: {why_smaller(tokens, need, free)}" if tokens < ROW_TOKENS else ""
    return replace(packing, token_budget=tokens), why


def row_sizes(longest: int) -> Iterator[int]:
    """Tokens of a row from `ROW_TOKENS` down, each half of the one before.

    The last is as long as the `longest` pair alone, which goes through the model whole: smaller rows keep no less.
    """
    yield (tokens := ROW_TOKENS)
    while tokens > longest:
        yield (tokens := max(tokens // 2, longest))


def rows_that_fit(per_token: Kept, layers: int, recomputed: int, longest: int, free: int) -> int:
    """Tokens of the largest rows whose backward pass fits in `free` bytes with so many of the layers recomputed.

    The smallest there are if none fit: then it is for `checkpoint_as_needed` to recompute more layers.
    """
    *sizes, smallest = row_sizes(longest)
    room = free * budget.USABLE
    return next((tokens for tokens in sizes if per_token.bytes(tokens, layers, recomputed) <= room), smallest)


def why_smaller(tokens: int, need: float, free: int) -> str:
    """Why rows have so few tokens although `ROW_TOKENS` are taken where their `need` of bytes is there."""
    return (
        f"rows of {tokens:,} tokens, since {ROW_TOKENS:,} would need {need / 2**30:.1f} GiB, and of "
        f"{free / 2**30:.1f} GiB left for a step {free * budget.USABLE / 2**30:.1f} are planned with"
    )


def longest_alone(pairs: Sequence[EncodedPair], packing: Packing) -> int:
    """Tokens of the largest pair alone in a row, or in a padded batch, where both its sequences are as long."""
    if packing.backend is None:
        return 2 * (int(sequence_tokens(pairs).max()) + 1)
    return int(lengths(pairs).sum(axis=1).max())


def checkpoint_as_needed(
    model: Any,
    asked: bool | Literal["auto"],
    per_token: Kept,
    pairs: Sequence[EncodedPair],
    row: int,
    free: int,
) -> str:
    """Recompute the activations of all layers, of none, or of as few as `free` bytes ask for; says what was decided."""
    layers = len(budget.checkpointable(model))
    tokens = max(row, int(lengths(pairs).sum(axis=1).max()))
    need = per_token.bytes(tokens, layers, 0)
    match asked:
        case "auto":
            count, why = budget.layers_to_checkpoint(per_token, layers, tokens, free), ""
        case True:
            count, why = layers, ", as the recipe says"
        case False:
            count, why = 0, ", as the recipe says"
    budget.checkpoint(model, count)
    needs = f"a backward pass over {tokens:,} tokens needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return f"memory: {needs}: {f'{count} of {layers} layers are' if count else 'nothing is'} recomputed{why}"


def reference_packing(packing: Packing, per_token: Kept, free: int, device: Device) -> Packing:
    """The rows of the reference pass: without a backward pass as many tokens as fit, on a GPU up to eight times more.

    A CPU gains nothing from larger rows, which leave its cache (benchmarks/README.md).
    """
    if device.type == "cpu":
        return packing
    # without gradients one layer's activations exist at a time
    fitting = int(free * budget.USABLE / per_token.layer)
    return replace(packing, token_budget=max(packing.token_budget, min(8 * packing.token_budget, fitting)))


def shortest(pairs: Sequence[EncodedPair], count: int) -> list[EncodedPair]:
    """So many of the pairs with the shortest sequences, the shortest first."""
    places = np.argsort(sequence_tokens(pairs), kind="stable")[:count]
    return [pairs[place] for place in places.tolist()]


@torch.no_grad()
def _logps(model: Any, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> Tensor:
    scores = score(model, collate(pairs, packing).to(device.torch_device), device, metrics=False)
    return torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], dim=1).cpu()


def _insist_on_finite(logp_P2: Tensor, device: Device) -> None:
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
def _mixes(model: Any, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> bool:
    """True if other tokens at the ends of every second span change the state of any token that does not see them.

    In 16 bits a leak can be smaller than the rounding of `_close`. Here the shapes are the same both times, so without
    a leak not one bit changes; only where tokens are sorted to experts may it be a rounding.
    """
    batch = collate(pairs, packing).to(device.torch_device)
    shared_L, inside_L = (torch.zeros_like(batch.input_ids_BL[0], dtype=torch.bool) for _ in range(2))
    spans = batch.layout.spans if batch.layout else ()
    for start, stop in (stretch for span in spans for stretch in span.before):
        shared_L[start:stop] = True
    for span in spans[::2]:
        inside_L[span.start : span.stop] = ~shared_L[span.start : span.stop]
    other_BL = torch.where(inside_L, (batch.input_ids_BL - 1).abs(), batch.input_ids_BL)
    before_TD, after_TD = (
        hidden_states(model, each, device)[~inside_L].float() for each in (batch, replace(batch, input_ids_BL=other_BL))
    )
    moved_T = (after_TD - before_TD).norm(dim=1) / before_TD.norm(dim=1)
    return bool((moved_T > device.tolerance).any())


def _close(found: Tensor, expected: Tensor, device: Device) -> bool:
    """True if they differ by rounding only: by 1e-4 of their L2 norm in float32, by 2 % in 16 bits.

    Measured on SmolLM2 in bf16: rounding moves eight pairs by 0.5 %, an answer that sees the other one by over 30 %;
    a single short answer may move by 3 %.
    """
    return bool((found - expected).norm() <= device.tolerance * expected.norm())
