"""The losses: log-probabilities in, one loss per pair out, in nats.

P pairs. `margin_P` is log(pi/pi_ref) of the chosen answer less that of the rejected one.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from qlora_dpo.recipe import DpoTable


@dataclass(frozen=True)
class Losses:
    """The parts of the objective and their weighted sum, one value per pair."""

    total_P: Tensor
    dpo_P: Tensor
    sft_P: Tensor


def dpo(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Rafailov et al. 2023, eq. 7; with `label_smoothing`, conservative DPO (Mitchell 2023, eq. 3). Nats per pair."""
    agree_P = -F.logsigmoid(beta * margin_P)
    flipped_P = -F.logsigmoid(-beta * margin_P)
    return (1 - label_smoothing) * agree_P + label_smoothing * flipped_P


def sft(chosen_logp_P: Tensor, chosen_tokens_P: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen answer per token (Pang et al. 2024, eq. 1, second term). Nats per token."""
    return -chosen_logp_P / chosen_tokens_P


def objective(
    chosen_logp_P: Tensor, rejected_logp_P: Tensor, chosen_tokens_P: Tensor, reference_P2: Tensor, table: DpoTable
) -> Losses:
    """The recipe's loss per pair; `reference_P2` holds the reference's log-probabilities, chosen and rejected."""
    margin_P = (chosen_logp_P - reference_P2[:, 0]) - (rejected_logp_P - reference_P2[:, 1])
    dpo_P = dpo(margin_P, table.beta, table.label_smoothing)
    sft_P = sft(chosen_logp_P, chosen_tokens_P)
    return Losses(total_P=dpo_P + table.sft_weight * sft_P, dpo_P=dpo_P, sft_P=sft_P)
