"""Supervised tuning sends the chosen answers alone through the model, and computes what it would with both."""

from collections.abc import Sequence

import pytest
import tiny_run
import torch

from qlora_dpo.data.encoded import EncodedPair, without_rejected
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.metrics import REJECTED_METRICS, make_metric_sums
from qlora_dpo.preference.objective import compute_losses
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.recipe.objective import Sft

pytestmark = tiny_run.LIBRARIES_WARN

PAIRS = tiny_run.pairs(9)
CHOSEN = [without_rejected(pair) for pair in PAIRS]
LAYOUTS = [tiny_run.PADDED, tiny_run.PACKED, Packing(512, tiny_run.PAD, backend="batched")]


def asked(pairs: Sequence[EncodedPair], packing: Packing) -> tuple[torch.Tensor, torch.Tensor, dict[str, float], int]:
    """Losses (P,), the adapter's gradient of their mean, the logged means, and the tokens that were counted."""
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()))
    table, sums = Sft(loss_type="sft"), make_metric_sums(Sft(loss_type="sft"))
    found_P = torch.zeros(len(pairs))
    for group in micro_batches(pairs, packing):
        batch = collate([pairs[i] for i in group], packing)
        scores = score_batch(model, batch, tiny_run.CPU)
        losses = compute_losses(scores.with_reference(torch.zeros(len(group), 2)), table)
        (losses.total_P.sum() / len(pairs)).backward()
        sums.add_scores(scores, batch.tokens)
        sums.add_losses(losses)
        found_P[group] = losses.total_P.detach()
    return found_P, tiny_run.gradients(model), sums.means(), sums.tokens


@pytest.mark.parametrize("packing", LAYOUTS, ids=lambda packing: str(packing.backend))
def test_loss_and_gradient_are_those_of_both_answers_at_fewer_tokens(packing: Packing) -> None:
    loss_P, gradient, means, tokens = asked(CHOSEN, packing)
    whole_P, expected, before, more = asked(PAIRS, packing)
    torch.testing.assert_close(loss_P, whole_P, rtol=1e-5, atol=1e-5)
    assert tiny_run.apart(gradient, expected) < 1e-5
    assert tokens == sum(len(pair.prompt) + len(pair.chosen) for pair in PAIRS)
    assert more == tokens + sum(len(pair.prompt) + len(pair.rejected) for pair in PAIRS)
    # what is said of the chosen answers stays; of rejected ones nothing is said
    assert before.keys() - means.keys() == REJECTED_METRICS
    for name in means.keys() - {"entropy"}:
        assert means[name] == pytest.approx(before[name], rel=1e-4), name


@pytest.mark.parametrize("packing", LAYOUTS, ids=lambda packing: str(packing.backend))
def test_the_chosen_answers_alone_take_less_room(packing: Packing) -> None:
    room = {
        name: sum(collate([pairs[i] for i in group], packing).input_ids_BL.numel() for group in groups)
        for name, pairs in (("chosen", CHOSEN), ("both", PAIRS))
        for groups in (micro_batches(pairs, packing),)
    }
    alone = sum(len(pair.prompt) + len(pair.chosen) for pair in PAIRS)
    if packing.backend is None:
        assert alone <= room["chosen"] < room["both"]
    else:
        assert room["chosen"] <= alone < room["both"]


def test_a_padded_batch_takes_twice_as_many_chosen_answers_as_pairs() -> None:
    alike = [EncodedPair((1, 2, 3), (4, 5), (6, 7), row, bytes([row])) for row in range(8)]
    padded = Packing(4 * 6, tiny_run.PAD, backend=None)  # four rows of 5 tokens and one of padding
    assert list(map(len, micro_batches(alike, padded))) == [2, 2, 2, 2]
    assert list(map(len, micro_batches([without_rejected(pair) for pair in alike], padded))) == [4, 4]


def test_a_pair_keeps_its_identity_without_its_rejected_answer() -> None:
    assert [(pair.digest, pair.row, pair.rejected) for pair in CHOSEN] == [(p.digest, p.row, ()) for p in PAIRS]
