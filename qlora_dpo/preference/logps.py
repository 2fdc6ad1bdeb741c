"""Log-probabilities of completions in float32; the head runs on the states that predict a completion token only.

P pairs, S = 2P sequences, T = B x L tokens as laid out, R states that predict a completion token, N scored tokens, M
completion tokens of all sequences, V vocabulary, D width; c one chunk of states, n the scored tokens of that chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.model.decoder_layers import decoder_body, unwrap_peft
from qlora_dpo.model.device import Device
from qlora_dpo.model.output_head import LogitMap, logit_map_of
from qlora_dpo.model.packed.gather import sum_rows
from qlora_dpo.model.quantized import dense_weight
from qlora_dpo.preference.objective import Logps, LossColumns
from qlora_dpo.preference.pack import MicroBatch

# vocabulary entries at a time: on a CPU the logits of 256 states (4 MiB) stay in its cache, a GPU needs large products
# (64 MiB)
VOCAB_TILE = {"cpu": 2**12, "cuda": 2**16}


HEAD_METRICS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
"""Metrics that need the whole vocabulary, as sums over tokens: mean logits of the chosen and of the rejected
completions, entropy in nats of both, and the number of chosen completion tokens that have the largest logit."""


@dataclass(frozen=True)
class Scores:
    """The results of a forward pass over P pairs. Only the first three fields carry gradients."""

    chosen_logp_P: Tensor  # nats, the sum over the completion with its token weights
    rejected_logp_P: Tensor
    chosen_logp_all_P: Tensor  # nats, the sum over all tokens of the chosen completion
    wpo_weight_P: Tensor | None  # WPO's weight: the model's own likelihood of both completions
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    completion_tokens: tuple[int, int]  # of all chosen and of all rejected completions
    head_metrics_4: Tensor | None  # sums over tokens, in the order of HEAD_METRICS; None if not computed

    def with_reference(self, reference_P2: Tensor, columns: LossColumns | None = None) -> Logps:
        """The inputs of a loss: these log-probabilities, the reference's (P, 2) and the data's columns."""
        return Logps(
            self.chosen_logp_P,
            self.rejected_logp_P,
            self.chosen_tokens_P,
            self.rejected_tokens_P,
            reference_P2,
            self.chosen_logp_all_P,
            self.wpo_weight_P,
            columns,
        )


def score_batch(
    model: nn.Module,
    batch: MicroBatch,
    device: Device,
    *,
    metrics: bool = True,
    wpo_weights: bool = False,
    hidden_TD: Tensor | None = None,
) -> Scores:
    """Run `batch` through `model` once and sum the log-probabilities of each completion.

    `metrics=False` skips HEAD_METRICS: the reference needs none, and on a T4 they take 8 ms a row. `wpo_weights=True`
    adds the model's own likelihood of each pair's completions (Zhou et al. 2024, eq. 2). With the last hidden states
    (T, D) of `batch`, only the head is run.
    """
    head = unwrap_peft(model).get_output_embeddings()
    weight_VD = dense_weight(head, device.torch_dtype)
    logit_map = logit_map_of(model, device)
    if hidden_TD is None:
        hidden_TD = hidden_states(model, batch, device)
    logp_N, logits_R, entropy_R, top1_N, squares_R = _ChunkedLogps.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, head.bias, logit_map, batch, metrics, wpo_weights
    )
    row_M = batch.row_N[batch.scored_M]
    pairs = batch.pairs
    # a sequence's tokens are contiguous, so each sum has a fixed order; on a GPU that of index_add changes every time
    logp_M = logp_N[batch.scored_M]
    logp_all_S = sum_rows(logp_M, batch.tokens_S)
    logp_S, wpo_weight_P, head_metrics_4 = logp_all_S, None, None
    if metrics:
        logits_S, entropy_S, top1_S = (
            sum_rows(value_M, batch.tokens_S) for value_M in (logits_R[row_M], entropy_R[row_M], top1_N[batch.scored_M])
        )
        head_metrics_4 = torch.stack(
            [logits_S[:pairs].sum(), logits_S[pairs:].sum(), entropy_S.sum(), top1_S[:pairs].sum()]
        )
    if batch.weight_M is not None:
        logp_S = sum_rows(logp_M * batch.weight_M, batch.tokens_S)
    if wpo_weights:
        aligned_S = sum_rows(logp_M.detach() - squares_R[row_M], batch.tokens_S)
        wpo_weight_P = (aligned_S / batch.tokens_S).reshape(2, pairs).sum(0).exp()
    return Scores(
        chosen_logp_P=logp_S[:pairs],
        rejected_logp_P=logp_S[pairs:],
        chosen_logp_all_P=logp_all_S[:pairs],
        wpo_weight_P=wpo_weight_P,
        chosen_tokens_P=batch.tokens_S[:pairs],
        rejected_tokens_P=batch.tokens_S[pairs:],
        completion_tokens=batch.completion_tokens,
        head_metrics_4=head_metrics_4,
    )


def hidden_states(model: nn.Module, batch: MicroBatch, device: Device) -> Tensor:
    """Run `batch` through `model` without its head; the last hidden states (T, D)."""
    mask, layout = batch.attention_mask_BL, {}
    if batch.layout is not None:
        # transformers passes a four-dimensional mask on as it is; packed attention reads none
        mask, layout = batch.input_ids_BL.new_zeros(1, 1, 1, 1, dtype=torch.bool), {"layout": batch.layout}
    with device.autocast():
        hidden_BLD: Tensor = decoder_body(model)(
            input_ids=batch.input_ids_BL,
            position_ids=batch.position_ids_BL,
            attention_mask=mask,
            use_cache=False,
            **layout,
        ).last_hidden_state
    return hidden_BLD.flatten(0, 1)


def mean_answer_states(hidden_TD: Tensor, batch: MicroBatch) -> Tensor:
    """The mean over each completion of the hidden states that predict its tokens (P, 2, D), in float32."""
    states_MD = hidden_TD[batch.state_R][batch.row_N[batch.scored_M]].float()
    mean_SD = sum_rows(states_MD, batch.tokens_S) / batch.tokens_S[:, None].clamp(min=1)
    return mean_SD.reshape(-1, batch.pairs, mean_SD.shape[1]).transpose(0, 1)


class _ChunkedLogps(torch.autograd.Function):
    """Log-probability of each scored token, and its gradient with respect to the hidden state in the same pass.

    The backward pass only scales each token's gradient by the loss's derivative, so the gradient is computed in the
    forward pass, chunk by chunk; logits of more than one chunk never exist. The head must be frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        logit_map: LogitMap,
        batch: MicroBatch,
        metrics: bool,
        wpo_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        hidden_RD = hidden_TD[batch.state_R].to(weight_VD.dtype)
        if logit_map.input_scale != 1:
            hidden_RD = hidden_RD * logit_map.input_scale
        needs_grad = hidden_TD.requires_grad
        chunks = [
            _chunk(
                hidden_RD[states],
                weight_VD,
                bias_V,
                logit_map,
                batch.row_N[tokens] - states.start,
                batch.target_N[tokens],
                metrics,
                needs_grad,
                wpo_weights,
            )
            for states, tokens in batch.chunks
        ]
        logp_N, slope_N, logits_R, entropy_R, top1_N, squares_R, others_RD = (
            torch.cat(parts) for parts in zip(*chunks, strict=True)
        )
        ctx.save_for_backward(
            others_RD, logp_N, slope_N, weight_VD, batch.state_R, batch.row_N, batch.target_N, batch.tokens_R
        )
        ctx.hidden, ctx.logit_map = (hidden_TD.shape, hidden_TD.dtype), logit_map
        ctx.mark_non_differentiable(logits_R, entropy_R, top1_N, squares_R)
        return logp_N, logits_R, entropy_R, top1_N, squares_R

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor, *unused: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        """With p the probability of a token and W its row of the head, d logp / d hidden = W_target - sum of p W.

        Where the model maps its logits, each W counts with the slope of its own logit. The forward pass summed over the
        tokens that are not scored. The scored ones are added here, so that 1 - p keeps its digits where p is almost 1.
        """
        others_RD, logp_N, slope_N, weight_VD, state_R, row_N, target_N, tokens_R = ctx.saved_tensors
        shape, dtype = ctx.hidden
        gradient_R = sum_rows(gradient_N, tokens_R)
        grad_RD = others_RD * -gradient_R[:, None]
        factor_N = gradient_N - gradient_R[row_N] * logp_N.exp()
        if not ctx.logit_map.is_identity:
            factor_N = factor_N * slope_N
        grad_RD += sum_rows(factor_N[:, None] * weight_VD[target_N].to(factor_N.dtype), tokens_R)
        if ctx.logit_map.input_scale != 1:
            grad_RD *= ctx.logit_map.input_scale
        grad_TD = torch.zeros(shape, dtype=dtype, device=gradient_N.device)
        grad_TD[state_R] = grad_RD.to(dtype)
        return grad_TD, None, None, None, None, None, None


def _chunk(
    hidden_cD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    logit_map: LogitMap,
    row_n: Tensor,
    target_n: Tensor,
    metrics: bool,
    needs_grad: bool,
    wpo_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One chunk: log-probability (n), slope of the logit (n) and top-1 match (n) of the scored tokens; mean logit (c),
    entropy (c) and log of the sum of squared probabilities (c) of the states; probability-weighted rows of the head
    (c, D) for the gradient.

    The vocabulary is processed in tiles of v entries. Sums of exponentials are kept relative to the largest logit so
    far and rescaled when a larger one comes, as flash attention does (Dao et al. 2022, algorithm 1).
    """
    exact = torch.promote_types(hidden_cD.dtype, torch.float32)
    states, vocabulary = len(hidden_cD), len(weight_VD)
    top_c = hidden_cD.new_full((states,), -torch.inf, dtype=exact)
    best_c = torch.zeros(states, dtype=torch.long, device=hidden_cD.device)
    total_c, logits_c, weighted_c, squares_c = (torch.zeros_like(top_c) for _ in range(4))
    target_logit_n = top_c.new_zeros(len(target_n))
    others_cD = torch.zeros_like(hidden_cD, dtype=exact)
    tile_size = VOCAB_TILE[hidden_cD.device.type]
    for start in range(0, vocabulary, tile_size):
        tile_vD = weight_VD[start : start + tile_size]
        logits_cv = nn.functional.linear(hidden_cD, tile_vD).to(exact)
        if bias_V is not None:
            logits_cv += bias_V[start : start + tile_size].to(exact)
        logits_cv = logit_map.apply_(logits_cv)
        column_n = target_n - start
        # indexing with a mask would make the host wait for the GPU, for the number of tokens
        inside_n = (column_n >= 0) & (column_n < len(tile_vD))
        place = row_n, column_n.clamp(0, len(tile_vD) - 1)
        target_logit_n = torch.where(inside_n, logits_cv[place], target_logit_n)
        if metrics:
            max_c, argmax_c = logits_cv.max(-1)
            best_c = torch.where(max_c > top_c, argmax_c + start, best_c)
        max_c = torch.maximum(logits_cv.amax(-1), top_c)
        shrink_c, top_c = torch.exp(top_c - max_c), max_c
        share_cv = (logits_cv - top_c[:, None]).exp_()
        total_c = total_c * shrink_c + share_cv.sum(-1)
        if metrics:
            logits_c += logits_cv.sum(-1)
            weighted_c = weighted_c * shrink_c + torch.linalg.vecdot(share_cv, logits_cv)
        if wpo_weights:
            squares_c = squares_c * shrink_c.square() + torch.linalg.vecdot(share_cv, share_cv)
        if needs_grad:
            _subtract_at(share_cv, place, torch.where(inside_n, share_cv[place], 0))
            if not logit_map.is_identity:
                share_cv *= logit_map.slope_(logits_cv)
            others_cD.mul_(shrink_c[:, None]).add_(share_cv.to(hidden_cD.dtype) @ tile_vD)
    log_total_c = top_c + total_c.log()
    return (
        target_logit_n - log_total_c[row_n],
        target_logit_n if logit_map.is_identity else logit_map.slope_(target_logit_n.clone()),  # not read if identical
        logits_c / vocabulary,
        (log_total_c - weighted_c / total_c) if metrics else weighted_c,
        (best_c[row_n] == target_n).to(exact),  # meaningless without `metrics`
        (squares_c.log() - 2 * total_c.log()) if wpo_weights else squares_c,
        others_cD.div_(total_c[:, None]),
    )


def _subtract_at(x_cv: Tensor, place: tuple[Tensor, Tensor], amount_n: Tensor) -> None:
    """Subtract `amount_n` at `place`, in place; of several amounts for one element at most one is not 0."""
    row_n, column_n = place
    x_cv.view(-1).index_add_(0, row_n * x_cv.shape[1] + column_n, amount_n, alpha=-1)
