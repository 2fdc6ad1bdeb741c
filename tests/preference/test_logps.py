"""The answers' log-probabilities and their gradients, held against the model's full logits and plain autograd."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.model.output_head import LogitMap
from qlora_dpo.model.packed import attention
from qlora_dpo.preference import logps, pack
from qlora_dpo.preference.logps import Scores, score_batch
from qlora_dpo.preference.pack import collate

pytestmark = tiny_run.LIBRARIES_WARN

PAIRS = tiny_run.pairs(5)


def model_with(tied: bool, head_bias: bool) -> Any:
    """A tiny Qwen2 with an adapter that does something, and the given kind of output head."""
    base: Any = tiny.qwen2()
    generator = torch.Generator().manual_seed(7)
    if not tied:
        base.config.tie_word_embeddings = False
        base.lm_head.weight = nn.Parameter(0.1 * torch.randn(base.lm_head.weight.shape, generator=generator))
    if head_bias:
        base.lm_head.bias = nn.Parameter(0.5 * torch.randn(base.lm_head.out_features, generator=generator))
    base.requires_grad_(False)
    attention.enable_packed_attention(base)
    return tiny_run.stirred(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")))


def full_logits(model: Any, pairs: list[EncodedPair]) -> list[Tensor]:
    """For each sequence (chosen first), the model's own logits (T, V) that predict the answer's T tokens."""
    found = []
    for answers in ("chosen", "rejected"):
        for pair in pairs:
            answer = getattr(pair, answers)
            logits_LV = model(input_ids=torch.tensor([pair.prompt + answer])).logits[0].float()
            found.append(logits_LV[len(pair.prompt) - 1 : -1])
    return found


def plain_logps(model: Any, pairs: list[EncodedPair]) -> Tensor:
    """The same sums by log-softmax over full logits, (2P,)."""
    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return torch.stack(
        [
            logits_TV.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
            for logits_TV, answer in zip(full_logits(model, pairs), answers, strict=True)
        ]
    )


def ours(scores: Scores) -> Tensor:
    return torch.cat([scores.chosen_logp_P, scores.rejected_logp_P])


@pytest.fixture
def three_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that works in many small chunks of states and of words, the last of them incomplete."""
    monkeypatch.setattr(pack, "STATES_PER_CHUNK", 3)
    monkeypatch.setattr(logps, "VOCAB_TILE", {"cpu": 70})


HEADS = pytest.mark.parametrize(("tied", "head_bias"), [(True, False), (False, False), (False, True)])


@HEADS
def test_log_probabilities_are_those_of_the_full_logits(tied: bool, head_bias: bool, three_rows_at_once: None) -> None:
    model = model_with(tied, head_bias)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(score_batch(model, collate(PAIRS, tiny_run.PACKED), tiny_run.CPU)),
            plain_logps(model, PAIRS),
            rtol=1e-5,
            atol=1e-5,
        )


@HEADS
def test_gradients_are_those_of_autograd_through_full_logits(
    tied: bool, head_bias: bool, three_rows_at_once: None
) -> None:
    model = model_with(tied, head_bias)
    weight_S = torch.linspace(-1, 2, 2 * len(PAIRS))
    (weight_S * ours(score_batch(model, collate(PAIRS, tiny_run.PACKED), tiny_run.CPU))).sum().backward()
    chunked = tiny_run.gradients(model)
    model.zero_grad()
    (weight_S * plain_logps(model, PAIRS)).sum().backward()
    assert tiny_run.apart(chunked, tiny_run.gradients(model)) < 1e-5


@pytest.mark.parametrize(("states", "words"), [(1, 3), (3, 4), (100, 100)])
def test_the_heads_gradient_is_the_numeric_one(states: int, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "STATES_PER_CHUNK", states)
    monkeypatch.setattr(logps, "VOCAB_TILE", {"cpu": words})
    pair = EncodedPair((1, 2), (3, 4, 5), (3, 6), 1, b"")  # both answers begin alike: a state with two scored tokens
    batch = collate([pair], tiny_run.PACKED)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(batch.input_ids_BL.numel(), 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight_VD, bias_V = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((11, 5), (11,)))
    assert torch.autograd.gradcheck(
        lambda hidden: logps._ChunkedLogps.apply(hidden, weight_VD, bias_V, LogitMap(), batch, True, False)[0],
        hidden_TD,
    )


def test_log_probabilities_and_loss_terms_are_float32_under_bf16() -> None:
    place = tiny_run.device.select_device("bf16")
    scores = score_batch(
        tiny_run.stirred(tiny_run.fresh(tiny_run.recipe(), place)), collate(PAIRS, tiny_run.PACKED), place
    )
    assert scores.chosen_logp_P.dtype == scores.rejected_logp_P.dtype == torch.float32


@torch.no_grad()
def test_a_pair_has_the_same_log_probabilities_in_every_batch() -> None:
    model = model_with(tied=True, head_bias=False)
    longer = tiny_run.pairs(6, seed=9, longest_prompt=60)
    together = score_batch(model, collate([*PAIRS, *longer], tiny_run.PACKED), tiny_run.CPU)
    for index, pair in enumerate(PAIRS):
        alone = score_batch(model, collate([pair], tiny_run.PACKED), tiny_run.CPU)
        torch.testing.assert_close(together.chosen_logp_P[index], alone.chosen_logp_P[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.rejected_logp_P[index], alone.rejected_logp_P[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_the_padding_holds_does_not_matter() -> None:
    model = model_with(tied=True, head_bias=False)
    padded = [replace(tiny_run.PADDED, pad_token_id=pad) for pad in (0, 77)]
    first, second = (ours(score_batch(model, collate(PAIRS, packing), tiny_run.CPU)) for packing in padded)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_logits_entropy_and_token_accuracy_are_those_of_the_full_logits(three_rows_at_once: None) -> None:
    model = model_with(tied=False, head_bias=True)
    logits_TV = full_logits(model, PAIRS)
    # make some greedy guesses right: answer with what the model says
    pairs = [
        EncodedPair(pair.prompt, (int(guess[0].argmax()), *pair.chosen[1:]), pair.rejected, pair.row, pair.digest)
        for pair, guess in zip(PAIRS, logits_TV, strict=False)
    ]
    chosen, rejected = (torch.cat(part) for part in _halves(full_logits(model, pairs)))
    scores = score_batch(model, collate(pairs, tiny_run.PACKED), tiny_run.CPU)
    both = torch.cat([chosen, rejected]).log_softmax(-1)
    right = chosen.argmax(-1) == torch.tensor([token for pair in pairs for token in pair.chosen])
    assert scores.head_metrics_4 is not None
    chosen_logits, rejected_logits, entropy, top1 = scores.head_metrics_4.tolist()
    assert chosen_logits == pytest.approx(chosen.mean(-1).sum().item(), rel=1e-4)
    assert rejected_logits == pytest.approx(rejected.mean(-1).sum().item(), rel=1e-4)
    assert entropy == pytest.approx(-(both.exp() * both).sum().item(), rel=1e-5)
    assert top1 == right.sum().item() >= len(pairs)
    assert scores.chosen_tokens_P.tolist() == [len(pair.chosen) for pair in pairs]
    assert scores.rejected_tokens_P.tolist() == [len(pair.rejected) for pair in pairs]


def test_scoring_leaves_the_frozen_weights_without_gradients() -> None:
    model = model_with(tied=True, head_bias=False)
    ours(score_batch(model, collate(PAIRS, tiny_run.PACKED), tiny_run.CPU)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trainable_parameters(model))


def _halves(parts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return parts[: len(parts) // 2], parts[len(parts) // 2 :]
