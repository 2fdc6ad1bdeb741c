"""Loss, accuracy and rewards over all held-out pairs, weighted by pair, so that batching cannot change them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.preference.logps import score
from qlora_dpo.preference.metrics import Sums, sums_for
from qlora_dpo.preference.objective import Columns, Logps, Losses, objective, together, weighs_pairs
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.recipe_objective import Objective


@dataclass(frozen=True)
class Side:
    """Training or held-out pairs with the reference's log-probabilities of them, (P, 2), in nats.

    Those of training pairs are NaN until they are asked, along with the step that needs them.
    """

    pairs: Sequence[EncodedPair]
    reference_P2: Tensor
    columns: Columns = field(default_factory=Columns)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    side: Side,
    table: Objective,
    packing: Packing,
    device: Device,
    advance: Callable[[int], None] = lambda pairs: None,
) -> dict[str, Any]:
    """Means over all pairs of `side`, each name with the prefix `eval_`, and the number of pairs and ties."""
    started, was_training = time.monotonic(), model.training
    model.eval()
    sums, parts = sums_for(table), list[Logps]()
    for group in micro_batches(side.pairs, packing):
        batch = collate([side.pairs[index] for index in group], packing).to(device.torch_device)
        reference_P2 = side.reference_P2[group].to(device.torch_device)
        scores = score(model, batch, device, likely=weighs_pairs(table))
        parts.append(scores.beside(reference_P2, side.columns.of(group).to(device.torch_device)))
        sums.add_scores(scores)
        advance(len(group))
    # of all pairs at once, since a loss may compare them with each other
    everything = together(parts)
    losses = objective(everything, table)
    sums.add_losses(losses)
    model.train(was_training)
    means = {f"eval_{name}": value for name, value in sums.means().items()}
    return {
        **means,
        **_watched(everything, losses, sums),
        "eval_pairs": sums.pairs,
        "eval_ties": sums.ties,
        "seconds": time.monotonic() - started,
    }


def _watched(logps: Logps, losses: Losses, sums: Sums) -> dict[str, float]:
    """What signs of trouble are judged by, beside the means."""
    total_P = losses.total_P.double()
    margin_P = (losses.rewards_P2[:, 0] - losses.rewards_P2[:, 1]).double()
    longer_P = (logps.chosen_tokens_P - logps.rejected_tokens_P).double()
    # without differences between pairs there is nothing that could go together
    compares = sums.ties < sums.pairs > 2 and float(margin_P.std()) > 0 and float(longer_P.std()) > 0
    correlation = float(torch.corrcoef(torch.stack([margin_P, longer_P]))[0, 1]) if compares else None
    return {
        "eval_loss_stderr": float(total_P.std(correction=0)) / sums.pairs**0.5,
        "eval_logps/chosen_per_token": sums.totals["logps/chosen"] / sums.chosen_tokens,
    } | ({"eval_length_correlation": correlation} if correlation is not None else {})
