"""Log-probabilities of the answers, from the rows that predict an answer token only, in float32.

P pairs, S = 2P sequences, R rows that predict an answer token, V vocabulary, D width; c one chunk of rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from qlora_dpo.model.device import Device
from qlora_dpo.preference.pack import MicroBatch

# 152k vocabulary: float32 logits of 8 pairs of 512 tokens would be 4.6 GiB; a chunk of 2^24 logits is 64 MiB
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Scores:
    """What a forward pass says about P pairs. Only the first two carry gradients."""

    chosen_logp_P: Tensor  # nats, summed over the answer
    rejected_logp_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    chosen_logits_sum: float  # mean over V, summed over the chosen answers' tokens
    rejected_logits_sum: float
    entropy_sum: float  # nats, over all answer tokens
    chosen_top1_sum: float


def score(model: nn.Module, batch: MicroBatch, device: Device, *, metrics: bool = True) -> Scores:
    """Run `batch` through `model` once and sum the log-probabilities of each answer.

    Without `metrics`, logits, entropy and top-1 stay 0: the reference needs none of them.
    """
    head = _language_model(model).get_output_embeddings()
    hidden_RD = hidden_rows(model, batch, device)
    logp_R, logits_R, entropy_R, top1_R = _HeadLogps.apply(  # type: ignore[no-untyped-call]
        hidden_RD, head.weight, head.bias, batch.target_R, device.torch_dtype, metrics
    )
    sequences = 2 * batch.pairs
    tokens_S = torch.bincount(batch.sequence_R, minlength=sequences)
    # rows of a sequence stand together; index_add would sum them in another order every time on a GPU
    logp_S = torch.segment_reduce(logp_R, "sum", lengths=tokens_S)
    chosen_R = batch.sequence_R < batch.pairs
    return Scores(
        chosen_logp_P=logp_S[: batch.pairs],
        rejected_logp_P=logp_S[batch.pairs :],
        chosen_tokens_P=tokens_S[: batch.pairs],
        rejected_tokens_P=tokens_S[batch.pairs :],
        chosen_logits_sum=logits_R[chosen_R].sum().item(),
        rejected_logits_sum=logits_R[~chosen_R].sum().item(),
        entropy_sum=entropy_R.sum().item(),
        chosen_top1_sum=top1_R[chosen_R].sum().item(),
    )


def hidden_rows(model: nn.Module, batch: MicroBatch, device: Device) -> Tensor:
    """Run `batch` through all of `model` but its head; the hidden states (R, D) that predict an answer token."""
    language_model = _language_model(model)
    body = getattr(language_model, language_model.base_model_prefix)
    with device.autocast():
        hidden_SLD: Tensor = body(
            input_ids=batch.input_ids_SL, attention_mask=batch.attention_mask_SL, use_cache=False
        ).last_hidden_state
    return hidden_SLD.flatten(0, 1)[batch.row_R]


def _language_model(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


class _HeadLogps(torch.autograd.Function):
    """Log-probability of each row's target, and its gradient with respect to the hidden state in the same pass.

    The loss is linear in these log-probabilities up to a factor per row, so the gradient can be made before the loss
    is known and scaled in the backward pass; logits of more than one chunk never exist. The head must be frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_R: Tensor,
        dtype: torch.dtype,
        metrics: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = hidden_RD.shape[0]
        weight_VD = weight_VD.to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        logp_R, logits_R, entropy_R, top1_R = (hidden_RD.new_zeros(rows, dtype=exact) for _ in range(4))
        wants_gradient = hidden_RD.requires_grad
        slope_RD = torch.empty_like(hidden_RD, dtype=exact) if wants_gradient else None
        chunk = max(1, LOGITS_AT_ONCE // weight_VD.shape[0])
        for start in range(0, rows, chunk):
            c = slice(start, start + chunk)
            logits_cV = nn.functional.linear(hidden_RD[c].to(dtype), weight_VD).to(exact)
            if bias_V is not None:
                logits_cV += bias_V.to(exact)
            if metrics:
                logits_R[c] = logits_cV.mean(-1)
                top1_R[c] = (logits_cV.argmax(-1) == target_R[c]).to(exact)
            logits_cV = logits_cV.log_softmax(-1)
            logp_R[c] = logits_cV.gather(-1, target_R[c, None])[:, 0]
            if not metrics and slope_RD is None:
                continue
            probability_cV = logits_cV.exp()
            if metrics:
                # as dot products: the elementwise product would be one more tensor of (rows, V)
                entropy_R[c] = -torch.bmm(probability_cV[:, None, :], logits_cV[:, :, None])[:, 0, 0]
            if slope_RD is not None:
                # d logp / d hidden = (onehot(target) - probability) W
                slope_cV = probability_cV.neg_().scatter_add_(
                    -1, target_R[c, None], probability_cV.new_ones(target_R[c].shape[0], 1)
                )
                slope_RD[c] = (slope_cV.to(dtype) @ weight_VD).to(exact)
        ctx.save_for_backward(slope_RD)
        ctx.hidden_dtype = hidden_RD.dtype
        ctx.mark_non_differentiable(logits_R, entropy_R, top1_R)
        return logp_R, logits_R, entropy_R, top1_R

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (slope_RD,) = ctx.saved_tensors
        return (gradients[0][:, None] * slope_RD).to(ctx.hidden_dtype), None, None, None, None, None
