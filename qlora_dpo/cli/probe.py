"""What `sweep --probe` adds to a sweep: short runs over a range of rates, and a table of what each has changed."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.grid import GridPoint, to_toml
from qlora_dpo.report.sweep import metric_interval

MAX_PROBE_PAIRS = 200
"""Training pairs of each short run, and held-out pairs that it is judged by, at most."""
INTERIM_EVAL_PAIRS = 32
"""Held-out pairs by which a short run may end halfway, enough for signs of trouble."""
PROBE_VALUES: dict[str, tuple[float, ...]] = {
    "train.learning_rate": (5e-6, 1.2e-5, 3e-5, 8e-5, 2e-4, 5e-4),
    "objective.beta": (0.05, 0.1, 0.3),
}
"""The values that are tried of a key without `--over`."""
STOP_SIGNS = ("kl", "likelihood_displacement")
"""Signs of trouble by which a short run ends early; it is then never the best."""


def probe_axes(keys: str, over: Sequence[str]) -> tuple[str, ...]:
    """The `--over` options of a probe of `keys`, separated by commas; raises RecipeError for one without values."""
    given = {axis.partition("=")[0].strip() for axis in over}
    axes = list(over)
    for key in filter(None, map(str.strip, keys.split(","))):
        if key in given:
            continue
        if key not in PROBE_VALUES:
            raise RecipeError(
                f"--probe {key}: has no values of its own; {' and '.join(PROBE_VALUES)} have, and --over "
                f"{key}=[VALUE, ...] names them for another key"
            )
        axes.append(f"{key}={to_toml(list(PROBE_VALUES[key]))}")
    return tuple(axes)


def probe_overrides(recipe: Recipe, overrides: Sequence[str]) -> tuple[str, ...]:
    """The `--set` options that make a run of `recipe` a short one, the user's own `overrides` among them.

    The user's go before the probe's, but no run is judged by more than MAX_PROBE_PAIRS held-out pairs.
    """
    steps = math.ceil(MAX_PROBE_PAIRS / recipe.train.batch_size)
    held_out = min(recipe.data.max_eval_samples or MAX_PROBE_PAIRS, MAX_PROBE_PAIRS)
    return (
        f"train.max_steps={steps}",
        f"train.warmup_steps={min(recipe.train.warmup_steps, max(1, steps // 10))}",
        f"train.eval_steps={math.ceil(steps / 2)}",
        f"watch.stop={json.dumps(STOP_SIGNS)}",
        "samples.prompts=0",
        *overrides,
        f"data.max_eval_samples={held_out}",
    )


def probe_metric(recipe: Recipe) -> str:
    """What a probe ranks by: the loss of supervised tuning, else the preference loss."""
    return "loss" if recipe.objective.loss_type == "sft" else "preference_loss"


def probe_table(points: Sequence[GridPoint], folder: Path, metric: str) -> Iterator[str]:
    """A line for each point: its held-out metric, accuracy and KL, and what its chosen answers have gained or lost."""
    width = max(len(point.description) for point in points)
    yield f"{'':<{width}}  {metric:<15}  {'95 % interval':<15}  accuracy   KL     chosen, nats a token"
    for point in points:
        evals = _evaluations(folder / point.name)
        if len(evals) < 2:
            yield f"{point.description:<{width}}  ended without an evaluation"
            continue
        first, last = evals[0], evals[-1]
        interval = metric_interval(last, metric)
        told = f"{interval[1]:.3f}-{interval[2]:.3f}" if interval and interval[0] == "losses" else ""
        gain = last["eval_logps/chosen_per_token"] - first["eval_logps/chosen_per_token"]
        accuracy = last.get("eval_rewards/accuracies")
        yield (
            f"{point.description:<{width}}  {last[f'eval_{metric}']:<15.4f}  {told:<15}  "
            f"{'' if accuracy is None else f'{accuracy:.3f}':<8}   {last.get('eval_kl', 0.0):.3f}  {gain:+.3f}"
        )


def edge_caveats(values: Mapping[str, Any], over: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """A sentence for each key whose best value is the lowest or the highest of those tried."""
    for key, tried in over.items():
        numbers = sorted(value for value in tried if isinstance(value, int | float))
        if len(numbers) > 2 and values[key] in (numbers[0], numbers[-1]):
            end = "lowest" if values[key] == numbers[0] else "highest"
            yield f"{key} = {to_toml(values[key])} is the {end} that was tried; --over {key}=[...] can try beyond it"


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    try:
        evals: list[dict[str, Any]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["evals"]
        return evals
    except (OSError, ValueError, KeyError):
        return []
