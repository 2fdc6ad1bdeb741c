"""Examines an adapter: what it and its base say about every held-out pair, and about plain text.

P pairs. Log-probabilities are sums over an answer, in nats; 2 columns: chosen, rejected.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair, TokenIds, digest_ids
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.preference.kl import kl_to_base
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.metrics import TIE_MARGIN
from qlora_dpo.preference.objective import Logps, LossColumns, compute_losses, concat_logps, uses_wpo_weighting
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.preference.reference import compute_reference_logps, model_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.preference.token_weights import TokenWeighting, make_token_weighting
from qlora_dpo.recipe.objective import Objective, reward_beta

MAX_TEXT_WINDOW = 1024
"""Tokens of plain text that a model reads at once, if its positions reach so far."""

AdvanceFn = Callable[[int], None]


@dataclass(frozen=True)
class AdapterScores:
    """Every pair's figures in float64 on the CPU, in the order of the pairs."""

    loss_P: Tensor
    preference_P: Tensor
    rewards_P2: Tensor
    """Implicit rewards as the objective has them; beta times log(pi/pi_ref) for most."""
    correct_P: Tensor
    """1 if the chosen answer has the higher reward, 0 if the rejected one has, one half for a tie."""
    tie_P: Tensor
    tuned_logp_P2: Tensor
    base_logp_P2: Tensor
    """Log-probabilities of whole answers."""
    tokens_P2: Tensor
    kl: float
    """KL(tuned || base) on chosen answers, in nats per token."""

    @property
    def margins(self) -> Tensor:
        """By how much the reward of the chosen answer is higher, (P,)."""
        return self.rewards_P2[:, 0] - self.rewards_P2[:, 1]


@torch.no_grad()
def score_adapter(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    columns: LossColumns,
    table: Objective,
    packing: Packing,
    open_cache: Callable[[TokenWeighting | None], ReferenceLogpCache],
    device: Device,
    advance: AdvanceFn = lambda pairs: None,
) -> AdapterScores:
    """Ask `model`, in evaluation mode, with its adapter on and off; `advance` is told of each pair three times.

    `open_cache` gives the place where the base's answers are kept for a way of counting tokens.
    """
    weighed = make_token_weighting(table)
    counts = replace(packing, token_weighting=weighed)
    reference_P2 = compute_reference_logps(model, pairs, open_cache(weighed), counts, device, advance)
    base_P2 = reference_P2
    if weighed is not None:
        base_P2 = compute_reference_logps(model, pairs, open_cache(None), packing, device)
    parts, order, whole = list[Logps](), list[int](), list[Tensor]()
    for group in micro_batches(pairs, packing):
        some = [pairs[index] for index in group]
        scores = score_batch(
            model,
            collate(some, counts).to(device.torch_device),
            device,
            metrics=False,
            wpo_weights=uses_wpo_weighting(table),
        )
        beside = columns.select(group).to(device.torch_device)
        parts.append(scores.with_reference(reference_P2[group].to(device.torch_device), beside))
        if weighed is not None:
            whole.append(model_logps(model, some, packing, device))
        order += group
        advance(len(group))
    back = torch.tensor(order).argsort()
    everything = concat_logps(parts)
    losses = compute_losses(everything, table)
    tuned_P2 = torch.stack([everything.chosen_logp_P, everything.rejected_logp_P], 1).cpu()
    rewards_P2 = losses.rewards_P2.cpu()[back]
    # as training's own figures judge them: in float32
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    tie_P = margin_P.abs() <= reward_beta(table) * TIE_MARGIN
    kl = kl_to_base(model, pairs, packing, device, max_pairs=None)
    advance(len(pairs))
    return AdapterScores(
        loss_P=losses.total_P.cpu()[back].double(),
        preference_P=losses.preference_P.cpu()[back].double(),
        rewards_P2=rewards_P2.double(),
        correct_P=torch.where(tie_P, 0.5, (margin_P > 0).double()),
        tie_P=tie_P,
        tuned_logp_P2=(torch.cat(whole) if whole else tuned_P2)[back].double(),
        base_logp_P2=base_P2.double(),
        tokens_P2=torch.tensor([(len(pair.chosen), len(pair.rejected)) for pair in pairs]),
        kl=kl,
    )


@dataclass(frozen=True)
class TextLogps:
    """How well base and tuned model foretell a text: log-probabilities in nats, summed over its scored tokens."""

    base_logp: float
    tuned_logp: float
    tokens: int


def text_windows(ids: TokenIds, window: int) -> list[EncodedPair]:
    """A text in windows of `window` tokens that know nothing of each other, each as an answer to its first token.

    The other answer, the window's beginning, costs a packed row nothing. A last window of one token is left out.
    """
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    parts = [(each[:1], each[1:], each[1:2]) for each in windows if len(each) > 1]
    return [EncodedPair(*part, number, digest_ids(*part)) for number, part in enumerate(parts, 1)]


@torch.no_grad()
def score_text(model: nn.Module, windows: Sequence[EncodedPair], packing: Packing, device: Device) -> TextLogps:
    """Ask `model` about the `text_windows` a text with its adapter on and off."""
    base = tuned = 0.0
    for group in micro_batches(windows, packing):
        some = [windows[index] for index in group]
        tuned += float(model_logps(model, some, packing, device)[:, 0].double().sum())
        with adapter_disabled(model):
            base += float(model_logps(model, some, packing, device)[:, 0].double().sum())
    return TextLogps(base, tuned, sum(len(each.chosen) for each in windows))
