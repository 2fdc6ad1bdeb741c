"""How close a merged model is to the model that was trained: KL, top-1 agreement and preference accuracy.

P pairs, S = 2P sequences, R rows that predict an answer token, V vocabulary, D width; c one chunk of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_off
from qlora_dpo.preference.logps import hidden_states
from qlora_dpo.preference.pack import MicroBatch, Packing, collate, micro_batches

TOKENS_AT_ONCE = 2048
LOGITS_AT_ONCE = 2**24
"""In float32 64 MiB, a few times over: both models' logits of some tokens, side by side."""


@dataclass(frozen=True)
class Agreement:
    """Both models on the answers of the same pairs, each with the true tokens before it."""

    kl: float  # KL(trained || merged), nats per token
    top1: float  # share of tokens where both models have the same likeliest token
    trained_accuracy: float  # share of pairs whose chosen answer gained more over the reference; a tie is one half
    merged_accuracy: float
    tokens: int
    pairs: int


@torch.no_grad()
def measure(
    trained: nn.Module, merged: nn.Module, pairs: Sequence[EncodedPair], pad_token_id: int, device: Device
) -> Agreement:
    """Run both models, and `trained` with its adapter off as the reference, over all of `pairs`."""
    kl, same, tokens, trained_right, merged_right = 0.0, 0, 0, 0.0, 0.0
    padded = Packing(TOKENS_AT_ONCE, pad_token_id, backend=None)  # which every model can be given
    for group in micro_batches(pairs, padded):
        batch = collate([pairs[index] for index in group], padded).to(device.torch_device)
        batch_kl, batch_same, (trained_S, merged_S, reference_S) = _compare(trained, merged, batch, device)
        kl, same, tokens = kl + batch_kl, same + batch_same, tokens + len(batch.target_N)
        trained_right += _right(trained_S - reference_S)
        merged_right += _right(merged_S - reference_S)
    return Agreement(
        kl / tokens, same / tokens, trained_right / len(pairs), merged_right / len(pairs), tokens, len(pairs)
    )


def _compare(trained: nn.Module, merged: nn.Module, batch: MicroBatch, device: Device) -> tuple[float, int, Tensor]:
    """KL summed over tokens, tokens of one mind, and (3, S) log-probabilities: trained, merged, reference."""
    states_R = batch.state_R[batch.row_N]  # in a padded batch each state predicts one token
    trained_RD, merged_RD = (hidden_states(model, batch, device)[states_R] for model in (trained, merged))
    with adapter_off(trained):
        reference_RD = hidden_states(trained, batch, device)[states_R]
    sequence_R = torch.repeat_interleave(batch.tokens_S)[batch.scored_M.argsort()]
    logp_3S = torch.zeros(3, 2 * batch.pairs, device=device.torch_device)
    kl, same = 0.0, 0
    for c in torch.arange(len(batch.target_N), device=device.torch_device).split(_rows_at_once(merged)):
        trained_cV, merged_cV = _logps(trained, trained_RD[c], device), _logps(merged, merged_RD[c], device)
        with adapter_off(trained):
            reference_cV = _logps(trained, reference_RD[c], device)
        kl += (trained_cV.exp() * (trained_cV - merged_cV)).sum(dtype=torch.float64).item()
        same += int((trained_cV.argmax(-1) == merged_cV.argmax(-1)).sum())
        for row, logp_cV in enumerate((trained_cV, merged_cV, reference_cV)):
            logp_3S[row].index_add_(0, sequence_R[c], logp_cV.gather(-1, batch.target_N[c, None])[:, 0])
    return kl, same, logp_3S


def _logps(model: Any, hidden_cD: Tensor, device: Device) -> Tensor:
    with device.autocast():
        logits_cV: Tensor = model.get_output_embeddings()(hidden_cD)
    return logits_cV.float().log_softmax(-1)


def _rows_at_once(model: Any) -> int:
    return max(1, LOGITS_AT_ONCE // int(model.config.vocab_size))


def _right(reward_S: Tensor) -> float:
    """Pairs whose chosen answer (the first half of S) has the higher reward, a tie as one half."""
    chosen_P, rejected_P = reward_S.chunk(2)
    return float((chosen_P > rejected_P).sum()) + float((chosen_P == rejected_P).sum()) / 2
