"""A run tells its signs of trouble: each fires where it was planted, and a healthy run has none."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from peft import PeftModel

from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.preference.kl import kl_to_base
from qlora_dpo.preference.reference import compute_reference_logps
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.objective import Sigmoid
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.context import PreferenceDataset
from qlora_dpo.training.evaluate import evaluate
from qlora_dpo.training.loop import train_loop
from qlora_dpo.training.watch import RunHistory, find_warnings

pytestmark = tiny_run.LIBRARIES_WARN

KIND, CURT = range(20, 30), range(40, 50)
"""Tokens that good and bad answers are made of."""


def taught(count: int, seed: int, *, longer_by: Sequence[int] = (0,), alike: bool = False) -> list[EncodedPair]:
    """Pairs to learn from: a good answer has KIND tokens, a bad one CURT tokens, or both the same if `alike`.

    The good answer of the n-th pair is longer by the n-th of `longer_by`, taken in turn.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(some: range, length: int) -> tuple[int, ...]:
        return tuple(some[i] for i in torch.randint(len(some), (length,), generator=generator).tolist())

    made = []
    for row in range(1, count + 1):
        more = longer_by[row % len(longer_by)]
        p, c, r = draw(range(60, 300), 6), draw(KIND, 6 + max(more, 0)), draw(KIND if alike else CURT, 6 - min(more, 0))
        made.append(EncodedPair(p, c, r, row, digest_ids(p, c, r)))
    return made


def policy(what: Recipe) -> PeftModel:
    """The tiny model with larger weights, so that an adapter can move its answers far."""
    base, generator = tiny_run.base_model(), torch.Generator().manual_seed(0)
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model = attach_lora(base, what.lora, what.train.seed)
    fuse_lora(model, torch.float32)
    return model


def trained(
    folder: Path, pairs: list[EncodedPair], judged: list[EncodedPair], **tables: dict[str, Any]
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Train the tiny model on some pairs; the final state, and the signs that its metrics tell."""
    what = tiny_run.recipe(**tables)
    folder.mkdir(exist_ok=True)
    model = policy(what)
    job = tiny_run.job(model, what, folder, len(pairs), len(judged))
    ask = [
        PreferenceDataset(some, compute_reference_logps(model, some, job.reference_cache, job.packing, tiny_run.CPU))
        for some in (pairs, judged)
    ]
    job = replace(job, train=ask[0], heldout=ask[1])
    with RunLog(folder, job.data_order.total_steps) as tracker:
        state = train_loop(model, job, tiny_run.start(job), tracker)
    return state, [record for record in read_metrics(folder / METRICS) if record["kind"] == "sign"]


def named(told: list[dict[str, Any]]) -> set[str]:
    return {record["name"] for record in told}


FAST = {"train": {"learning_rate": 1e-2, "num_train_epochs": 12, "batch_size": 8, "logging_steps": 50}}


def test_a_healthy_run_has_no_sign(tmp_path: Path) -> None:
    train = {"learning_rate": 1e-3, "num_train_epochs": 4, "batch_size": 8, "logging_steps": 50}
    state, told = trained(
        tmp_path, taught(64, 0), taught(64, 1), train=train, objective={"sft_weight": 1.0, "beta": 0.3}
    )
    assert told == state.signs == []
    assert state.evals[-1]["eval_loss"] < state.evals[0]["eval_loss"]
    assert state.evals[-1]["eval_rewards/accuracies"] > 0.9


def test_chosen_answers_that_become_unlikely_are_told(tmp_path: Path) -> None:
    # a loss that pushes both answers down, the bad one more
    state, told = trained(tmp_path, taught(16, 0), taught(16, 1), objective={"loss_type": "apo_down"}, **FAST)
    first, now = (state.evals[i]["eval_logps/chosen_per_token"] for i in (0, -1))
    assert first - now > 0.25
    assert named(told) == {"likelihood_displacement"}


def test_pairs_learned_by_heart_and_margins_that_follow_length_are_told(tmp_path: Path) -> None:
    # nothing but their length tells good answers from bad ones, and in the held-out pairs not even that
    pairs = taught(64, 0, longer_by=(6, 9, 4), alike=True)
    judged = taught(64, 1, longer_by=(9, -9, 5, -5, 0), alike=True)
    train = {"learning_rate": 5e-3, "num_train_epochs": 2, "batch_size": 8, "logging_steps": 50}
    state, told = trained(tmp_path, pairs, judged, train=train)
    assert state.evals[-1]["eval_length_correlation"] > 0.8
    assert named(told) == {"length_correlation", "eval_loss_rises", "accuracy_in_noise"}
    losses = {each["step"]: each["eval_loss"] for each in state.evals}
    assert next(sign["sentence"] for sign in told if sign["name"] == "eval_loss_rises") == (
        f"the held-out loss rose twice, from {losses[0]:.4f} at step 0 to {losses[16]:.4f}, while the training loss "
        "fell: the training pairs are being learned by heart; take fewer epochs or a lower train.learning_rate, or set "
        "train.load_best_model_at_end = true"
    )


def test_pairs_without_a_gradient_are_told(tmp_path: Path) -> None:
    state, told = trained(tmp_path, taught(16, 0), taught(16, 1), objective={"beta": 2.0}, **FAST)
    assert state.evals[-1]["eval_vanishing"] == 1
    assert [record["name"] for record in told].count("vanishing_gradient") == 1  # told once, though it stays


def test_a_loss_that_stays_where_it_was_is_told(tmp_path: Path) -> None:
    _, told = trained(tmp_path, taught(16, 0), taught(16, 1), train={"learning_rate": 1e-9, "num_train_epochs": 4})
    assert [record["step"] for record in told if record["name"] == "stuck"] == [4]
    assert told[0]["sentence"] == (
        "the held-out loss 0.6931 is still that of step 0; raise train.learning_rate (`qlora-dpo sweep RECIPE --probe` "
        "finds one), or look at the labels with `qlora-dpo data lint`"
    )


def record(step: int, loss: float, **more: float) -> dict[str, Any]:
    """An evaluation of a run without any sign."""
    return {
        "step": step,
        "eval_loss": loss,
        "eval_loss_stderr": 0.01,
        "eval_train_loss": 1 - step / 1000,
        "eval_rewards/accuracies": 0.9,
        "eval_rewards/margins": step / 100,
        "eval_logps/chosen_per_token": -2.0,
        "eval_pairs": 100,
        "eval_kl": 0.1,
        "eval_vanishing": 0.1,
        "eval_length_correlation": 0.2,
    } | more


def seen(*evals: dict[str, Any], skipped: int = 0, shorter: float = 0.6) -> set[str]:
    course = RunHistory(list(evals), 100, {"longer": 1 - shorter, "shorter": shorter}, skipped)
    return set(find_warnings(course))


START = record(0, math.log(2), **{"eval_rewards/accuracies": 0.5})


@pytest.mark.parametrize(
    ("now", "name"),
    [
        ({"eval_logps/chosen_per_token": -2.26}, "likelihood_displacement"),
        ({"eval_kl": 0.51}, "kl"),
        ({"eval_kl": 1.02, "eval_logps/chosen_per_token": -1.5}, "kl"),
        ({"eval_rewards/accuracies": 0.59}, "accuracy_in_noise"),
        ({"eval_rewards/accuracies": 0.68}, "accuracy_in_noise"),
        ({"eval_length_correlation": -0.81}, "length_correlation"),
        ({"eval_vanishing": 0.51}, "vanishing_gradient"),
        ({"eval_loss": math.log(2) - 0.0009}, "stuck"),
    ],
)
def test_each_sign_is_told_from_its_bar_on(now: dict[str, float], name: str) -> None:
    assert seen(START, record(100, 0.5)) == set()
    assert seen(START, record(100, 0.5) | now) == {name}


def test_a_policy_that_moves_towards_the_chosen_answers_alone_shows_no_sign() -> None:
    assert seen(START, record(100, 0.5, **{"eval_kl": 1.8, "eval_logps/chosen_per_token": -0.6})) == set()
    # what the chosen answers lose is not taken off twice
    both = {"eval_kl": 0.51, "eval_logps/chosen_per_token": -2.26}
    assert seen(START, record(100, 0.5, **both)) == {"kl", "likelihood_displacement"}


def test_skipped_steps_are_told_by_their_share() -> None:
    assert seen(START, record(100, 0.5), skipped=10) == set()
    assert seen(START, record(100, 0.5), skipped=11) == {"skipped_steps"}


def test_a_held_out_loss_that_rises_within_its_own_error_is_no_sign() -> None:
    rising = [record(0, 0.69), record(10, 0.500), record(20, 0.505), record(30, 0.51)]
    assert "eval_loss_rises" not in seen(*rising)
    rising[-1] |= {"eval_loss": 0.52}
    assert "eval_loss_rises" in seen(*rising)
    rising[-1] |= {"eval_train_loss": 2.0}
    assert "eval_loss_rises" not in seen(*rising)


def test_nothing_is_told_at_the_start_and_noise_not_in_the_first_half() -> None:
    poor = {"eval_rewards/accuracies": 0.5}
    assert seen(START) == set()
    assert seen(START, record(49, 0.5) | poor) == set()
    assert seen(START, record(50, 0.5) | poor) == {"accuracy_in_noise"}
    # who picks by length and is mostly wrong is no rival, even of a policy that is wrong as often
    assert seen(START, record(100, 0.5) | {"eval_rewards/accuracies": 0.1}, shorter=0.1) == set()


def test_what_signs_are_judged_by_is_what_its_name_says() -> None:
    model, pairs = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe())), tiny_run.pairs(9)
    reference_P2 = -30 * torch.rand(9, 2, generator=torch.Generator().manual_seed(0))
    found = evaluate(model, PreferenceDataset(pairs, reference_P2), Sigmoid(), tiny_run.PACKED, tiny_run.CPU)
    each = [
        evaluate(model, PreferenceDataset([pair], reference_P2[[i]]), Sigmoid(), tiny_run.PACKED, tiny_run.CPU)
        for i, pair in enumerate(pairs)
    ]
    losses, margins = (
        torch.tensor([one[f"eval_{name}"] for one in each], dtype=torch.float64) for name in ("loss", "rewards/margins")
    )
    longer = torch.tensor([len(pair.chosen) - len(pair.rejected) for pair in pairs], dtype=torch.float64)
    away = [value - value.mean() for value in (margins, longer)]
    correlation = float((away[0] * away[1]).sum() / (away[0].norm() * away[1].norm()))
    assert found["eval_loss_stderr"] == pytest.approx(
        float(((losses - losses.mean()) ** 2).mean() / 9) ** 0.5, rel=1e-4
    )
    assert found["eval_length_correlation"] == pytest.approx(correlation, rel=1e-4)
    tokens, total = sum(len(pair.chosen) for pair in pairs), sum(one["eval_logps/chosen"] for one in each)
    assert found["eval_logps/chosen_per_token"] == pytest.approx(total / tokens, rel=1e-5)


def test_the_first_step_grad_of_dpo_is_its_beta(tmp_path: Path) -> None:
    # half of beta for the chosen answer and half for the rejected one; the last step of an epoch has fewer pairs
    state, _ = trained(tmp_path, taught(6, 0), taught(6, 1), train={"micro_batch_tokens": 40}, objective={"beta": 0.3})
    assert state.first_step_grad == pytest.approx(0.3, rel=1e-5)


def test_the_kl_to_the_base_is_that_of_whole_logits(tmp_path: Path) -> None:
    model, pairs = tiny_run.stirred(tiny_run.fresh(tiny_run.recipe())), tiny_run.pairs(7)
    total, tokens = 0.0, 0
    for pair in pairs:
        ids, rows = torch.tensor([pair.prompt + pair.chosen]), slice(len(pair.prompt) - 1, -1)
        with torch.no_grad():
            policy = model(input_ids=ids).logits[0, rows].double().log_softmax(-1)
            with model.disable_adapter():
                base = model(input_ids=ids).logits[0, rows].double().log_softmax(-1)
        total += float((policy.exp() * (policy - base)).sum())
        tokens += len(pair.chosen)
    for packing in (tiny_run.PACKED, tiny_run.PADDED):
        assert kl_to_base(model, pairs, packing, tiny_run.CPU) == pytest.approx(total / tokens, rel=1e-4)
    assert kl_to_base(tiny_run.fresh(tiny_run.recipe()), pairs, tiny_run.PACKED, tiny_run.CPU) == 0


def test_a_sign_in_watch_stop_ends_the_run_there_with_a_checkpoint(tmp_path: Path) -> None:
    state, told = trained(tmp_path, taught(32, 0), taught(32, 1), watch={"stop": ["eval_loss_rises"]}, **FAST)
    fired = next(record for record in told if record["name"] == "eval_loss_rises")
    assert state.step == fired["step"] < 48
    assert state.stopped_by_sign
    assert state.stopped == f"stopped after step {state.step} by watch.stop, eval_loss_rises: {fired['sentence']}"
    saved = tmp_path / "checkpoints" / f"step-{state.step:06d}" / "state.json"
    assert json.loads(saved.read_text())["evals"] == state.evals
