"""How far the policy has moved from its base on chosen answers, as a KL divergence over whole vocabularies.

R states that predict an answer token, V vocabulary, D width; c one chunk of states.
"""

from collections.abc import Sequence

import torch
from torch import nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.model.quantized import dense_weight
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.logps import hidden_states
from qlora_dpo.preference.pack import Packing, collate, micro_batches

KL_PAIRS = 32
"""Pairs that are asked: their few hundred tokens fix the mean well enough for a warning."""
KL_LOGITS_PER_CHUNK = 2**22


@torch.no_grad()
def kl_to_base(
    model: nn.Module, pairs: Sequence[EncodedPair], packing: Packing, device: Device, max_pairs: int | None = KL_PAIRS
) -> float:
    """KL(policy || base) in nats per token, over the chosen answers of the first `most` pairs (None is all), each
    token's true predecessors given. Of several processes each asks about its own part of them.
    """
    was_training, few = model.training, pairs[:max_pairs]
    own = rank_split.rank_indices(few)
    model.eval()
    total, tokens = processes.all_reduce_sum(
        processes.run_or_raise_everywhere(lambda: _sum_kl(model, few, own, packing, device))
    )
    model.train(was_training)
    return total / tokens


def _sum_kl(
    model: nn.Module, pairs: Sequence[EncodedPair], own: Sequence[int], packing: Packing, device: Device
) -> tuple[float, int]:
    """KL in nats, summed over the tokens of the chosen answers of the `own` ones, and how many tokens that are."""
    head = unwrap_peft(model).get_output_embeddings()
    weight_VD, total, tokens = dense_weight(head, device.torch_dtype), 0.0, 0
    mine = [pairs[index] for index in own]
    for group in rank_split.pad_group_count(micro_batches(mine, packing)):
        some = [mine[index] for index in group] if group is not None else pairs[:1]
        batch = collate(some, packing).to(device.torch_device)
        chosen_M = torch.arange(len(batch.scored_M), device=device.torch_device) < batch.tokens_S[: len(some)].sum()
        states_R = batch.state_R[batch.row_N[batch.scored_M[chosen_M]]]
        policy_RD = hidden_states(model, batch, device)[states_R].to(weight_VD.dtype)
        with adapter_disabled(model):
            base_RD = hidden_states(model, batch, device)[states_R].to(weight_VD.dtype)
        if group is None:
            continue
        at_once = max(1, KL_LOGITS_PER_CHUNK // len(weight_VD))
        for policy_cD, base_cD in zip(policy_RD.split(at_once), base_RD.split(at_once), strict=True):
            policy_cV, base_cV = (
                nn.functional.linear(each, weight_VD, head.bias).float().log_softmax(-1)
                for each in (policy_cD, base_cD)
            )
            total += (policy_cV.exp() * (policy_cV - base_cV)).sum(dtype=torch.float64).item()
        tokens += len(states_R)
    return total, tokens
