"""Measures how close a merged model is to the trained one: KL, top-1 agreement, accuracy, loss and perplexity.

P pairs, S = 2P sequences, R rows that predict an answer token, V vocabulary, D width; c one chunk of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.model.malloc import malloc_trim
from qlora_dpo.model.output_head import head_logits
from qlora_dpo.model.quantized import dense_weight
from qlora_dpo.preference.logps import hidden_states
from qlora_dpo.preference.objective import dpo
from qlora_dpo.preference.pack import MicroBatch, Packing, collate, micro_batches

BATCH_TOKENS = 2048
MAX_CHUNK_LOGITS = 2**24
"""Largest number of logits in a chunk: 64 MiB in float32, which exist a few times over, for both models."""


@dataclass(frozen=True)
class MergeFidelity:
    """Both models on the answers of the same pairs, teacher-forced."""

    kl: float  # KL(trained || merged), nats per token
    base_kl: float  # KL(trained || base), nats per token: what training changed
    top1: float  # share of tokens for which both models have the same most likely token
    trained_accuracy: float  # share of pairs whose chosen answer has the higher reward; a tie counts as one half
    merged_accuracy: float
    trained_loss: float  # DPO's, in nats per pair
    merged_loss: float
    trained_perplexity: float  # of the chosen answers' tokens
    merged_perplexity: float
    tokens: int
    pairs: int


@dataclass(frozen=True)
class _BatchOutputs:
    """The trained model's hidden states (R, D) for one padded batch, and the reference's log-probabilities (S,)."""

    batch: MicroBatch
    trained_RD: Tensor
    reference_S: Tensor


@dataclass(frozen=True)
class TrainedOutputs:
    """Outputs of the trained model for all pairs; of the model itself, only the head is still needed."""

    model: nn.Module
    batches: Sequence[_BatchOutputs]
    base_kl: float
    """KL(trained || base), in nats per token, with the adapter disabled as the base."""


@torch.no_grad()
def record_trained(
    trained: nn.Module, pairs: Sequence[EncodedPair], pad_token_id: int, device: Device
) -> TrainedOutputs:
    """Run `trained` over all pairs, with its adapter enabled and, as the reference, disabled."""
    padded = Packing(BATCH_TOKENS, pad_token_id, backend=None)  # padded batches, which every model supports
    outputs, base_kl, tokens = [], 0.0, 0
    for group in micro_batches(pairs, padded):
        batch = collate([pairs[index] for index in group], padded).to(device.torch_device)
        states_R = batch.state_R[batch.row_N]  # in a padded batch each state predicts one token
        trained_RD = hidden_states(trained, batch, device)[states_R]
        with adapter_disabled(trained):
            reference_RD = hidden_states(trained, batch, device)[states_R]
        reference_S = torch.zeros(2 * batch.pairs, device=device.torch_device)
        for c in _token_chunks(batch, trained):
            with adapter_disabled(trained):
                reference_cV = _log_probs(trained, reference_RD[c], device)
            _add_token_logps(reference_S, reference_cV, batch, c)
            base_kl += _kl_sum(_log_probs(trained, trained_RD[c], device), reference_cV)
        tokens += len(batch.target_N)
        outputs.append(_BatchOutputs(batch, trained_RD, reference_S))
    return TrainedOutputs(trained, outputs, base_kl / tokens)


def free_weights(trained_outputs: TrainedOutputs) -> None:
    """Free the weights of the trained model in place, except those of its head."""
    model: Any = trained_outputs.model
    head = model.get_output_embeddings()
    # PEFT keeps the trained rows of a tied head in the embeddings' module
    tied = getattr(getattr(head, "token_adapter", None), "tied_adapter", None)
    head_ids = {id(parameter) for module in (head, tied) if module is not None for parameter in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in head_ids:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    malloc_trim()


@torch.no_grad()
def compare_merged(trained_outputs: TrainedOutputs, merged: nn.Module, device: Device, beta: float) -> MergeFidelity:
    """Run `merged` over the same pairs and compare its outputs; `beta` is that of the DPO loss."""
    kl, same_top1, tokens, pairs, chosen_tokens = 0.0, 0, 0, 0, 0
    correct_2, loss_2, chosen_2 = (torch.zeros(2, dtype=torch.float64) for _ in range(3))
    for part in trained_outputs.batches:
        batch = part.batch
        merged_RD = hidden_states(merged, batch, device)[batch.state_R[batch.row_N]]
        logp_2S = torch.zeros(2, 2 * batch.pairs, device=device.torch_device)
        for c in _token_chunks(batch, merged):
            trained_cV = _log_probs(trained_outputs.model, part.trained_RD[c], device)
            merged_cV = _log_probs(merged, merged_RD[c], device)
            kl += _kl_sum(trained_cV, merged_cV)
            same_top1 += int((trained_cV.argmax(-1) == merged_cV.argmax(-1)).sum())
            for row, logp_cV in enumerate((trained_cV, merged_cV)):
                _add_token_logps(logp_2S[row], logp_cV, batch, c)
        tokens, pairs = tokens + len(batch.target_N), pairs + batch.pairs
        chosen_tokens += int(batch.tokens_S[: batch.pairs].sum())
        chosen_2 += logp_2S[:, : batch.pairs].sum(1).cpu()
        correct_2 += _num_correct(logp_2S - part.reference_S)
        loss_2 += _sigmoid_loss_sum(logp_2S - part.reference_S, beta)
    perplexity_2 = (-chosen_2 / chosen_tokens).exp()
    return MergeFidelity(
        kl=kl / tokens,
        base_kl=trained_outputs.base_kl,
        top1=same_top1 / tokens,
        **_trained_and_merged("accuracy", correct_2 / pairs),
        **_trained_and_merged("loss", loss_2 / pairs),
        **_trained_and_merged("perplexity", perplexity_2),
        tokens=tokens,
        pairs=pairs,
    )


def _kl_sum(one_cV: Tensor, other_cV: Tensor) -> float:
    """KL(one || other) in nats, summed over the rows, of log-probabilities."""
    return (one_cV.exp() * (one_cV - other_cV)).sum(dtype=torch.float64).item()


def _trained_and_merged(name: str, value_2: Tensor) -> dict[str, float]:
    trained, merged = value_2.tolist()
    return {f"trained_{name}": trained, f"merged_{name}": merged}


def _token_chunks(batch: MicroBatch, model: Any) -> Sequence[Tensor]:
    """Indices of the scored tokens, split so that a chunk has at most `MAX_CHUNK_LOGITS` logits."""
    chunk_tokens = max(1, MAX_CHUNK_LOGITS // len(model.get_output_embeddings().weight))
    chunks: Sequence[Tensor] = torch.arange(len(batch.target_N), device=batch.target_N.device).split(chunk_tokens)
    return chunks


def _add_token_logps(logp_S: Tensor, logp_cV: Tensor, batch: MicroBatch, c: Tensor) -> None:
    """Add the log-probabilities of a chunk's target tokens to those of their sequences, in place."""
    sequence_R = torch.repeat_interleave(batch.tokens_S)[batch.scored_M.argsort()]
    logp_S.index_add_(0, sequence_R[c], logp_cV.gather(-1, batch.target_N[c, None])[:, 0])


def _log_probs(model: Any, hidden_cD: Tensor, device: Device) -> Tensor:
    weight_VD = dense_weight(model.get_output_embeddings(), device.torch_dtype)
    return head_logits(model, hidden_cD, weight_VD, device).log_softmax(-1)


def _num_correct(reward_2S: Tensor) -> Tensor:
    """For each model, the pairs whose chosen answer (first half of S) has the higher reward; a tie is one half."""
    chosen_2P, rejected_2P = reward_2S.chunk(2, dim=1)
    return ((chosen_2P > rejected_2P).sum(1) + (chosen_2P == rejected_2P).sum(1) / 2).cpu()


def _sigmoid_loss_sum(reward_2S: Tensor, beta: float) -> Tensor:
    """For each model, the sum of the DPO losses of all pairs."""
    chosen_2P, rejected_2P = reward_2S.chunk(2, dim=1)
    return dpo(chosen_2P - rejected_2P, beta).sum(1).cpu()
