"""The reference pass: log-probabilities by the same model with its adapter off, or by another adapter or model.

P pairs. Log-probabilities are float32 sums over a completion, in nats, in the columns chosen and rejected.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair, pair_digests
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import MicroBatch, Packing, collate, micro_batches
from qlora_dpo.preference.reference_adapter import ADAPTER_OFF, ReferenceAdapter, as_reference
from qlora_dpo.preference.reference_cache import ReferenceLogpCache

GROUPING_BLOCK = 4096
"""Pairs that are sorted into rows together: as Python numbers those of HH take 40 MB."""


def compute_reference_logps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    cache: ReferenceLogpCache,
    packing: Packing,
    device: Device,
    advance: Callable[[int], None] = lambda pairs: None,
    reference: ReferenceAdapter = ADAPTER_OFF,
) -> Tensor:
    """Log-probabilities (P, 2) of `pairs` with the adapter off or with the weights of `reference`.

    Pairs that are not in `cache` are computed and added to it, so a stopped run continues where it was. `advance`
    receives the number of known pairs, then the number that each batch finishes. Each rank computes its share and
    gathers the others'. If one rank runs out of memory, all raise MemoryError; what each has added is kept.
    """
    local_indices = rank_split.distinct_rank_indices(pairs)
    missing = cache.missing(pairs, local_indices)
    advance(len(pairs) - len(missing) * processes.world_size())
    groups: Iterable[list[int] | None] = _pair_groups(pairs, missing, packing)

    def compute() -> None:
        with cache:
            for group in rank_split.pad_group_count(list(groups)) if processes.is_sharded() else groups:
                batch_pairs = [pairs[index] for index in group or [0]]
                with as_reference(model, reference):
                    logps_P2 = model_logps(model, batch_pairs, packing, device)
                if group is not None:
                    cache.add(batch_pairs, logps_P2)
                    advance(len(batch_pairs) * processes.world_size())

    processes.run_or_raise_everywhere(compute)
    cache.all_gather(pair_digests(pairs)[local_indices])
    return cache.get(pairs)


def _pair_groups(pairs: Sequence[EncodedPair], indices: Sequence[int], packing: Packing) -> Iterator[list[int]]:
    """The pairs at `indices` in micro-batches, as indices; at most GROUPING_BLOCK pairs are in memory at a time."""
    for start in range(0, len(indices), GROUPING_BLOCK):
        block = indices[start : start + GROUPING_BLOCK]
        yield from ([block[place] for place in group] for group in micro_batches([pairs[i] for i in block], packing))


def batch_reference_logps(
    model: nn.Module, batch: MicroBatch, device: Device, reference: ReferenceAdapter = ADAPTER_OFF
) -> Tensor:
    """Reference log-probabilities (P, 2) of a batch that is about to be trained on, on the batch's device.

    Uses the policy's own packed row, so both passes round identically.
    """
    training = model.training
    model.eval()
    try:
        with as_reference(model, reference), torch.no_grad():
            return _batch_logps(model, batch, device)
    finally:
        model.train(training)


def fresh_reference_logps(
    model: nn.Module, pairs: Sequence[EncodedPair], packing: Packing, device: Device, reference: ReferenceAdapter
) -> Tensor:
    """Log-probabilities (P, 2) of `pairs` by the reference as it is now, on the CPU, without a cache."""
    logps_P2 = torch.zeros(len(pairs), 2)
    for group in rank_split.pad_group_count(micro_batches(pairs, packing)):
        batch = collate([pairs[index] for index in group or [0]], packing).to(device.torch_device)
        batch_P2 = batch_reference_logps(model, batch, device, reference).cpu()
        if group is not None:
            logps_P2[group] = batch_P2
    return logps_P2


@torch.no_grad()
def model_logps(model: nn.Module, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> Tensor:
    """Log-probabilities (P, 2) of `pairs` by the model as it is now, on the CPU, in rows within the token budget."""
    logps_P2 = torch.zeros(len(pairs), 2)
    for group in micro_batches(pairs, packing):
        batch = collate([pairs[index] for index in group], packing).to(device.torch_device)
        logps_P2[group] = _batch_logps(model, batch, device).cpu()
    return logps_P2


def _batch_logps(model: nn.Module, batch: MicroBatch, device: Device) -> Tensor:
    scores = score_batch(model, batch, device, metrics=False)
    return torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], dim=1)
