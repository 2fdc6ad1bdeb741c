"""Describes the result of a sweep: which point is best, and how certain that is."""

from collections.abc import Iterator, Mapping, Sequence

from qlora_dpo.run_folder import Record
from qlora_dpo.wilson import wilson_interval

Interval = tuple[str, float, float]
"""What it is an interval of ("losses" or "accuracies"), and its ends."""

OBJECTIVE_FREE_METRICS = (
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "mean_token_accuracy",
    "kl",
)
"""Metrics that do not depend on the objective."""


def format_metric(metric: str, value: float) -> str:
    """A metric and its value: `loss 0.6512`."""
    return f"accuracy {value:.3f}" if metric == "rewards/accuracies" else f"{metric} {value:z.4f}"


def metric_interval(evaluation: Record, metric: str) -> Interval | None:
    """The 95 % interval of the loss if that is the metric, else of the accuracy; None if it was not measured."""
    stderr, pairs = evaluation.get("eval_loss_stderr"), evaluation.get("eval_pairs")
    is_loss = metric == "loss" or (
        metric == "preference_loss" and evaluation.get("eval_preference_loss") == evaluation.get("eval_loss")
    )
    if is_loss and stderr is not None:
        return "losses", evaluation["eval_loss"] - 1.96 * stderr, evaluation["eval_loss"] + 1.96 * stderr
    accuracy = evaluation.get("eval_rewards/accuracies")
    return None if accuracy is None or not pairs else ("accuracies", *wilson_interval(accuracy * pairs, pairs))


def ranking_caveats(
    best_first: Mapping[str, Record], metric: str, swept: Sequence[str], folder: object
) -> Iterator[str]:
    """Reasons to doubt that the first point is the best, one sentence each.

    `best_first` maps the names of the finished points to the evaluations that they are ranked by; `swept` are the keys
    that differ, and `folder` is that of the best point.
    """
    keys = [key for key in swept if key.startswith("objective.")]
    others = [key for key in keys if key != "objective.sft_weight"]
    depends_on = others if metric == "preference_loss" else keys
    if depends_on and metric not in OBJECTIVE_FREE_METRICS:
        yield (
            f"{metric} depends on {' and '.join(depends_on)}, which the points do not share, so it cannot rank them "
            f"fairly; --metric {'rewards/accuracies' if others else 'preference_loss'} can"
        )
    if len(best_first) < 2:
        return
    (_, best), (name, second) = list(best_first.items())[:2]
    one, other = metric_interval(best, metric), metric_interval(second, metric)
    if one and other and one[1] <= other[2] and other[1] <= one[2]:
        yield (
            f"{best['eval_pairs']} pairs cannot tell it apart from the second, {name}: the 95 % intervals of their "
            f"{one[0]} overlap ({one[1]:.3f}-{one[2]:.3f} and {other[1]:.3f}-{other[2]:.3f})"
        )
    yield (
        f"it was chosen among {len(best_first)} runs on these same pairs, so its figure is optimistic; evaluate it "
        f"on others: qlora-dpo eval {folder} --data FILE"
    )
