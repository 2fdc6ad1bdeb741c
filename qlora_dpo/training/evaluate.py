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
from qlora_dpo.preference.metrics import sums_for
from qlora_dpo.preference.objective import Columns, Logps, objective, together, weighs_pairs
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
    sums.add_losses(objective(together(parts), table))
    model.train(was_training)
    means = {f"eval_{name}": value for name, value in sums.means().items()}
    return {**means, "eval_pairs": sums.pairs, "eval_ties": sums.ties, "seconds": time.monotonic() - started}
