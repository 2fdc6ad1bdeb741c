"""Shows the figures of `qlora-dpo eval` as tables for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_dpo.data.dialogue import sanitize_text

Record = Mapping[str, Any]


def eval_metric_tables(metrics: Record) -> RenderableType:
    """All figures of one adapter, which `eval --json` has under the same names."""
    parts: list[RenderableType] = [_make_table(f"Held-out pairs: {metrics['pairs']}", _main_rows(metrics))]
    if metrics["length"]:
        parts.append(
            _make_table("Accuracy by length, in tokens", _length_rows(metrics["length"]), ("pairs", "accuracy"))
        )
    parts.append(
        _make_table("Calibration: sigmoid(margin)", _calibration_rows(metrics["calibration"]), ("pairs", "accuracy"))
    )
    parts.append(_make_table("Perplexity", _perplexity_rows(metrics), ("tokens", "base", "tuned")))
    if tasks := metrics.get("tasks"):
        parts.append(_make_table("Tasks of lm-eval", _task_rows(tasks), ("base", "tuned")))
    if judged := metrics.get("judge"):
        parts.append(_make_table("Answers judged side by side", _judge_rows(judged)))
    return Group(*parts)


def _main_rows(metrics: Record) -> Iterator[list[str]]:
    yield ["accuracy", f"{metrics['accuracy']:.3f}"]
    yield ["  95 % interval", _format_interval(metrics["accuracy_interval"])]
    yield ["  ties", str(metrics["ties"])]
    if length := metrics["length"]:
        yield ["  at equal lengths", f"{length['controlled_accuracy']:.3f}"]
        for which in ("longer", "shorter"):
            yield [f"  pick-the-{which}", f"{length['baselines'][which]:.3f}"]
    yield ["loss", f"{metrics['loss']:z.4f} +- {1.96 * metrics['loss_stderr']:.4f}"]
    if abs(metrics["loss"] - metrics["preference_loss"]) > 5e-5:
        yield ["  preference loss", f"{metrics['preference_loss']:z.4f}"]
    yield ["margin", f"{metrics['margin']:+z.3f} +- {1.96 * metrics['margin_stderr']:.3f}"]
    for side in ("chosen", "rejected"):
        yield [f"  {side} reward", f"{metrics['rewards'][side]:+z.3f}"]
    yield ["KL(tuned, base), nats per token", f"{metrics['kl']:.4f}"]


def _length_rows(length: Record) -> Iterator[list[str]]:
    for name, each in length["by_difference"].items():
        yield [f"chosen answer {name}", *_accuracy_cells(each)]
    for each in length["by_length"]:
        yield [f"answers of {each['low']:g} to {each['high']:g}", *_accuracy_cells(each)]


def _accuracy_cells(length_bin: Record) -> list[str]:
    return [
        str(length_bin["pairs"]),
        f"{length_bin['accuracy']:.3f} ({_format_interval(length_bin['accuracy_interval'])})",
    ]


def _calibration_rows(calibration: Record) -> Iterator[list[str]]:
    for each in calibration["bins"]:
        words = f"confidence {each['low']:.2f} to {each['high']:.2f}, mean {each['confidence']:.3f}"
        yield [words, str(each["pairs"]), f"{each['accuracy']:.3f}"]
    yield ["expected calibration error", "", f"{calibration['ece']:.3f}"]
    yield ["Brier score", "", f"{calibration['brier']:.3f}"]


def _perplexity_rows(metrics: Record) -> Iterator[list[str]]:
    for name, each in {"chosen answers": metrics["perplexity"], **metrics["texts"]}.items():
        yield [name, f"{each['tokens']:,}", f"{each['base']:.2f}", f"{each['tuned']:.2f}"]


def _task_rows(tasks: Record) -> Iterator[list[str]]:
    for task, metrics in tasks.items():
        for metric, each in metrics.items():
            cells = []
            for who in ("base", "tuned"):
                error = each[f"{who}_stderr"]
                cells.append(f"{each[who]:.4f}" + (f" +- {1.96 * error:.4f}" if error else ""))
            yield [f"{task}, {metric.removesuffix(',none')}", *cells]


def _judge_rows(judgement: Record) -> Iterator[list[str]]:
    yield ["tuned against base, win rate", f"{judgement['win_rate']:.3f}"]
    yield ["  95 % interval", _format_interval(judgement["win_rate_interval"])]
    yield ["  wins, ties, losses", f"{judgement['wins']}, {judgement['ties']}, {judgement['losses']}"]
    yield ["  prompts, requests", f"{judgement['prompts']}, {judgement['requests']}"]
    yield ["  prompts with equal answers", str(judgement["equal_answers"])]
    yield ["  replies without a verdict", str(judgement["unclear"])]
    yield ["  verdicts for the first answer", f"{judgement['first_taken']:.3f}"]


def _format_interval(both: tuple[float, float]) -> str:
    return f"{both[0]:.3f}-{both[1]:.3f}"


def _make_table(title: str, rows: Iterator[list[str]], columns: tuple[str, ...] = ("",)) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if columns != ("",) else box.SIMPLE,
        show_header=columns != ("",),
        header_style="",
        pad_edge=False,
    )
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(sanitize_text(cell)) for cell in row), style="dim" if row[0].startswith("  ") else None)
    return table
