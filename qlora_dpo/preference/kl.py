"""KL(policy || base) on chosen completions, over the whole vocabulary.

M completion tokens, R states that predict a chosen completion token, V vocabulary, D width; c one chunk of states.
"""

from collections.abc import Sequence

import torch
from torch import nn

from qlora_dpo.data.encoded import EncodedPair, pairs_without_rejected
from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.model.output_head import head_logits
from qlora_dpo.model.quantized import dense_weight
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.logps import hidden_states
from qlora_dpo.preference.pack import Packing, collate, micro_batches

KL_PAIRS = 32
"""Pairs to measure on by default: their few hundred tokens estimate the mean well enough for a warning."""
KL_LOGITS_PER_CHUNK = 2**22


@torch.no_grad()
def kl_to_base(
    model: nn.Module, pairs: Sequence[EncodedPair], packing: Packing, device: Device, max_pairs: int | None = KL_PAIRS
) -> float:
    """KL(policy || base) in nats per token, teacher-forced over the chosen completions of the first `max_pairs` pairs.

    None takes all pairs. Each rank computes its share of them; all ranks get the same result.
    """
    training, measured_pairs = model.training, pairs_without_rejected(pairs[:max_pairs])
    local_indices = rank_split.rank_indices(measured_pairs)
    model.eval()
    try:
        total, tokens = processes.all_reduce_sum(
            processes.run_or_raise_everywhere(lambda: _sum_kl(model, measured_pairs, local_indices, packing, device))
        )
    finally:
        model.train(training)
    return total / tokens


def _sum_kl(
    model: nn.Module, pairs: Sequence[EncodedPair], local_indices: Sequence[int], packing: Packing, device: Device
) -> tuple[float, int]:
    """KL in nats, summed over the completion tokens of this rank's `pairs`, and the number of those tokens."""
    head = unwrap_peft(model).get_output_embeddings()
    weight_VD, total, tokens = dense_weight(head, device.torch_dtype), 0.0, 0
    local_pairs = [pairs[index] for index in local_indices]
    chunk_states = max(1, KL_LOGITS_PER_CHUNK // len(weight_VD))
    for group in rank_split.pad_group_count(micro_batches(local_pairs, packing)):
        batch_pairs = [local_pairs[index] for index in group] if group is not None else pairs[:1]
        batch = collate(batch_pairs, packing).to(device.torch_device)
        states_R = batch.state_R[batch.row_N[batch.scored_M]]
        policy_RD = hidden_states(model, batch, device)[states_R].to(weight_VD.dtype)
        with adapter_disabled(model):
            base_RD = hidden_states(model, batch, device)[states_R].to(weight_VD.dtype)
        if group is None:  # a dummy batch, so that sharded forward passes stay in lockstep
            continue
        for policy_cD, base_cD in zip(policy_RD.split(chunk_states), base_RD.split(chunk_states), strict=True):
            policy_cV, base_cV = (
                head_logits(model, hidden_cD, weight_VD, device).log_softmax(-1) for hidden_cD in (policy_cD, base_cD)
            )
            total += (policy_cV.exp() * (policy_cV - base_cV)).sum(dtype=torch.float64).item()
        tokens += len(states_R)
    return total, tokens
