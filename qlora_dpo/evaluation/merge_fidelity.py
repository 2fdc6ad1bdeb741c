"""How close a merged model is to the model that was trained: KL, agreement, accuracy, loss and perplexity.

P pairs, S = 2P sequences, R rows that predict an answer token, V vocabulary, D width; c one chunk of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.model.malloc import malloc_trim
from qlora_dpo.preference.logps import hidden_states
from qlora_dpo.preference.pack import MicroBatch, Packing, collate, micro_batches

BATCH_TOKENS = 2048
MAX_CHUNK_LOGITS = 2**24
"""In float32 64 MiB, a few times over: both models' logits of some tokens, side by side."""


@dataclass(frozen=True)
class MergeFidelity:
    """Both models on the answers of the same pairs, each with the true tokens before it."""

    kl: float  # KL(trained || merged), nats per token
    top1: float  # share of tokens where both models have the same likeliest token
    trained_accuracy: float  # share of pairs whose chosen answer gained more over the reference; a tie is one half
    merged_accuracy: float
    trained_loss: float  # DPO's, nats per pair, at the beta that was asked for
    merged_loss: float
    trained_perplexity: float  # of the chosen answers' tokens
    merged_perplexity: float
    tokens: int
    pairs: int


@dataclass(frozen=True)
class _BatchOutputs:
    """What the trained model says about one padded batch: its states (R, D), and log-probabilities with adapter off."""

    batch: MicroBatch
    trained_RD: Tensor
    reference_S: Tensor


@dataclass(frozen=True)
class TrainedOutputs:
    """What the trained model says about pairs. Of the model itself only its head is needed from then on."""

    model: nn.Module
    batches: Sequence[_BatchOutputs]


def measure_merge_fidelity(
    trained: nn.Module,
    merged: nn.Module,
    pairs: Sequence[EncodedPair],
    pad_token_id: int,
    device: Device,
    beta: float = 0.1,
) -> MergeFidelity:
    """Run both models, and `trained` with its adapter off as the reference, over all of `pairs`."""
    return compare_merged(record_trained(trained, pairs, pad_token_id, device), merged, device, beta)


@torch.no_grad()
def record_trained(
    trained: nn.Module, pairs: Sequence[EncodedPair], pad_token_id: int, device: Device
) -> TrainedOutputs:
    """Run `trained` over all of `pairs`, with its adapter on and off."""
    padded = Packing(BATCH_TOKENS, pad_token_id, backend=None)  # which every model can be given
    parts = []
    for group in micro_batches(pairs, padded):
        batch = collate([pairs[index] for index in group], padded).to(device.torch_device)
        states_R = batch.state_R[batch.row_N]  # in a padded batch each state predicts one token
        trained_RD = hidden_states(trained, batch, device)[states_R]
        with adapter_disabled(trained):
            reference_RD = hidden_states(trained, batch, device)[states_R]
            reference_S = torch.zeros(2 * batch.pairs, device=device.torch_device)
            for c in _token_chunks(batch, trained):
                _add_token_logps(reference_S, _log_probs(trained, reference_RD[c], device), batch, c)
        parts.append(_BatchOutputs(batch, trained_RD, reference_S))
    return TrainedOutputs(trained, parts)


def free_weights(trained_outputs: TrainedOutputs) -> None:
    """Free the weights of the trained model, in place and whoever holds it, but those of its head."""
    model: Any = trained_outputs.model
    kept = {id(each) for each in model.get_output_embeddings().parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    malloc_trim()


@torch.no_grad()
def compare_merged(trained_outputs: TrainedOutputs, merged: nn.Module, device: Device, beta: float) -> MergeFidelity:
    """Run `merged` over the same pairs, and compare."""
    kl, same, tokens, pairs, chosen_tokens = 0.0, 0, 0, 0, 0
    right, loss, chosen = (torch.zeros(2, dtype=torch.float64) for _ in range(3))
    for part in trained_outputs.batches:
        batch = part.batch
        merged_RD = hidden_states(merged, batch, device)[batch.state_R[batch.row_N]]
        logp_2S = torch.zeros(2, 2 * batch.pairs, device=device.torch_device)
        for c in _token_chunks(batch, merged):
            trained_cV = _log_probs(trained_outputs.model, part.trained_RD[c], device)
            merged_cV = _log_probs(merged, merged_RD[c], device)
            kl += (trained_cV.exp() * (trained_cV - merged_cV)).sum(dtype=torch.float64).item()
            same += int((trained_cV.argmax(-1) == merged_cV.argmax(-1)).sum())
            for row, logp_cV in enumerate((trained_cV, merged_cV)):
                _add_token_logps(logp_2S[row], logp_cV, batch, c)
        tokens, pairs = tokens + len(batch.target_N), pairs + batch.pairs
        chosen_tokens += int(batch.tokens_S[: batch.pairs].sum())
        chosen += logp_2S[:, : batch.pairs].sum(1).cpu()
        right += _num_correct(logp_2S - part.reference_S)
        loss += _sigmoid_loss_sum(logp_2S - part.reference_S, beta)
    perplexity = (-chosen / chosen_tokens).exp()
    return MergeFidelity(
        kl=kl / tokens,
        top1=same / tokens,
        **_trained_and_merged("accuracy", right / pairs),
        **_trained_and_merged("loss", loss / pairs),
        **_trained_and_merged("perplexity", perplexity),
        tokens=tokens,
        pairs=pairs,
    )


def _trained_and_merged(name: str, values: Tensor) -> dict[str, float]:
    trained, merged = values.tolist()
    return {f"trained_{name}": trained, f"merged_{name}": merged}


def _token_chunks(batch: MicroBatch, model: Any) -> Sequence[Tensor]:
    """Indices of scored tokens, as many at a time as their logits may take."""
    at_once = max(1, MAX_CHUNK_LOGITS // int(model.config.vocab_size))
    chunks: Sequence[Tensor] = torch.arange(len(batch.target_N), device=batch.target_N.device).split(at_once)
    return chunks


def _add_token_logps(logp_S: Tensor, logp_cV: Tensor, batch: MicroBatch, c: Tensor) -> None:
    """Add the log-probabilities of the true tokens of a chunk to those of their sequences, in place."""
    sequence_R = torch.repeat_interleave(batch.tokens_S)[batch.scored_M.argsort()]
    logp_S.index_add_(0, sequence_R[c], logp_cV.gather(-1, batch.target_N[c, None])[:, 0])


def _log_probs(model: Any, hidden_cD: Tensor, device: Device) -> Tensor:
    with device.autocast():
        logits_cV: Tensor = model.get_output_embeddings()(hidden_cD)
    return logits_cV.float().log_softmax(-1)


def _num_correct(reward_2S: Tensor) -> Tensor:
    """For each model, pairs whose chosen answer (the first half of S) has the higher reward, a tie as one half."""
    chosen_2P, rejected_2P = reward_2S.chunk(2, dim=1)
    return ((chosen_2P > rejected_2P).sum(1) + (chosen_2P == rejected_2P).sum(1) / 2).cpu()


def _sigmoid_loss_sum(reward_2S: Tensor, beta: float) -> Tensor:
    """For each model, the sum of the sigmoid losses of all pairs (Rafailov et al. 2023, eq. 7)."""
    chosen_2P, rejected_2P = reward_2S.chunk(2, dim=1)
    return -F.logsigmoid(beta * (chosen_2P - rejected_2P)).sum(1).cpu()
