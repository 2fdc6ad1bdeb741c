"""Log-probabilities of the answers, from the states that predict an answer token only, in float32.

P pairs, S = 2P sequences, T = B x L tokens as laid out, R states that predict an answer token, N scored tokens, M
answer tokens of all sequences, V vocabulary, D width; c a chunk of states and n the scored tokens of that chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.model.decoder_layers import decoder_body, unwrap_peft
from qlora_dpo.model.device import Device
from qlora_dpo.model.gather import sum_rows
from qlora_dpo.model.quantized import dense_weight
from qlora_dpo.preference.objective import Logps, LossColumns
from qlora_dpo.preference.pack import MicroBatch

# of the vocabulary; a CPU wants 2^12 words of 256 states (4 MiB) in its cache, a GPU long products (64 MiB)
VOCAB_TILE = {"cpu": 2**12, "cuda": 2**16}


HEAD_METRICS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
"""What only the whole vocabulary tells, summed: mean logits over the tokens of either answer, nats of entropy over all
tokens, and how many tokens of the chosen answers are the likeliest ones."""


@dataclass(frozen=True)
class Scores:
    """What a forward pass says about P pairs. Only the first three carry gradients."""

    chosen_logp_P: Tensor  # nats, summed over the tokens of the answer that count
    rejected_logp_P: Tensor
    chosen_logp_all_P: Tensor  # nats, summed over the answer
    wpo_weight_P: Tensor | None  # how likely the model is to write both answers itself, as WPO weighs pairs
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    completion_tokens: tuple[int, int]  # of all chosen and of all rejected answers
    head_metrics_4: Tensor | None  # sums over tokens, as HEAD_METRICS names them; None if nobody wanted them

    def with_reference(self, reference_P2: Tensor, columns: LossColumns | None = None) -> Logps:
        """What a loss is given: these log-probabilities beside the reference's, and what the data says of the pairs."""
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
    model: nn.Module, batch: MicroBatch, device: Device, *, metrics: bool = True, wpo_weights: bool = False
) -> Scores:
    """Run `batch` through `model` once and sum the log-probabilities of each answer.

    Without `metrics` there are no HEAD_METRICS: the reference needs none, and on a T4 they take 8 ms of a row. With
    `likely`, it is said how likely the model is to write each pair's answers itself (Zhou et al. 2024, eq. 2).
    """
    head = unwrap_peft(model).get_output_embeddings()
    weight_VD = dense_weight(head, device.torch_dtype)
    logp_N, logits_R, entropy_R, top1_N, squares_R = _ChunkedLogps.apply(  # type: ignore[no-untyped-call]
        hidden_states(model, batch, device), weight_VD, head.bias, batch, metrics, wpo_weights
    )
    row_M = batch.row_N[batch.scored_M]
    chosen = batch.pairs
    # tokens of a sequence stand together; index_add would sum them in another order every time on a GPU
    logp_M = logp_N[batch.scored_M]
    whole_S = sum_rows(logp_M, batch.tokens_S)
    logp_S, likely_P, figures_4 = whole_S, None, None
    if metrics:
        logits_S, entropy_S, top1_S = (
            sum_rows(each_M, batch.tokens_S) for each_M in (logits_R[row_M], entropy_R[row_M], top1_N[batch.scored_M])
        )
        figures_4 = torch.stack(
            [logits_S[:chosen].sum(), logits_S[chosen:].sum(), entropy_S.sum(), top1_S[:chosen].sum()]
        )
    if batch.weight_M is not None:
        logp_S = sum_rows(logp_M * batch.weight_M, batch.tokens_S)
    if wpo_weights:
        aligned_S = sum_rows(logp_M.detach() - squares_R[row_M], batch.tokens_S)
        likely_P = (aligned_S / batch.tokens_S).reshape(2, chosen).sum(0).exp()
    return Scores(
        chosen_logp_P=logp_S[:chosen],
        rejected_logp_P=logp_S[chosen:],
        chosen_logp_all_P=whole_S[:chosen],
        wpo_weight_P=likely_P,
        chosen_tokens_P=batch.tokens_S[:chosen],
        rejected_tokens_P=batch.tokens_S[chosen:],
        completion_tokens=batch.completion_tokens,
        head_metrics_4=figures_4,
    )


def hidden_states(model: nn.Module, batch: MicroBatch, device: Device) -> Tensor:
    """Run `batch` through all of `model` but its head: the hidden states (T, D)."""
    mask, layout = batch.attention_mask_BL, {}
    if batch.layout is not None:
        # transformers takes a mask of four dimensions as it is, and packed attention needs none
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


class _ChunkedLogps(torch.autograd.Function):
    """Log-probability of each scored token, and its gradient with respect to the hidden state in the same pass.

    The loss is linear in these log-probabilities up to a factor per token, so the gradient can be made before the loss
    is known and scaled in the backward pass; logits of more than one chunk never exist. The head must be frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        batch: MicroBatch,
        metrics: bool,
        likely: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        hidden_RD = hidden_TD[batch.state_R].to(weight_VD.dtype)
        wants_gradient = hidden_TD.requires_grad
        chunks = [
            _chunk(
                hidden_RD[states],
                weight_VD,
                bias_V,
                batch.row_N[tokens] - states.start,
                batch.target_N[tokens],
                metrics,
                wants_gradient,
                likely,
            )
            for states, tokens in batch.chunks
        ]
        logp_N, logits_R, entropy_R, top1_N, squares_R, others_RD = (
            torch.cat(parts) for parts in zip(*chunks, strict=True)
        )
        ctx.save_for_backward(others_RD, logp_N, weight_VD, batch.state_R, batch.row_N, batch.target_N, batch.tokens_R)
        ctx.hidden = hidden_TD.shape, hidden_TD.dtype
        ctx.mark_non_differentiable(logits_R, entropy_R, top1_N, squares_R)
        return logp_N, logits_R, entropy_R, top1_N, squares_R

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor, *unused: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """With p the probability of a token and W its row of the head, d logp / d hidden = W_target - sum of p W.

        The sum over tokens that are not scored was made in the forward pass; those that are come on top of it here, so
        that 1 - p keeps its digits where p is almost 1.
        """
        others_RD, logp_N, weight_VD, state_R, row_N, target_N, tokens_R = ctx.saved_tensors
        shape, dtype = ctx.hidden
        gradient_R = sum_rows(gradient_N, tokens_R)
        slope_RD = others_RD * -gradient_R[:, None]
        factor_N = gradient_N - gradient_R[row_N] * logp_N.exp()
        slope_RD += sum_rows(factor_N[:, None] * weight_VD[target_N].to(factor_N.dtype), tokens_R)
        slope_TD = torch.zeros(shape, dtype=dtype, device=gradient_N.device)
        slope_TD[state_R] = slope_RD.to(dtype)
        return slope_TD, None, None, None, None, None


def _chunk(
    hidden_cD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    row_n: Tensor,
    target_n: Tensor,
    metrics: bool,
    wants_gradient: bool,
    likely: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For some states: log-probabilities and top-1 of n; mean logit, entropy and log of the sum of squared
    probabilities of c; and (c, D) for the gradient.

    The vocabulary comes in tiles (v words). Sums of exponentials are kept relative to the largest logit so far and
    rescaled when a larger one comes, as flash attention does (Dao et al. 2022, algorithm 1).
    """
    exact = torch.promote_types(hidden_cD.dtype, torch.float32)
    states, vocabulary = len(hidden_cD), len(weight_VD)
    top_c = hidden_cD.new_full((states,), -torch.inf, dtype=exact)
    best_c = torch.zeros(states, dtype=torch.long, device=hidden_cD.device)
    total_c, logits_c, weighted_c, squares_c = (torch.zeros_like(top_c) for _ in range(4))
    target_logit_n = top_c.new_zeros(len(target_n))
    others_cD = torch.zeros_like(hidden_cD, dtype=exact)
    words = VOCAB_TILE[hidden_cD.device.type]
    for start in range(0, vocabulary, words):
        tile_vD = weight_VD[start : start + words]
        logits_cv = nn.functional.linear(hidden_cD, tile_vD).to(exact)
        if bias_V is not None:
            logits_cv += bias_V[start : start + words].to(exact)
        column_n = target_n - start
        # a mask would make the host wait for the GPU, to learn how many tokens there are
        inside_n = (column_n >= 0) & (column_n < len(tile_vD))
        place = row_n, column_n.clamp(0, len(tile_vD) - 1)
        target_logit_n = torch.where(inside_n, logits_cv[place], target_logit_n)
        if metrics:
            most_c, where_c = logits_cv.max(-1)
            best_c = torch.where(most_c > top_c, where_c + start, best_c)
        most_c = torch.maximum(logits_cv.amax(-1), top_c)
        shrink_c, top_c = torch.exp(top_c - most_c), most_c
        share_cv = (logits_cv - top_c[:, None]).exp_()
        total_c = total_c * shrink_c + share_cv.sum(-1)
        if metrics:
            logits_c += logits_cv.sum(-1)
            weighted_c = weighted_c * shrink_c + torch.linalg.vecdot(share_cv, logits_cv)
        if likely:
            squares_c = squares_c * shrink_c.square() + torch.linalg.vecdot(share_cv, share_cv)
        if wants_gradient:
            _subtract_at(share_cv, place, torch.where(inside_n, share_cv[place], 0))
            others_cD.mul_(shrink_c[:, None]).add_(share_cv.to(hidden_cD.dtype) @ tile_vD)
    log_total_c = top_c + total_c.log()
    return (
        target_logit_n - log_total_c[row_n],
        logits_c / vocabulary,
        (log_total_c - weighted_c / total_c) if metrics else weighted_c,
        (best_c[row_n] == target_n).to(exact),  # of no meaning without `metrics`
        (squares_c.log() - 2 * total_c.log()) if likely else squares_c,
        others_cD.div_(total_c[:, None]),
    )


def _subtract_at(x_cv: Tensor, place: tuple[Tensor, Tensor], amount_n: Tensor) -> None:
    """Take `amount_n` off the numbers at `place`, of which at most one amount for each is not 0."""
    row_n, column_n = place
    x_cv.view(-1).index_add_(0, row_n * x_cv.shape[1] + column_n, amount_n, alpha=-1)
