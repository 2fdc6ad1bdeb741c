"""What a forecast says about preference pairs, in lines: its figures, and a sentence for each that is out of bounds."""

from collections.abc import Iterator

from qlora_dpo.evaluation.pair_forecast import Auc, PairForecast, forecast_warnings, side_names


def forecast_lines(forecast: PairForecast) -> list[str]:
    """The figures and the warnings, each line with `pairs: ` before it."""
    return [*(f"pairs: {line}" for line in figure_lines(forecast)), *forecast_warning_lines(forecast)]


def forecast_warning_lines(forecast: PairForecast) -> list[str]:
    """The warnings alone, in the same way."""
    return [f"pairs: {sentence}" for sentence in forecast_warnings(forecast).values()]


def figure_lines(forecast: PairForecast) -> Iterator[str]:
    """The figures, a line for those that belong together."""
    good, bad = side_names(forecast)
    sides = [
        f"{nats:.2f} for the {count:,} {name}"
        for name, count, nats in (
            (good, forecast.chosen, forecast.chosen_nats),
            (bad, forecast.rejected, forecast.rejected_nats),
        )
        if nats is not None
    ]
    if forecast.own is not None:
        sides.append(f"{forecast.own.nats_per_token:.2f} for {forecast.own.answers} of the model's own")
    yield f"nats a token: {', '.join(sides)}"
    told = []
    if forecast.ranked_right is not None:
        share, low, high = forecast.ranked_right
        told.append(f"ranked right before training: {share:.1%} ({low:.1%} to {high:.1%})")
    if forecast.separable is not None:
        share, low, high = forecast.separable
        told.append(f"by a linear probe of the model's states: {share:.1%} ({low:.1%} to {high:.1%})")
    if forecast.auc_length is not None and forecast.auc_likelihood is not None:
        told.append(f"told apart by length alone: AUC {_auc(forecast.auc_length)}")
        told.append(f"by log-probability a token alone: {_auc(forecast.auc_likelihood)}")
    if told:
        yield "; ".join(told)
    shares = {
        f"{good} that the model finds next to impossible": forecast.nearly_impossible,
        "pairs whose answers are alike": forecast.alike,
    }
    if known := [f"{name}: {share:.1%}" for name, share in shares.items() if share is not None]:
        yield "; ".join(known)


def _auc(auc: Auc) -> str:
    return f"{auc.value:.2f} ({auc.low:.2f} to {auc.high:.2f})"
