"""Packed rows and padded batches: every pair once, within the budget, what is shared once, answers in their place."""

from dataclasses import replace

import pytest
import tiny_run

from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.model.packed.attention import Span
from qlora_dpo.preference.pack import MicroBatch, Packing, collate, max_sequence_tokens, micro_batches, padded_length


def pair(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> EncodedPair:
    return EncodedPair(prompt, chosen, rejected, 1, digest_ids(prompt, chosen, rejected))


PAIR = pair((5, 6, 7), (8, 9), (10,))
SHORT = pair((11,), (12,), (13, 14))
LAYOUTS = pytest.mark.parametrize("layout", [tiny_run.PACKED, tiny_run.PADDED], ids=["packed", "padded"])


def within(packing: Packing, token_budget: int) -> Packing:
    return replace(packing, token_budget=token_budget)


def size(pairs: list[EncodedPair], group: list[int], packing: Packing) -> int:
    return collate([pairs[i] for i in group], packing).input_ids_BL.numel()


@LAYOUTS
@pytest.mark.parametrize("budget", [1, 60, 128, 400, 100_000])
def test_every_pair_is_in_exactly_one_micro_batch(budget: int, layout: Packing) -> None:
    groups = micro_batches(tiny_run.pairs(50), within(layout, budget))
    assert sorted(index for group in groups for index in group) == list(range(50))


@LAYOUTS
@pytest.mark.parametrize("budget", [60, 128, 400])
def test_a_micro_batch_stays_within_the_budget(budget: int, layout: Packing) -> None:
    pairs = tiny_run.pairs(50)
    groups = micro_batches(pairs, within(layout, budget))
    assert max(size(pairs, group, layout) for group in groups) <= budget


@LAYOUTS
def test_a_pair_larger_than_the_budget_makes_a_micro_batch_of_its_own(layout: Packing) -> None:
    groups = micro_batches([SHORT, PAIR, SHORT], within(layout, 5))
    assert sorted(groups) == [[0], [1], [2]]


@LAYOUTS
def test_no_pairs_make_no_micro_batches(layout: Packing) -> None:
    assert micro_batches([], layout) == []


def test_padded_batches_are_cut_from_the_longest_pair_down_and_filled_before_the_next_begins() -> None:
    pairs, budget = tiny_run.pairs(50), 128
    groups = micro_batches(pairs, within(tiny_run.PADDED, budget))
    lengths = [max_sequence_tokens(pairs[i]) for group in groups for i in group]
    assert lengths == sorted(lengths, reverse=True)
    for group in groups[:-1]:
        assert 2 * (len(group) + 1) * padded_length(pairs[group[0]]) > budget


def test_pairs_of_one_prompt_come_into_one_row() -> None:
    pairs = [pair((1, 2), (3,), (4,)), pair((7, 8), (3,), (4,)), pair((1, 2), (5,), (6,)), pair((7, 8), (5,), (6,))]
    assert micro_batches(pairs, within(tiny_run.PACKED, 6)) == [[0, 2], [1, 3]]


def test_a_padded_batch_holds_all_chosen_then_all_rejected_sequences() -> None:
    batch = collate([PAIR, SHORT], tiny_run.PADDED)
    assert batch.input_ids_BL.tolist() == [
        [5, 6, 7, 8, 9, 0],
        [11, 12, 0, 0, 0, 0],
        [5, 6, 7, 10, 0, 0],
        [11, 13, 14, 0, 0, 0],
    ]
    assert batch.attention_mask_BL is not None
    assert batch.attention_mask_BL.sum(1).tolist() == [5, 2, 4, 3]
    assert (batch.pairs, batch.tokens) == (2, 14)


def test_in_a_row_each_prompt_stands_once_and_positions_restart() -> None:
    batch = collate([PAIR, SHORT], tiny_run.PACKED)
    #                                        prompt  chosen rejected  prompt, chosen  rejected
    assert batch.input_ids_BL.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    assert batch.layout is not None
    assert batch.layout.spans == (Span(0, 5), Span(5, 6, ((0, 3),)), Span(6, 8), Span(8, 10, ((6, 7),)))
    assert (batch.pairs, batch.tokens) == (2, 14)


def test_what_several_sequences_begin_with_stands_once() -> None:
    system, question = (1, 2, 3), (4, 5)
    first = pair(system + question, (6, 7), (6, 8))
    second = pair(system + question + (6, 7, 9), (10,), (11,))  # a later turn of the same dialogue
    other = pair((*system, 20), (21,), (22,))
    row = collate([other, second, first], tiny_run.PACKED)
    assert sorted(row.input_ids_BL[0].tolist()) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22]


def test_two_equal_pairs_take_no_more_tokens_than_one() -> None:
    row = collate([PAIR, PAIR], tiny_run.PACKED)
    assert row.input_ids_BL.tolist() == collate([PAIR], tiny_run.PACKED).input_ids_BL.tolist()
    assert answers_of(row) == [[(7, 8), (8, 9)], [(7, 8), (8, 9)], [(7, 10)], [(7, 10)]]


def answers_of(batch: MicroBatch) -> list[list[tuple[int, int]]]:
    """For each sequence, the answer's tokens as (the token they are predicted from, the token)."""
    inputs = batch.input_ids_BL.flatten()[batch.state_R]
    both = [(int(inputs[row]), int(target)) for row, target in zip(batch.row_N, batch.target_N, strict=True)]
    return [[both[n] for n in part] for part in batch.scored_M.split(batch.tokens_S.tolist())]


@LAYOUTS
def test_an_answer_is_predicted_from_the_last_prompt_token_on(layout: Packing) -> None:
    assert answers_of(collate([PAIR, SHORT], layout)) == [
        [(7, 8), (8, 9)],
        [(11, 12)],
        [(7, 10)],
        [(11, 13), (13, 14)],
    ]


def test_a_state_that_predicts_the_first_token_of_both_answers_is_scored_once() -> None:
    batch = collate([PAIR, SHORT], tiny_run.PACKED)
    assert len(batch.state_R) == 4
    assert len(batch.target_N) == 6
    assert batch.state_R.tolist() == sorted(batch.state_R.tolist())
    assert batch.row_N.tolist() == sorted(batch.row_N.tolist())


def test_a_long_span_is_computed_in_tiles_that_see_what_came_before() -> None:
    assert list(Span(10, 35, ((0, 4),)).tiles(10)) == [
        Span(10, 20, ((0, 4),)),
        Span(20, 30, ((0, 4), (10, 20))),
        Span(30, 35, ((0, 4), (10, 30))),
    ]
