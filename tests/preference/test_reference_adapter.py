"""While the reference answers, the adapter is off or has other weights; and how those follow the policy."""

import math
from typing import Any

import pytest
import tiny_run
import torch
from trl.trainer.callbacks import SyncRefModelCallback

from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.preference.pack import collate
from qlora_dpo.preference.reference import (
    batch_reference_logps,
    compute_reference_logps,
    fresh_reference_logps,
    model_logps,
)
from qlora_dpo.preference.reference_adapter import (
    ADAPTER_OFF,
    ReferenceAdapter,
    as_reference,
    clone_adapter,
    sync_reference,
)
from qlora_dpo.recipe.reference import EmaReference

pytestmark = tiny_run.LIBRARIES_WARN

PAIRS = tiny_run.pairs(9)


def ema(alpha: float, steps: int) -> EmaReference:
    return EmaReference(kind="ema", ref_model_mixup_alpha=alpha, ref_model_sync_steps=steps)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=["lora", "dora", "dropout"])
def test_held_weights_answer_as_the_model_that_has_them(quantization: str, lora: dict[str, Any]) -> None:
    what = tiny_run.recipe(quantization, lora=lora)
    model = tiny_run.stirred(tiny_run.fresh(what), seed=1)
    first_P2, weights = model_logps(model, PAIRS, tiny_run.PACKED, tiny_run.CPU), clone_adapter(model)
    tiny_run.stirred(model, seed=2)
    second_P2 = model_logps(model, PAIRS, tiny_run.PACKED, tiny_run.CPU)
    assert not torch.allclose(first_P2, second_P2, atol=1e-3)
    model.train()
    assert torch.equal(
        batch_reference_logps(model, collate(PAIRS, tiny_run.PACKED), tiny_run.CPU, ReferenceAdapter(weights)), first_P2
    )
    assert torch.equal(
        fresh_reference_logps(model, PAIRS, tiny_run.PACKED, tiny_run.CPU, ReferenceAdapter(weights)), first_P2
    )
    assert torch.equal(model_logps(model.eval(), PAIRS, tiny_run.PACKED, tiny_run.CPU), second_P2)


def test_asking_leaves_the_parameters_what_they_are() -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()))
    weights = {name: torch.zeros_like(value) for name, value in clone_adapter(model).items()}
    before = {name: (id(parameter), parameter.data_ptr()) for name, parameter in trainable_parameters(model).items()}
    with pytest.raises(KeyboardInterrupt), as_reference(model, ReferenceAdapter(weights)):
        raise KeyboardInterrupt
    assert before == {
        name: (id(parameter), parameter.data_ptr()) for name, parameter in trainable_parameters(model).items()
    }
    assert all(not bool(value.any()) for value in weights.values())


def test_without_held_weights_the_adapter_is_off() -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()))
    base_P2 = model_logps(tiny_run.base_model(), PAIRS, tiny_run.PACKED, tiny_run.CPU)
    torch.testing.assert_close(
        fresh_reference_logps(model, PAIRS, tiny_run.PACKED, tiny_run.CPU, ADAPTER_OFF), base_P2, rtol=1e-5, atol=1e-5
    )


def test_answers_of_held_weights_are_kept_like_any_other(tmp_path: Any) -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()))
    own_P2, held = model_logps(model, PAIRS, tiny_run.PACKED, tiny_run.CPU), ReferenceAdapter(clone_adapter(model))
    tiny_run.stirred(model, seed=5)
    store = tiny_run.ReferenceLogpCache(tmp_path)
    asked_P2 = compute_reference_logps(model, PAIRS, store, tiny_run.PACKED, tiny_run.CPU, reference=held)
    assert torch.equal(asked_P2, own_P2)
    assert store.local_computed == len(PAIRS)


def test_the_copy_moves_by_alpha_every_so_many_steps() -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()))
    name = next(iter(trainable_parameters(model)))
    policy = trainable_parameters(model)[name]
    held = ReferenceAdapter(
        {each: torch.zeros_like(value) for each, value in clone_adapter(model).items()}, ema(0.25, 2)
    )
    assert held.weights is not None
    expected = {1: 0.0, 2: 0.25, 3: 0.25, 4: 0.25 + 0.75 * 0.25}
    for step, share in expected.items():
        sync_reference(model, held, step)
        torch.testing.assert_close(held.weights[name], share * policy.data)


def test_a_hard_update_is_the_policy_bit_for_bit() -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()))
    held = ReferenceAdapter(
        {name: torch.randn_like(value) for name, value in clone_adapter(model).items()}, ema(1.0, 3)
    )
    assert held.weights is not None
    sync_reference(model, held, 3)
    assert all(torch.equal(held.weights[name], value) for name, value in clone_adapter(model).items())


def test_the_copy_moves_as_trl_moves_its_reference() -> None:
    model, other = (tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()), seed) for seed in (1, 2))
    held = ReferenceAdapter(clone_adapter(other), ema(0.6, 1))
    assert held.weights is not None
    for step in range(1, 4):
        sync_reference(model, held, step)
        SyncRefModelCallback._sync_target_model(model, other, 0.6)
    moved = clone_adapter(other)
    assert all(torch.equal(held.weights[name], moved[name]) for name in moved)


def test_a_frozen_copy_never_moves() -> None:
    model = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe()))
    weights = clone_adapter(model)
    tiny_run.stirred(model, seed=3)
    before = {name: value.clone() for name, value in weights.items()}
    sync_reference(model, ReferenceAdapter(weights), 1)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert not math.isclose(float(next(iter(before.values())).sum()), 0.0)
