"""Loss, accuracy and rewards over all held-out pairs, weighted by pair, so that batching cannot change them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.preference.logps import score
from qlora_dpo.preference.metrics import Sums
from qlora_dpo.preference.objective import objective
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.recipe import DpoTable


@dataclass(frozen=True)
class Side:
    """Training or held-out pairs with the reference's log-probabilities of them, (P, 2), in nats.

    Those of training pairs are NaN until they are asked, along with the step that needs them.
    """

    pairs: Sequence[EncodedPair]
    reference_P2: Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module,
    side: Side,
    table: DpoTable,
    packing: Packing,
    device: Device,
    advance: Callable[[int], None] = lambda pairs: None,
) -> dict[str, Any]:
    """Means over all pairs of `side`, each name with the prefix `eval_`, and the number of pairs and ties."""
    started, was_training = time.monotonic(), model.training
    model.eval()
    sums = Sums(table.beta, sft=table.sft_weight > 0)
    for group in micro_batches(side.pairs, packing):
        batch = collate([side.pairs[index] for index in group], packing).to(device.torch_device)
        reference_P2 = side.reference_P2[group].to(device.torch_device)
        scores = score(model, batch, device)
        losses = objective(scores.chosen_logp_P, scores.rejected_logp_P, scores.chosen_tokens_P, reference_P2, table)
        sums.add(scores, losses, reference_P2)
        advance(len(group))
    model.train(was_training)
    means = {f"eval_{name}": value for name, value in sums.means().items()}
    return {**means, "eval_pairs": sums.pairs, "eval_ties": sums.ties, "seconds": time.monotonic() - started}
