"""Which pairs a step sees: all of them once an epoch, in an order that seed and epoch alone decide."""

import pytest

from qlora_dpo.recipe.train import TrainTable
from qlora_dpo.training.data_order import epoch_permutation, make_data_order


def test_an_epoch_sees_every_pair_once_and_ends_with_a_smaller_step() -> None:
    plan = make_data_order(10, TrainTable(batch_size=4))
    steps = [plan.batch_indices(step) for step in range(1, plan.total_steps + 1)]
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(index for step in steps for index in step) == list(range(10))


def test_each_epoch_has_an_order_of_its_own() -> None:
    plan = make_data_order(40, TrainTable(batch_size=8, num_train_epochs=2))
    first, second = plan.flat_indices[:40], plan.flat_indices[40:]
    assert first != second
    assert sorted(first) == sorted(second) == list(range(40))


def test_the_order_depends_on_the_seed_and_on_nothing_drawn_before() -> None:
    assert epoch_permutation(40, seed=1, epoch=3) == epoch_permutation(40, seed=1, epoch=3)
    assert epoch_permutation(40, seed=1, epoch=3) != epoch_permutation(40, seed=2, epoch=3)


def test_a_larger_max_steps_leaves_the_earlier_steps_as_they_are() -> None:
    short, long = (make_data_order(10, TrainTable(batch_size=4, num_train_epochs=3, max_steps=n)) for n in (2, 7))
    assert (short.total_steps, long.total_steps) == (2, 7)
    assert long.flat_indices[: len(short.flat_indices)] == short.flat_indices


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 7])
def test_what_a_run_sees_is_each_pair_of_its_steps_once(max_steps: int) -> None:
    plan = make_data_order(10, TrainTable(batch_size=4, num_train_epochs=3, max_steps=max_steps))
    assert plan.seen_indices.tolist() == sorted(set(plan.flat_indices))


@pytest.mark.parametrize(("max_steps", "total"), [(None, 9), (5, 5), (100, 9)])
def test_max_steps_shortens_a_run_and_never_lengthens_it(max_steps: int | None, total: int) -> None:
    assert make_data_order(10, TrainTable(batch_size=4, num_train_epochs=3, max_steps=max_steps)).total_steps == total


def test_epochs_are_counted_in_steps_of_that_epoch() -> None:
    plan = make_data_order(10, TrainTable(batch_size=4, num_train_epochs=2))
    assert [plan.ends_epoch(step) for step in range(1, 7)] == [False, False, True, False, False, True]
    assert (plan.epoch(0), plan.epoch(3), plan.epoch(6)) == (0.0, 1.0, 2.0)
