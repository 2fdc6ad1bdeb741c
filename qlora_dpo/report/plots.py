"""Draws the figures that a run logged, as SVG and PNG; equal records give equal bytes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.run_folder import Record
from qlora_dpo.wilson import wilson_interval

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"
"""Two of Okabe and Ito's colours, which are safe for colour-blind readers, and grey for baselines without a model."""
RC_PARAMS = {
    "svg.hashsalt": "qlora_dpo",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
SUBPLOT_EDGES = {"left": 0.155, "right": 0.97, "top": 0.9, "bottom": 0.155}
"""Edges of the axes, as shares of the figure: fixed, with space for the widest tick labels, to save measuring them."""

Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Plot:
    """One figure in both formats."""

    name: str
    title: str
    svg: bytes
    png: bytes


@dataclass(frozen=True)
class PlotLine:
    """One line of a plot: metric `key`, without prefix, of records of `kind` "train" or "eval"."""

    key: str
    label: str
    colour: str
    kind: str

    def points(self, records: Sequence[Record]) -> Points:
        """Steps and values, skipping those that were not finite or not measured."""
        name = f"eval_{self.key}" if self.kind == "eval" else self.key
        present = [record for record in records if record["kind"] == self.kind and record.get(name) is not None]
        return [record["step"] for record in present], [record[name] for record in present]


def train_and_eval_lines(key: str) -> tuple[PlotLine, PlotLine]:
    """One metric on training pairs and on held-out pairs."""
    return PlotLine(key, "training", ORANGE, "train"), PlotLine(key, "held out", BLUE, "eval")


def chosen_and_rejected_lines(key: str) -> tuple[PlotLine, PlotLine]:
    """One metric on chosen and on rejected answers of held-out pairs."""
    return PlotLine(f"{key}/chosen", "chosen", BLUE, "eval"), PlotLine(f"{key}/rejected", "rejected", ORANGE, "eval")


PLOTS: dict[str, tuple[str, str, tuple[PlotLine, ...]]] = {
    "loss": ("Loss", "nats per pair", train_and_eval_lines("loss")),
    "accuracy": ("Accuracy, with its 95 % interval", "share of pairs", train_and_eval_lines("rewards/accuracies")),
    "margins": ("Margin: chosen reward less rejected", "nats", train_and_eval_lines("rewards/margins")),
    "rewards": ("Rewards of held-out answers", "nats", chosen_and_rejected_lines("rewards")),
    "logps": ("Log-probabilities of held-out answers", "nats per answer", chosen_and_rejected_lines("logps")),
    "perplexity": ("Perplexity of held-out answers", "", (PlotLine("perplexity", "held out", BLUE, "eval"),)),
    "kl": ("KL to the base on chosen answers", "nats per token", (PlotLine("kl", "held out", BLUE, "eval"),)),
    "learning_rate": ("Learning rate", "", (PlotLine("learning_rate", "learning rate", ORANGE, "train"),)),
    "throughput": ("Throughput", "pairs per second", (PlotLine("pairs_per_second", "training", ORANGE, "train"),)),
}


def draw_plots(records: Sequence[Record], results: Record) -> list[Plot]:
    """All plots for which the records have values, in a fixed order."""
    return [
        _draw_plot(name, title, unit, lines, records, results)
        for name, (title, unit, lines) in PLOTS.items()
        if any(line.points(records)[0] for line in lines)
    ]


def _draw_plot(
    name: str, title: str, unit: str, lines: Sequence[PlotLine], records: Sequence[Record], results: Record
) -> Plot:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(RC_PARAMS):
        figure = Figure(figsize=(5.2, 3.1), dpi=150)
        figure.subplots_adjust(**SUBPLOT_EDGES)
        axes = figure.add_subplot()
        for line in lines:
            steps, values = line.points(records)
            style = {"marker": "o", "markersize": 3.5} if line.kind == "eval" or len(steps) == 1 else {"alpha": 0.8}
            axes.plot(steps, values, color=line.colour, label=line.label, linewidth=1.4, **style)
        if name == "accuracy":
            _draw_intervals_and_baselines(axes, records, results)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.title.set_fontsize(10)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize=8, loc="lower right" if name == "accuracy" else "best")
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": "qlora_dpo", "Title": title})
        figure.savefig(png, format="png", metadata={"Software": None})
    return Plot(name, title, svg.getvalue(), png.getvalue())


def _draw_intervals_and_baselines(axes: Any, records: Sequence[Record], results: Record) -> None:
    """Draw 95 % intervals around every held-out accuracy, and the accuracy of picking by length."""
    key = "eval_rewards/accuracies"
    for record in records:
        if record["kind"] == "eval" and record.get(key) is not None and record.get("eval_pairs"):
            interval = wilson_interval(record[key] * record["eval_pairs"], record["eval_pairs"])
            axes.vlines(record["step"], *interval, color=BLUE, alpha=0.5, linewidth=1)
    baselines = results.get("baselines") or {}
    if baselines:
        best = max(baselines, key=lambda name: baselines[name])
        axes.axhline(baselines[best], color=GREY, linestyle=":", linewidth=1, label=f"pick the {best}")
    axes.set_ylim(0, 1.02)
