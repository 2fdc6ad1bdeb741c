"""The figures of an adapter on held-out pairs, as `qlora-dpo eval --json` prints them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from qlora_dpo.data.audit import baselines
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.evaluation.adapter_eval import Examined, TextFit
from qlora_dpo.evaluation.calibration import calibration
from qlora_dpo.evaluation.length_bias import Stretch, by_difference, by_length, length_controlled
from qlora_dpo.recipe.objective import Objective
from qlora_dpo.wilson import wilson


def judgement(
    found: Examined, pairs: Sequence[EncodedPair], table: Objective, texts: Mapping[str, TextFit]
) -> dict[str, Any]:
    """Every figure by name: shares from 0 to 1, nats, tokens. Intervals are at 95 %, of shares Wilson's."""
    count, right = len(pairs), float(found.right_P.sum())
    logps = {"tuned": found.tuned_P2, "base": found.base_P2}
    return {
        "pairs": count,
        "accuracy": right / count,
        "accuracy_interval": wilson(right, count),
        "ties": int(found.tie_P.sum()),
        "loss": float(found.loss_P.mean()),
        "loss_stderr": _stderr(found.loss_P),
        "preference_loss": float(found.preference_P.mean()),
        "margin": float(found.margins.mean()),
        "margin_stderr": _stderr(found.margins),
        "rewards": _columns(found.rewards_P2),
        "logps": {who: _columns(each_P2) for who, each_P2 in logps.items()},
        "kl": found.kl,
        "calibration": asdict(calibration(found.margins, found.right_P)),
        # an unpaired answer stands beside that of another prompt: their lengths have nothing to do with each other
        "length": None if table.loss_type == "kto" else _length(found, pairs),
        "perplexity": {
            who: math.exp(-float(each_P2[:, 0].sum()) / int(found.tokens_P2[:, 0].sum()))
            for who, each_P2 in logps.items()
        }
        | {"tokens": int(found.tokens_P2[:, 0].sum())},
        "texts": {name: _text(each) for name, each in texts.items()},
    }


def _length(found: Examined, pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    controlled = length_controlled(found.tokens_P2, found.right_P)
    return {
        "controlled_accuracy": controlled.accuracy,
        "pull": controlled.pull,
        "baselines": baselines(pairs),
        "by_difference": {name: _stretch(each) for name, each in by_difference(found.tokens_P2, found.right_P).items()},
        "by_length": [_stretch(each) for each in by_length(found.tokens_P2, found.right_P)],
    }


def _stretch(each: Stretch) -> dict[str, Any]:
    return {
        "low": each.low,
        "high": each.high,
        "pairs": each.pairs,
        "accuracy": each.right / each.pairs,
        "accuracy_interval": wilson(each.right, each.pairs),
    }


def _text(fit: TextFit) -> dict[str, float]:
    return {
        "base": math.exp(-fit.base_logp / fit.tokens),
        "tuned": math.exp(-fit.tuned_logp / fit.tokens),
        "tokens": fit.tokens,
    }


def _columns(each_P2: Tensor) -> dict[str, float]:
    chosen, rejected = each_P2.mean(0).tolist()
    return {"chosen": chosen, "rejected": rejected}


def _stderr(value_P: Tensor) -> float:
    """The standard error of the mean."""
    return float(value_P.std(correction=0)) / math.sqrt(len(value_P))
