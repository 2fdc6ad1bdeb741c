"""Loss, accuracy and rewards over all held-out pairs, weighted by pair, so that batching cannot change them."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.logps import score
from qlora_dpo.preference.metrics import Sums, sums_for
from qlora_dpo.preference.objective import Columns, Logps, Losses, objective, together, weighs_pairs
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.recipe.objective import Objective


@dataclass(frozen=True)
class Side:
    """Training or held-out pairs with the reference's log-probabilities of them, (P, 2), in nats.

    Those of training pairs are NaN until they are asked, along with the step that needs them.
    """

    pairs: Sequence[EncodedPair]
    reference_P2: Tensor
    columns: Columns = field(default_factory=Columns)
    counts: bool = True
    """False for a pair that another process counts, and that shows here what form its figures have."""

    def own(self) -> "Side":
        """The pairs that this process takes of them; the first one, not to be counted, if there are none for it."""
        if processes.count() == 1:
            return self
        own = rank_split.own(self.pairs)
        indices = own or [0]
        some = [self.pairs[i] for i in indices]
        return Side(some, self.reference_P2[indices], self.columns.of(indices), counts=bool(own))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    side: Side,
    table: Objective,
    packing: Packing,
    device: Device,
    advance: Callable[[int], None] = lambda pairs: None,
) -> dict[str, Any]:
    """Means over all pairs of `side`, each name with the prefix `eval_`, and the number of pairs and ties.

    Of several processes each looks at the pairs of its own `side`, and all return the means over all of them.
    """
    started, was_training = time.monotonic(), model.training
    model.eval()
    sums = sums_for(table)
    mine = processes.all_or_none(lambda: _looked_at(model, side, table, packing, device, sums, advance))
    # of all pairs at once, since a loss may compare them with each other
    everything = rank_split.of_all(mine if side.counts else mine.none())
    sums = (sums if side.counts else sums_for(table)).of_all()
    losses = objective(everything, table)
    sums.add_losses(losses)
    totals = sums.totals
    model.train(was_training)
    means = {f"eval_{name}": value for name, value in sums.means().items()}
    return {
        **means,
        **_watched(everything, losses, totals, sums.answer_tokens[0]),
        "eval_pairs": sums.pairs,
        "eval_ties": int(totals["ties"]),
        "seconds": time.monotonic() - started,
    }


def _looked_at(
    model: nn.Module,
    side: Side,
    table: Objective,
    packing: Packing,
    device: Device,
    sums: Sums,
    advance: Callable[[int], None],
) -> Logps:
    parts = list[Logps]()
    for group in rank_split.in_step(micro_batches(side.pairs, packing)):
        batch = collate([side.pairs[index] for index in group or [0]], packing).to(device.torch_device)
        if group is None:
            score(model, batch, device, metrics=False)
            continue
        reference_P2 = side.reference_P2[group].to(device.torch_device)
        scores = score(model, batch, device, likely=weighs_pairs(table))
        parts.append(scores.beside(reference_P2, side.columns.of(group).to(device.torch_device)))
        sums.add_scores(scores)
        advance(len(group))
    return together(parts)


def _watched(logps: Logps, losses: Losses, totals: Mapping[str, float], chosen_tokens: int) -> dict[str, float]:
    """What signs of trouble are judged by, beside the means."""
    pairs = len(losses.total_P)
    total_P = losses.total_P.double()
    margin_P = (losses.rewards_P2[:, 0] - losses.rewards_P2[:, 1]).double()
    longer_P = (logps.chosen_tokens_P - logps.rejected_tokens_P).double()
    # without differences between pairs there is nothing that could go together
    compares = totals["ties"] < pairs > 2 and float(margin_P.std()) > 0 and float(longer_P.std()) > 0
    correlation = float(torch.corrcoef(torch.stack([margin_P, longer_P]))[0, 1]) if compares else None
    return {
        "eval_loss_stderr": float(total_P.std(correction=0)) / pairs**0.5,
        "eval_logps/chosen_per_token": totals["logps/chosen"] / chosen_tokens,
    } | ({"eval_length_correlation": correlation} if correlation is not None else {})
