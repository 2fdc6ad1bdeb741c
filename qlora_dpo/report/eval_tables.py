"""Shows the figures of `qlora-dpo eval` as tables for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_dpo.data.dialogue import printable

Record = Mapping[str, Any]


def judgement_tables(found: Record) -> RenderableType:
    """All figures of one adapter, which `eval --json` has under the same names."""
    parts: list[RenderableType] = [_table(f"Held-out pairs: {found['pairs']}", _main_rows(found))]
    if found["length"]:
        parts.append(_table("Accuracy by length, in tokens", _length_rows(found["length"]), ("pairs", "accuracy")))
    parts.append(_table("Calibration: sigmoid(margin)", _calibration_rows(found["calibration"]), ("pairs", "accuracy")))
    parts.append(_table("Perplexity", _perplexity_rows(found), ("tokens", "base", "tuned")))
    if tasks := found.get("tasks"):
        parts.append(_table("Tasks of lm-eval", _task_rows(tasks), ("base", "tuned")))
    if judged := found.get("judge"):
        parts.append(_table("Answers judged side by side", _judge_rows(judged)))
    return Group(*parts)


def _main_rows(found: Record) -> Iterator[list[str]]:
    yield ["accuracy", f"{found['accuracy']:.3f}"]
    yield ["  95 % interval", _interval(found["accuracy_interval"])]
    yield ["  ties", str(found["ties"])]
    if length := found["length"]:
        yield ["  at equal lengths", f"{length['controlled_accuracy']:.3f}"]
        for which in ("longer", "shorter"):
            yield [f"  pick-the-{which}", f"{length['baselines'][which]:.3f}"]
    yield ["loss", f"{found['loss']:z.4f} +- {1.96 * found['loss_stderr']:.4f}"]
    if abs(found["loss"] - found["preference_loss"]) > 5e-5:
        yield ["  preference loss", f"{found['preference_loss']:z.4f}"]
    yield ["margin", f"{found['margin']:+z.3f} +- {1.96 * found['margin_stderr']:.3f}"]
    for side in ("chosen", "rejected"):
        yield [f"  {side} reward", f"{found['rewards'][side]:+z.3f}"]
    yield ["KL(tuned, base), nats per token", f"{found['kl']:.4f}"]


def _length_rows(length: Record) -> Iterator[list[str]]:
    for name, each in length["by_difference"].items():
        yield [f"chosen answer {name}", *_share(each)]
    for each in length["by_length"]:
        yield [f"answers of {each['low']:g} to {each['high']:g}", *_share(each)]


def _share(each: Record) -> list[str]:
    return [str(each["pairs"]), f"{each['accuracy']:.3f} ({_interval(each['accuracy_interval'])})"]


def _calibration_rows(found: Record) -> Iterator[list[str]]:
    for each in found["bins"]:
        words = f"confidence {each['low']:.2f} to {each['high']:.2f}, mean {each['confidence']:.3f}"
        yield [words, str(each["pairs"]), f"{each['accuracy']:.3f}"]
    yield ["expected calibration error", "", f"{found['ece']:.3f}"]
    yield ["Brier score", "", f"{found['brier']:.3f}"]


def _perplexity_rows(found: Record) -> Iterator[list[str]]:
    for name, each in {"chosen answers": found["perplexity"], **found["texts"]}.items():
        yield [name, f"{each['tokens']:,}", f"{each['base']:.2f}", f"{each['tuned']:.2f}"]


def _task_rows(tasks: Record) -> Iterator[list[str]]:
    for task, metrics in tasks.items():
        for metric, each in metrics.items():
            cells = []
            for who in ("base", "tuned"):
                error = each[f"{who}_stderr"]
                cells.append(f"{each[who]:.4f}" + (f" +- {1.96 * error:.4f}" if error else ""))
            yield [f"{task}, {metric.removesuffix(',none')}", *cells]


def _judge_rows(judged: Record) -> Iterator[list[str]]:
    yield ["tuned against base, win rate", f"{judged['win_rate']:.3f}"]
    yield ["  95 % interval", _interval(judged["win_rate_interval"])]
    yield ["  wins, ties, losses", f"{judged['wins']}, {judged['ties']}, {judged['losses']}"]
    yield ["  prompts, requests", f"{judged['prompts']}, {judged['requests']}"]
    yield ["  prompts with equal answers", str(judged["equal_answers"])]
    yield ["  replies without a verdict", str(judged["unclear"])]
    yield ["  verdicts for the first answer", f"{judged['first_taken']:.3f}"]


def _interval(both: tuple[float, float]) -> str:
    return f"{both[0]:.3f}-{both[1]:.3f}"


def _table(title: str, rows: Iterator[list[str]], columns: tuple[str, ...] = ("",)) -> Table:
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
        table.add_row(*(Text(printable(cell)) for cell in row), style="dim" if row[0].startswith("  ") else None)
    return table
