"""Micro-batches: every pair once, within the budget, similar lengths together, and answers where they belong."""

import jobs
import pytest

from qlora_dpo.data.encode import EncodedPair
from qlora_dpo.preference.pack import collate, longest, micro_batches, padded

PAIR = EncodedPair(prompt=(5, 6, 7), chosen=(8, 9), rejected=(10,), row=1, digest=b"1")
SHORT = EncodedPair(prompt=(11,), chosen=(12,), rejected=(13, 14), row=2, digest=b"2")


@pytest.mark.parametrize("budget", [1, 60, 128, 400, 100_000])
def test_every_pair_is_in_exactly_one_micro_batch(budget: int) -> None:
    groups = micro_batches(jobs.pairs(50), budget)
    assert sorted(index for group in groups for index in group) == list(range(50))


@pytest.mark.parametrize("budget", [60, 128, 400])
def test_a_micro_batch_with_its_padding_stays_within_the_budget(budget: int) -> None:
    pairs = jobs.pairs(50)
    sizes = [
        collate([pairs[i] for i in group], jobs.PAD).input_ids_SL.numel() for group in micro_batches(pairs, budget)
    ]
    assert max(sizes) <= budget


def test_a_pair_larger_than_the_budget_makes_a_micro_batch_of_its_own() -> None:
    assert micro_batches([SHORT, PAIR, SHORT], token_budget=11) == [[1], [0], [2]]


def test_micro_batches_are_cut_from_the_longest_pair_down() -> None:
    pairs = jobs.pairs(50)
    lengths = [longest(pairs[i]) for group in micro_batches(pairs, 128) for i in group]
    assert lengths == sorted(lengths, reverse=True)


def test_a_micro_batch_is_filled_before_the_next_begins() -> None:
    pairs, budget = jobs.pairs(50), 128
    groups = micro_batches(pairs, budget)
    for group in groups[:-1]:
        assert 2 * (len(group) + 1) * padded(pairs[group[0]]) > budget


def test_no_pairs_make_no_micro_batches() -> None:
    assert micro_batches([], 128) == []


def test_a_batch_holds_all_chosen_then_all_rejected_sequences_right_padded() -> None:
    batch = collate([PAIR, SHORT], pad_token_id=0)
    assert batch.input_ids_SL.tolist() == [
        [5, 6, 7, 8, 9, 0],
        [11, 12, 0, 0, 0, 0],
        [5, 6, 7, 10, 0, 0],
        [11, 13, 14, 0, 0, 0],
    ]
    assert batch.attention_mask_SL.sum(1).tolist() == [5, 2, 4, 3]
    assert (batch.pairs, batch.tokens) == (2, 14)


def test_an_answer_is_predicted_from_the_last_prompt_token_on() -> None:
    batch = collate([PAIR, SHORT], pad_token_id=0)
    inputs = batch.input_ids_SL.flatten()[batch.row_R].tolist()
    assert list(zip(inputs, batch.target_R.tolist(), batch.sequence_R.tolist(), strict=True)) == [
        (7, 8, 0),
        (8, 9, 0),
        (11, 12, 1),
        (7, 10, 2),
        (11, 13, 3),
        (13, 14, 3),
    ]
