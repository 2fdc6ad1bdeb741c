"""Against plain loops in float64: log-probabilities, losses, their limits and slopes; chat asks as training taught."""

import math
import random

import architectures
import pytest
import tiny
import tiny_run
import torch

from qlora_dpo.data.encode import encode_pairs
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.model.packed import attention
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import Logps, compute_losses, dpo
from qlora_dpo.preference.pack import collate, micro_batches
from qlora_dpo.recipe.objective import Sigmoid
from qlora_dpo.talk.generate import tokenize_prompt

pytestmark = tiny_run.LIBRARIES_WARN


def log_probability(model: torch.nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """The answer's log-probability, token by token, in Python's own numbers."""
    total = 0.0
    for seen in range(len(answer)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer[:seen]])).logits[0, -1].tolist()
        largest = max(logits)
        total += logits[answer[seen]] - largest - math.log(sum(math.exp(each - largest) for each in logits))
    return total


def loss(margin: float, beta: float, label_smoothing: float = 0.0) -> float:
    """DPO of one pair by its definition; ln(1 + e^x) is x for a large x."""

    def softplus(x: float) -> float:
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    return (1 - label_smoothing) * softplus(-beta * margin) + label_smoothing * softplus(beta * margin)


@pytest.mark.parametrize("kind", list(architectures.CONFIGS))
def test_log_probabilities_of_packed_rows_are_those_of_plain_loops_in_float64(kind: str) -> None:
    pairs = tiny_run.pairs(5, seed=2)
    slow = architectures.made(architectures.CONFIGS[kind]).double()
    expected = [[log_probability(slow, p.prompt, answer) for answer in (p.chosen, p.rejected)] for p in pairs]
    model = architectures.made(architectures.CONFIGS[kind])
    attention.enable_packed_attention(model)
    found = torch.zeros(len(pairs), 2)
    for group in micro_batches(pairs, tiny_run.PACKED):
        scores = score_batch(model, collate([pairs[i] for i in group], tiny_run.PACKED), tiny_run.CPU)
        found[group] = torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], 1).detach()
    assert tiny_run.apart(found, torch.tensor(expected)) < 1e-5


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_the_objective_is_its_definition_in_float64(beta: float, label_smoothing: float) -> None:
    draw = random.Random(0)
    for _ in range(200):
        chosen, rejected, chosen_reference, rejected_reference = (draw.uniform(-200, 0) for _ in range(4))
        tokens = draw.randint(1, 50)
        table = Sigmoid(beta=beta, label_smoothing=label_smoothing, sft_weight=0.3)
        chosen_P, rejected_P, tokens_P = torch.tensor([chosen]), torch.tensor([rejected]), torch.tensor([tokens])
        reference_P2 = torch.tensor([[chosen_reference, rejected_reference]])
        found = compute_losses(Logps(chosen_P, rejected_P, tokens_P, tokens_P, reference_P2, chosen_P), table)
        margin = (chosen - chosen_reference) - (rejected - rejected_reference)
        assert found.preference_P.item() == pytest.approx(loss(margin, beta, label_smoothing), rel=1e-5, abs=2e-5)
        assert found.total_P.item() == pytest.approx(
            loss(margin, beta, label_smoothing) - 0.3 * chosen / tokens, rel=1e-5, abs=2e-5
        )


@pytest.mark.parametrize("margin", [-30.0, -1.0, 0.5, 12.0])
def test_the_limits_of_beta_and_label_smoothing(margin: float) -> None:
    margin_P = torch.tensor([margin], dtype=torch.float64)
    # beta to 0: no preference counts; beta to infinity: beta times how wrong the pair is, as a hinge
    assert dpo(margin_P, 1e-9).item() == pytest.approx(math.log(2), abs=1e-7)
    assert dpo(margin_P, 1e6).item() / 1e6 == pytest.approx(max(0.0, -margin), abs=1e-6)
    # half of the labels wrong: the loss no longer knows which answer is the chosen one
    assert dpo(margin_P, 0.3, 0.5).item() == pytest.approx(dpo(-margin_P, 0.3, 0.5).item())
    # the difference between a pair and its swap is the reward margin
    assert (dpo(-margin_P, 0.3) - dpo(margin_P, 0.3)).item() == pytest.approx(0.3 * margin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("margin", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_loss_and_slope_are_finite_and_right_at_any_margin(margin: float, dtype: torch.dtype) -> None:
    margin_P = torch.tensor([margin], dtype=dtype, requires_grad=True)
    loss_P = dpo(margin_P, 0.1)
    loss_P.sum().backward()
    assert margin_P.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert loss_P.item() == pytest.approx(loss(margin, 0.1), rel=tolerance, abs=tolerance)
    slope = -0.1 / (1 + math.exp(min(0.1 * margin, 700)))
    assert margin_P.grad.item() == pytest.approx(slope, rel=tolerance, abs=tolerance / 10)


def test_chat_asks_with_the_ids_that_training_taught() -> None:
    tokenizer = tiny.tokenizer()
    prompts = [
        ({"role": "user", "content": "Where is the library?"},),
        ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello  there\n"}),
        (
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "What can I eat? "},
        ),
    ]
    pairs = [Pair(prompt, "Rice.", "Nothing.", row, {}) for row, prompt in enumerate(prompts, 1)]
    for pair, encoded in zip(pairs, encode_pairs(pairs, tokenizer, detect_chat_format(tokenizer)), strict=True):
        assert isinstance(encoded, EncodedPair), encoded
        assert tuple(tokenize_prompt(tokenizer, list(pair.prompt))) == encoded.prompt
