"""Signs of trouble in a run, each judged from its evaluations alone and told in one sentence with advice."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_dpo.recipe.watch import WarningName
from qlora_dpo.wilson import wilson_interval

MIN_LOSS_CHANGE = 1e-3
"""A held-out loss that has moved by less, a quarter of the run or more after its start, has not moved."""
MAX_DISPLACEMENT_NATS = 0.25
"""Nats per token that the chosen answers may lose since step 0 while the margin grows."""
MAX_KL_NATS = 0.5
"""KL divergence between policy and base on chosen answers, in nats per token, beyond what these answers have gained.

A policy that fits the chosen answers, as supervised tuning does, gains in log-probability just what it moves.
"""
MAX_LENGTH_CORRELATION = 0.8
"""Correlation, positive or negative, between the margins and how much longer the chosen answers are."""
MAX_VANISHING_SHARE = 0.5
"""Share of the pairs since the last evaluation whose gradient is less than a twentieth of the first step's."""
MAX_SKIPPED_SHARE = 0.1
"""Share of the steps that may be skipped since their scaled gradients overflow in fp16."""

EvalRecord = Mapping[str, Any]


@dataclass(frozen=True)
class RunHistory:
    """What is known of a run at an evaluation, which is the last of `evals`."""

    evals: list[dict[str, Any]]
    total_steps: int
    baselines: Mapping[str, float]
    """Accuracy of picking the longer and the shorter answer, as shares."""
    skipped_steps: int = 0


def find_warnings(history: RunHistory) -> dict[WarningName, str]:
    """The signs that the newest evaluation shows, each with its sentence."""
    return dict(_iter_warnings(history)) if history.evals[-1]["step"] > history.evals[0]["step"] else {}


def _iter_warnings(history: RunHistory) -> Iterator[tuple[WarningName, str]]:
    first, now = history.evals[0], history.evals[-1]
    done = now["step"] / history.total_steps
    if (best := _best_before_overfitting(history.evals)) is not None:
        yield (
            "eval_loss_rises",
            f"the held-out loss rose twice, from {best['eval_loss']:.4f} at step {best['step']} to "
            f"{now['eval_loss']:.4f}, while the training loss fell: the training pairs are being learned by heart; "
            "take fewer epochs or a lower train.learning_rate, or set train.load_best_model_at_end = true",
        )
    lost = first["eval_logps/chosen_per_token"] - now["eval_logps/chosen_per_token"]
    margins = [record.get("eval_rewards/margins", 0.0) for record in (first, now)]  # absent where rows have one answer
    if lost > MAX_DISPLACEMENT_NATS and margins[1] > margins[0]:
        yield (
            "likelihood_displacement",
            f"the chosen answers have lost {lost:.2f} nats a token since step 0 while the margin grew: both answers "
            'become unlikely; add objective.sft_weight, or try loss_type = "dpop" or a higher objective.beta',
        )
    if now["eval_kl"] - max(0.0, -lost) > MAX_KL_NATS:
        yield (
            "kl",
            f"the policy is {now['eval_kl']:.2f} nats a token away from the base on chosen answers, which have gained "
            f"{max(0.0, -lost):.2f} nats themselves: it also learns something else, so other abilities may suffer; "
            f"{'' if 'eval_perplexity' in now else 'raise objective.beta, or '}lower train.learning_rate",
        )
    if (
        "eval_rewards/accuracies" in now
        and done >= 0.5
        and (rival := _indistinguishable_baseline(now, history.baselines))
    ):
        yield (
            "accuracy_in_noise",
            f"the held-out accuracy {now['eval_rewards/accuracies']:.3f} of {now['eval_pairs']} pairs cannot be told "
            f"from {rival}; hold out more pairs, or train longer",
        )
    if abs(now.get("eval_length_correlation", 0.0)) > MAX_LENGTH_CORRELATION:
        yield (
            "length_correlation",
            f"the margins follow length (correlation {now['eval_length_correlation']:+.2f} with how much longer the "
            'chosen answer is): length is what is learned; try loss_type = "sampo", "rdpo" or "sigmoid_norm"',
        )
    if now.get("eval_vanishing", 0.0) > MAX_VANISHING_SHARE:
        yield (
            "vanishing_gradient",
            f"{now['eval_vanishing']:.0%} of the pairs since the last evaluation had less than a twentieth of the "
            "first step's gradient: little is left to learn from them; stop here, or lower objective.beta",
        )
    if done >= 0.25 and abs(now["eval_loss"] - first["eval_loss"]) < MIN_LOSS_CHANGE:
        yield (
            "stuck",
            f"the held-out loss {now['eval_loss']:.4f} is still that of step {first['step']}; raise "
            "train.learning_rate (`qlora-dpo sweep RECIPE --probe` finds one), or look at the labels with "
            "`qlora-dpo data lint`",
        )
    if history.skipped_steps > MAX_SKIPPED_SHARE * now["step"]:
        yield (
            "skipped_steps",
            f"{history.skipped_steps} of {now['step']} steps were skipped, since their gradients overflowed in fp16; "
            'lower train.learning_rate, or set model.dtype = "fp32"',
        )


def _best_before_overfitting(evals: list[dict[str, Any]]) -> EvalRecord | None:
    """The best evaluation, if the last two each have a higher loss than the one before, beyond their own error.

    The training loss must have fallen meanwhile; one and the same bar for both would miss an overfitted model whose
    training loss is already 0.
    """
    if len(evals) < 3:
        return None
    before, between, now = evals[-3:]
    best = min(evals, key=lambda record: record["eval_loss"])
    rises = before["eval_loss"] < between["eval_loss"] < now["eval_loss"]
    error = math.hypot(now["eval_loss_stderr"], best["eval_loss_stderr"])
    falls = now.get("eval_train_loss", math.inf) <= between.get("eval_train_loss", -math.inf)
    return best if rises and falls and now["eval_loss"] - best["eval_loss"] > error else None


def _indistinguishable_baseline(now: EvalRecord, baselines: Mapping[str, float]) -> str:
    """What a 95 % interval around the accuracy does not tell apart from it; empty if nothing."""
    low, high = wilson_interval(now["eval_rewards/accuracies"] * now["eval_pairs"], now["eval_pairs"])
    by_length = {f"picking the {which} answer ({share:.3f})": share for which, share in baselines.items()}
    rivals = {"a coin (0.500)": 0.5, **{name: share for name, share in by_length.items() if share > 0.5}}
    return next((name for name, share in rivals.items() if low <= share <= high), "")
