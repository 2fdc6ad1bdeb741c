"""Shows the figures of `qlora-dpo eval` as tables."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.report.tables import format_interval, make_table
from qlora_dpo.run_folder import Record


def eval_metric_tables(metrics: Record) -> RenderableType:
    """All figures of one adapter; `metrics` is what `eval --json` prints."""
    if "accuracy" not in metrics:
        parts: list[RenderableType] = [_fill_table(f"Held-out answers: {metrics['pairs']}", _answer_rows(metrics))]
        return Group(*parts, *_other_tables(metrics))
    parts = [_fill_table(f"Held-out pairs: {metrics['pairs']}", _main_rows(metrics))]
    if metrics["length"]:
        parts.append(
            _fill_table("Accuracy by length, in tokens", _length_rows(metrics["length"]), ("pairs", "accuracy"))
        )
    parts.append(
        _fill_table("Calibration: sigmoid(margin)", _calibration_rows(metrics["calibration"]), ("pairs", "accuracy"))
    )
    return Group(*parts, *_other_tables(metrics))


def _other_tables(metrics: Record) -> Iterator[RenderableType]:
    """What answers alone are judged by: perplexity, and the tasks and the judge that were asked for."""
    yield _fill_table("Perplexity", _perplexity_rows(metrics), ("tokens", "base", "tuned"))
    if tasks := metrics.get("tasks"):
        yield _fill_table("Tasks of lm-eval", _task_rows(tasks), ("base", "tuned"))
    if judged := metrics.get("judge"):
        yield _fill_table("Answers judged side by side", _judge_rows(judged))


def _answer_rows(metrics: Record) -> Iterator[list[str]]:
    yield ["loss", f"{metrics['loss']:z.4f} +- {1.96 * metrics['loss_stderr']:.4f}"]
    yield ["perplexity", f"{metrics['perplexity']['tuned']:.2f}"]
    yield ["  of the base", f"{metrics['perplexity']['base']:.2f}"]
    yield ["token accuracy", f"{metrics['token_accuracy']:.3f}"]
    yield ["KL(tuned, base), nats per token", f"{metrics['kl']:.4f}"]


def _main_rows(metrics: Record) -> Iterator[list[str]]:
    yield ["accuracy", f"{metrics['accuracy']:.3f}"]
    yield ["  95 % interval", format_interval(*metrics["accuracy_interval"])]
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
    for name, length_bin in length["by_difference"].items():
        yield [f"chosen answer {name}", *_accuracy_cells(length_bin)]
    for length_bin in length["by_length"]:
        yield [f"answers of {length_bin['low']:g} to {length_bin['high']:g}", *_accuracy_cells(length_bin)]


def _accuracy_cells(length_bin: Record) -> list[str]:
    return [
        str(length_bin["pairs"]),
        f"{length_bin['accuracy']:.3f} ({format_interval(*length_bin['accuracy_interval'])})",
    ]


def _calibration_rows(calibration: Record) -> Iterator[list[str]]:
    for bin_ in calibration["bins"]:
        label = f"confidence {bin_['low']:.2f} to {bin_['high']:.2f}, mean {bin_['confidence']:.3f}"
        yield [label, str(bin_["pairs"]), f"{bin_['accuracy']:.3f}"]
    yield ["expected calibration error", "", f"{calibration['ece']:.3f}"]
    yield ["Brier score", "", f"{calibration['brier']:.3f}"]


def _perplexity_rows(metrics: Record) -> Iterator[list[str]]:
    answers = "chosen answers" if "accuracy" in metrics else "answers"
    for name, perplexity in {answers: metrics["perplexity"], **metrics["texts"]}.items():
        yield [name, f"{perplexity['tokens']:,}", f"{perplexity['base']:.2f}", f"{perplexity['tuned']:.2f}"]


def _task_rows(tasks: Record) -> Iterator[list[str]]:
    for task, metrics in tasks.items():
        for metric, values in metrics.items():
            cells = []
            for who in ("base", "tuned"):
                stderr = values[f"{who}_stderr"]
                cells.append(f"{values[who]:.4f}" + (f" +- {1.96 * stderr:.4f}" if stderr else ""))
            yield [f"{task}, {metric.removesuffix(',none')}", *cells]


def _judge_rows(judgement: Record) -> Iterator[list[str]]:
    yield ["tuned against base, win rate", f"{judgement['win_rate']:.3f}"]
    yield ["  95 % interval", format_interval(*judgement["win_rate_interval"])]
    yield ["  wins, ties, losses", f"{judgement['wins']}, {judgement['ties']}, {judgement['losses']}"]
    yield ["  prompts, requests", f"{judgement['prompts']}, {judgement['requests']}"]
    yield ["  prompts with equal answers", str(judgement["equal_answers"])]
    yield ["  replies without a verdict", str(judgement["unclear"])]
    yield ["  verdicts for the first answer", f"{judgement['first_taken']:.3f}"]


def _fill_table(title: str, rows: Iterator[list[str]], columns: tuple[str, ...] = ("",)) -> Table:
    """A table of labelled rows; without column names it has no header."""
    table = make_table(title, show_header=columns != ("",))
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(sanitize_text(cell)) for cell in row), style="dim" if row[0].startswith("  ") else None)
    return table
