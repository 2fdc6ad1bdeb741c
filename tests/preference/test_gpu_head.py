"""The output head alone, hidden states given: log-probabilities and gradients against float64, the same every time."""

from typing import Any

import kernel_devices
import pytest
import tiny_run
import torch
from kernel_devices import PLACES, Where, apart
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.model.output_head import LogitMap
from qlora_dpo.preference import logps
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import Packing, collate

WIDTH = 64
WORDS = {"cpu": 2**12 + 100, "cuda": 2**16 + 100}
"""One more tile of words than the first."""
# what is summed are rounded logits, each rounded alone: fp16 keeps 10 of them to 0.004, bf16 to 0.03
LOGP = {"fp32": 5e-6, "fp16": 2e-4, "bf16": 1e-3}
SLOPE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}


class Headed(nn.Module):
    """A model of which there is only the head."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head
        head.logit_map = LogitMap()  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def pairs() -> list[EncodedPair]:
    """More states than the head takes at once, and a prompt that many answers follow, with a state for all of them."""
    (common, *_) = tiny_run.pairs(1, longest_prompt=9)
    many = tiny_run.pairs(40, seed=2, longest_prompt=20, longest_answer=40)
    return [
        *many,
        *(EncodedPair(common.prompt, each.chosen, each.rejected, each.row, each.digest) for each in many[:12]),
    ]


def asked(place: Device, words: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Tensor, nn.Linear]:
    """A batch on the device, hidden states that want a gradient, and a head."""
    generator = torch.Generator().manual_seed(0)
    batch = collate(pairs(), Packing(100_000, 0, "batched"))
    hidden_TD = torch.randn(batch.input_ids_BL.numel(), WIDTH, generator=generator).to(place.torch_dtype)
    head = nn.Linear(WIDTH, words, bias=False)
    head.weight.data = (0.3 * torch.randn(words, WIDTH, generator=generator)).to(place.torch_dtype)
    leaf_TD = hidden_TD.to(place.torch_device).requires_grad_()
    monkeypatch.setattr(logps, "hidden_states", lambda model, batch, device: leaf_TD)
    return batch.to(place.torch_device), leaf_TD, head.requires_grad_(False).to(place.torch_device)


def answered(place: Device, batch: Any, leaf_TD: Tensor, head: nn.Linear, weight_S: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all answers, and the hidden states' gradient of their weighed sum."""
    leaf_TD.grad = None
    scores = score_batch(Headed(head), batch, place)
    logp_S = torch.cat([scores.chosen_logp_P, scores.rejected_logp_P])
    (weight_S.to(logp_S.device) * logp_S).sum().backward()
    assert leaf_TD.grad is not None
    return logp_S.detach(), leaf_TD.grad


def in_float64(batch: Any, leaf_TD: Tensor, head: nn.Linear, weight_S: Tensor) -> tuple[Tensor, Tensor]:
    """The same by log-softmax over full logits."""
    hidden_TD = leaf_TD.detach().cpu().double().requires_grad_()
    state_R, row_N, target_N, scored_M = (
        each.cpu() for each in (batch.state_R, batch.row_N, batch.target_N, batch.scored_M)
    )
    logp_RV = (hidden_TD[state_R] @ head.weight.cpu().double().T).log_softmax(-1)
    logp_S = torch.stack([part.sum() for part in logp_RV[row_N, target_N][scored_M].split(batch.tokens_S.tolist())])
    (weight_S * logp_S).sum().backward()
    assert hidden_TD.grad is not None
    return logp_S.detach(), hidden_TD.grad


@PLACES
def test_log_probabilities_and_gradients_are_those_of_full_logits_in_float64(
    where: Where, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = kernel_devices.chosen(where, dtype)
    batch, leaf_TD, head = asked(place, WORDS[where], monkeypatch)
    assert len(batch.state_R) > 2 * 256
    weight_S = torch.linspace(-1, 2, 2 * len(pairs()))
    found, expected = answered(place, batch, leaf_TD, head, weight_S), in_float64(batch, leaf_TD, head, weight_S)
    assert apart(found[0], expected[0]) < LOGP[dtype]
    assert apart(found[1], expected[1]) < SLOPE[dtype]


@PLACES
def test_the_head_gives_the_same_bits_every_time(where: Where, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = kernel_devices.chosen(where, dtype)
    batch, leaf_TD, head = asked(place, 1000, monkeypatch)
    weight_S = torch.linspace(-1, 2, 2 * len(pairs()))
    first, *others = (answered(place, batch, leaf_TD, head, weight_S) for _ in range(4))
    for other in others:
        assert torch.equal(other[0], first[0])
        assert torch.equal(other[1], first[1])
