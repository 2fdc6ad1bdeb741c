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
    """The figures, a line each."""
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
    if forecast.ranked_right is not None:
        yield f"ranked right before training: {_share(forecast.ranked_right)}"
    if forecast.separable is not None:
        yield f"ranked right by a linear probe of the model's states: {_share(forecast.separable)}"
    if forecast.auc_length is not None and forecast.auc_likelihood is not None:
        yield f"told apart by length alone: AUC {_auc(forecast.auc_length)}"
        yield f"told apart by log-probability a token alone: AUC {_auc(forecast.auc_likelihood)}"
    if forecast.nearly_impossible is not None:
        yield f"next to impossible for the model: {forecast.nearly_impossible:.1%} of the {good}"
    if forecast.alike is not None:
        yield f"with nearly the same tokens on both sides: {forecast.alike:.1%} of the pairs"


def _share(interval: tuple[float, float, float]) -> str:
    share, low, high = interval
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def _auc(auc: Auc) -> str:
    return f"{auc.value:.2f} ({auc.low:.2f} to {auc.high:.2f})"
