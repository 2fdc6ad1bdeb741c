"""Computes the metrics of an adapter on held-out pairs, as `qlora-dpo eval --json` prints them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from qlora_dpo.data.audit import length_baselines
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.evaluation.adapter_eval import AdapterScores, TextLogps
from qlora_dpo.evaluation.calibration import calibration
from qlora_dpo.evaluation.length_bias import (
    LengthBin,
    accuracy_by_length,
    accuracy_by_length_difference,
    length_controlled_accuracy,
)
from qlora_dpo.recipe.objective import Objective
from qlora_dpo.wilson import wilson_interval


def compute_eval_metrics(
    scores: AdapterScores, pairs: Sequence[EncodedPair], objective: Objective, texts: Mapping[str, TextLogps]
) -> dict[str, Any]:
    """Every metric by name: shares from 0 to 1, nats or tokens; intervals of shares are Wilson's at 95 %.

    Rows of one answer have loss, perplexity and token accuracy alone.
    """
    logps = {"tuned": scores.tuned_logp_P2, "base": scores.base_logp_P2}
    perplexity = {
        who: math.exp(-float(logp_P2[:, 0].sum()) / int(scores.tokens_P2[:, 0].sum())) for who, logp_P2 in logps.items()
    }
    shared = {
        "loss": float(scores.loss_P.mean()),
        "loss_stderr": _stderr(scores.loss_P),
        "kl": scores.kl,
        "perplexity": {**perplexity, "tokens": int(scores.tokens_P2[:, 0].sum())},
        "texts": {name: _text_perplexity(text_logps) for name, text_logps in texts.items()},
    }
    if scores.token_accuracy is not None:
        return {"pairs": len(pairs), "token_accuracy": scores.token_accuracy, **shared}
    return _comparison_metrics(scores, pairs, objective) | shared


def _comparison_metrics(scores: AdapterScores, pairs: Sequence[EncodedPair], objective: Objective) -> dict[str, Any]:
    """The metrics that compare the two answers of a pair."""
    count, correct = len(pairs), float(scores.correct_P.sum())
    logps = {"tuned": scores.tuned_logp_P2, "base": scores.base_logp_P2}
    return {
        "pairs": count,
        "accuracy": correct / count,
        "accuracy_interval": wilson_interval(correct, count),
        "ties": int(scores.tie_P.sum()),
        "preference_loss": float(scores.preference_P.mean()),
        "margin": float(scores.margins.mean()),
        "margin_stderr": _stderr(scores.margins),
        "rewards": _column_means(scores.rewards_P2),
        "logps": {who: _column_means(logp_P2) for who, logp_P2 in logps.items()},
        "calibration": asdict(calibration(scores.margins, scores.correct_P)),
        # an unpaired answer is matched with that of another prompt, so their lengths are unrelated
        "length": None if objective.loss_type == "kto" else _length_metrics(scores, pairs),
    }


def _length_metrics(scores: AdapterScores, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    controlled = length_controlled_accuracy(scores.tokens_P2, scores.correct_P)
    return {
        "controlled_accuracy": controlled.accuracy,
        "pull": controlled.length_coefficient,
        "baselines": length_baselines(pairs),
        "by_difference": {
            name: _length_bin_metrics(length_bin)
            for name, length_bin in accuracy_by_length_difference(scores.tokens_P2, scores.correct_P).items()
        },
        "by_length": [
            _length_bin_metrics(length_bin) for length_bin in accuracy_by_length(scores.tokens_P2, scores.correct_P)
        ],
    }


def _length_bin_metrics(length_bin: LengthBin) -> dict[str, Any]:
    return {
        "low": length_bin.low,
        "high": length_bin.high,
        "pairs": length_bin.pairs,
        "accuracy": length_bin.num_correct / length_bin.pairs,
        "accuracy_interval": wilson_interval(length_bin.num_correct, length_bin.pairs),
    }


def _text_perplexity(text_logps: TextLogps) -> dict[str, float]:
    return {
        "base": math.exp(-text_logps.base_logp / text_logps.tokens),
        "tuned": math.exp(-text_logps.tuned_logp / text_logps.tokens),
        "tokens": text_logps.tokens,
    }


def _column_means(value_P2: Tensor) -> dict[str, float]:
    chosen, rejected = value_P2.mean(0).tolist()
    return {"chosen": chosen, "rejected": rejected}


def _stderr(value_P: Tensor) -> float:
    """The standard error of the mean."""
    return float(value_P.std(correction=0)) / math.sqrt(len(value_P))
