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
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.metrics import MetricSums, make_metric_sums
from qlora_dpo.preference.objective import Logps, LossColumns, Losses, compute_losses, concat_logps, uses_wpo_weighting
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.recipe.objective import Objective


@dataclass(frozen=True)
class PreferenceDataset:
    """Training or held-out pairs with the reference's log-probabilities of them, (P, 2), in nats.

    Those of training pairs are NaN until they are asked, along with the step that needs them.
    """

    pairs: Sequence[EncodedPair]
    reference_P2: Tensor
    columns: LossColumns = field(default_factory=LossColumns)
    counts: bool = True
    """False for a pair that another process counts, and that shows here what form its figures have."""

    def for_this_rank(self) -> "PreferenceDataset":
        """The pairs that this process takes of them; the first one, not to be counted, if there are none for it."""
        if processes.world_size() == 1:
            return self
        own = rank_split.rank_indices(self.pairs)
        indices = own or [0]
        some = [self.pairs[i] for i in indices]
        return PreferenceDataset(some, self.reference_P2[indices], self.columns.select(indices), counts=bool(own))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: PreferenceDataset,
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
    sums = make_metric_sums(table)
    mine = processes.run_or_raise_everywhere(
        lambda: _compute_logps(model, dataset, table, packing, device, sums, advance)
    )
    # of all pairs at once, since a loss may compare them with each other
    everything = rank_split.all_gather_logps(mine if dataset.counts else mine.empty())
    sums = (sums if dataset.counts else make_metric_sums(table)).all_reduce()
    losses = compute_losses(everything, table)
    sums.add_losses(losses)
    totals = sums.totals
    model.train(was_training)
    means = {f"eval_{name}": value for name, value in sums.means().items()}
    return {
        **means,
        **_warning_statistics(everything, losses, totals, sums.completion_tokens[0]),
        "eval_pairs": sums.pairs,
        "eval_ties": int(totals["ties"]),
        "seconds": time.monotonic() - started,
    }


def _compute_logps(
    model: nn.Module,
    dataset: PreferenceDataset,
    table: Objective,
    packing: Packing,
    device: Device,
    sums: MetricSums,
    advance: Callable[[int], None],
) -> Logps:
    parts = list[Logps]()
    for group in rank_split.pad_group_count(micro_batches(dataset.pairs, packing)):
        batch = collate([dataset.pairs[index] for index in group or [0]], packing).to(device.torch_device)
        if group is None:
            score_batch(model, batch, device, metrics=False)
            continue
        reference_P2 = dataset.reference_P2[group].to(device.torch_device)
        scores = score_batch(model, batch, device, wpo_weights=uses_wpo_weighting(table))
        parts.append(scores.with_reference(reference_P2, dataset.columns.select(group).to(device.torch_device)))
        sums.add_scores(scores)
        advance(len(group))
    return concat_logps(parts)


def _warning_statistics(
    logps: Logps, losses: Losses, totals: Mapping[str, float], chosen_tokens: int
) -> dict[str, float]:
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
