"""Scores held-out pairs and plain text with an adapter and with its base.

P pairs. Log-probabilities are sums over an answer, in nats; 2 columns: chosen, rejected.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair, TokenIds, digest_ids, have_rejected
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.preference.kl import kl_to_base
from qlora_dpo.preference.logps import HEAD_METRICS, score_batch
from qlora_dpo.preference.metrics import TIE_MARGIN
from qlora_dpo.preference.objective import Logps, LossColumns, compute_losses, concat_logps, uses_wpo_weighting
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.preference.reference import compute_reference_logps, model_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.preference.token_weights import TokenWeighting, make_token_weighting
from qlora_dpo.recipe.objective import Objective, reward_beta

MAX_TEXT_WINDOW = 1024
"""Tokens of plain text in one window, unless the model's context is shorter."""

AdvanceFn = Callable[[int], None]


@dataclass(frozen=True)
class EvalPairs:
    """Held-out pairs, the columns that the objective reads, and the objective itself."""

    encoded: Sequence[EncodedPair]
    columns: LossColumns
    objective: Objective


@dataclass(frozen=True)
class AdapterScores:
    """Scores of every pair, in float64 on the CPU and in the order of the pairs."""

    loss_P: Tensor
    preference_P: Tensor
    rewards_P2: Tensor
    """Implicit rewards as the objective defines them; beta * log(pi/pi_ref) for most."""
    correct_P: Tensor
    """1 if the chosen answer has the higher reward, 0 if the rejected one has it, 0.5 for a tie."""
    tie_P: Tensor
    tuned_logp_P2: Tensor
    base_logp_P2: Tensor
    """Log-probabilities of whole answers, with every token counted once."""
    tokens_P2: Tensor
    kl: float
    """KL(tuned || base) on chosen answers, in nats per token."""
    token_accuracy: float | None = None
    """Share of the answers' tokens that the tuned model ranks first; None for pairs, whose answers are compared."""

    @property
    def margins(self) -> Tensor:
        """Chosen less rejected reward, (P,)."""
        return self.rewards_P2[:, 0] - self.rewards_P2[:, 1]


@torch.no_grad()
def score_adapter(
    model: nn.Module,
    pairs: EvalPairs,
    packing: Packing,
    open_cache: Callable[[TokenWeighting | None], ReferenceLogpCache],
    device: Device,
    advance: AdvanceFn = lambda pairs: None,
) -> AdapterScores:
    """Score `pairs` with `model`, which is in evaluation mode, with its adapter enabled and disabled.

    `open_cache` returns the cache of the base's log-probabilities for a token weighting. `advance` is called with
    numbers of pairs that sum to three times their total.
    """
    encoded, objective = pairs.encoded, pairs.objective
    weighting = make_token_weighting(objective)
    weighted_packing = replace(packing, token_weighting=weighting)
    reference_P2 = compute_reference_logps(model, encoded, open_cache(weighting), weighted_packing, device, advance)
    base_P2 = reference_P2
    if weighting is not None:
        base_P2 = compute_reference_logps(model, encoded, open_cache(None), packing, device)
    parts, order, unweighted = list[Logps](), list[int](), list[Tensor]()
    is_compared, num_top1 = have_rejected(encoded), 0.0
    for group in micro_batches(encoded, packing):
        group_pairs = [encoded[index] for index in group]
        scores = score_batch(
            model,
            collate(group_pairs, weighted_packing).to(device.torch_device),
            device,
            metrics=not is_compared,
            wpo_weights=uses_wpo_weighting(objective),
        )
        columns = pairs.columns.select(group).to(device.torch_device)
        parts.append(scores.with_reference(reference_P2[group].to(device.torch_device), columns))
        if weighting is not None:
            unweighted.append(model_logps(model, group_pairs, packing, device))
        if scores.head_metrics_4 is not None:
            num_top1 += float(scores.head_metrics_4[HEAD_METRICS.index("mean_token_accuracy")])
        order += group
        advance(len(group))
    original_order = torch.tensor(order).argsort()
    logps = concat_logps(parts)
    losses = compute_losses(logps, objective)
    tuned_P2 = torch.cat(unweighted) if unweighted else torch.stack([logps.chosen_logp_P, logps.rejected_logp_P], 1)
    rewards_P2 = losses.rewards_P2.cpu()[original_order]
    # in float32, as the evaluations during training
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    tie_P = margin_P.abs() <= reward_beta(objective) * TIE_MARGIN
    tokens_P2 = torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in encoded])
    kl = kl_to_base(model, encoded, packing, device, max_pairs=None)
    advance(len(encoded))
    return AdapterScores(
        loss_P=losses.total_P.cpu()[original_order].double(),
        preference_P=losses.preference_P.cpu()[original_order].double(),
        rewards_P2=rewards_P2.double(),
        correct_P=torch.where(tie_P, 0.5, (margin_P > 0).double()),
        tie_P=tie_P,
        tuned_logp_P2=tuned_P2.cpu()[original_order].double(),
        base_logp_P2=base_P2.double(),
        tokens_P2=tokens_P2,
        kl=kl,
        token_accuracy=None if is_compared else num_top1 / int(tokens_P2.sum()),
    )


@dataclass(frozen=True)
class TextLogps:
    """Log-probabilities of a text under base and tuned model, in nats, summed over its scored tokens."""

    base_logp: float
    tuned_logp: float
    tokens: int


def text_windows(ids: TokenIds, window: int) -> list[EncodedPair]:
    """Split a text into independent windows of `window` tokens, each encoded as an answer to its first token.

    The rejected answer is the window's second token, which adds nothing to a packed row. A last window of one token is
    dropped.
    """
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    parts = [(tokens[:1], tokens[1:], tokens[1:2]) for tokens in windows if len(tokens) > 1]
    return [EncodedPair(*part, number, digest_ids(*part)) for number, part in enumerate(parts, 1)]


@torch.no_grad()
def score_text(model: nn.Module, windows: Sequence[EncodedPair], packing: Packing, device: Device) -> TextLogps:
    """Score the `text_windows` of a text with the adapter enabled and disabled."""
    base = tuned = 0.0
    for group in micro_batches(windows, packing):
        group_windows = [windows[index] for index in group]
        tuned += float(model_logps(model, group_windows, packing, device)[:, 0].double().sum())
        with adapter_disabled(model):
            base += float(model_logps(model, group_windows, packing, device)[:, 0].double().sum())
    return TextLogps(base, tuned, sum(len(window.chosen) for window in windows))
