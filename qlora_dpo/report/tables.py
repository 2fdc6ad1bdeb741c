"""Makes the tables of a run: results at step 0, best and last; answers by group; figures by epoch."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.run_folder import Record
from qlora_dpo.wilson import wilson_interval

EPOCH_COLUMNS = {
    "Validation Loss": ("eval_loss", "{:z.4f}"),
    "Rewards/chosen": ("eval_rewards/chosen", "{:z.4f}"),
    "Rewards/rejected": ("eval_rewards/rejected", "{:z.4f}"),
    "Rewards/accuracies": ("eval_rewards/accuracies", "{:z.4f}"),
    "Rewards/margins": ("eval_rewards/margins", "{:z.4f}"),
    "Logps/chosen": ("eval_logps/chosen", "{:z.2f}"),
    "Logps/rejected": ("eval_logps/rejected", "{:z.2f}"),
    "Logits/chosen": ("eval_logits/chosen", "{:z.4f}"),
    "Logits/rejected": ("eval_logits/rejected", "{:z.4f}"),
}
SUPERVISED_COLUMNS = {
    "Validation Loss": ("eval_loss", "{:z.4f}"),
    "Perplexity": ("eval_perplexity", "{:.2f}"),
    "Token Accuracy": ("eval_mean_token_accuracy", "{:.4f}"),
    "Logps": ("eval_logps/chosen", "{:z.2f}"),
}
"""The columns where rows have one answer each."""
MISSING_CELL = "-"
"""Shown where a value was not measured."""
MATCHING_COLUMNS = ["base matching", "tuned matching"]
MATCHING_NOTE = "matching: the share of answers that contain samples.count_matching"
TRUNCATED_NOTE = ">= : the token limit stopped some of these answers, so the true mean is higher"


def shown_steps(results: Record) -> list[tuple[str, Record]]:
    """Heading and evaluation of each column of the results table; one that is both best and last appears once."""
    by_step = {record["step"]: record for record in results["evals"]}
    roles: dict[int, list[str]] = {}
    for role in ("first", "best", "last"):
        roles.setdefault(results[role], []).append(role)
    headings = {step: " and ".join(role for role in names if role != "first") for step, names in roles.items()}
    return [
        (f"step {step} ({names})" if names else f"step {step}", by_step[step])
        for step, names in sorted(headings.items())
    ]


def result_rows(results: Record) -> list[tuple[str, list[str]]]:
    """Label and cells of each row of the results table; one cell for each of `shown_steps`."""
    shown = [record for _, record in shown_steps(results)]
    if not are_compared(shown):
        labels = {"eval_loss": "loss", "eval_perplexity": "perplexity", "eval_mean_token_accuracy": "token accuracy"}
        forms = {"eval_loss": "{:z.4f}", "eval_perplexity": "{:.2f}", "eval_mean_token_accuracy": "{:.3f}"}
        rows = [(label, [_format_metric(record, key, forms[key]) for record in shown]) for key, label in labels.items()]
        return [*rows, ("log-prob, nats", [_format_metric(record, "eval_logps/chosen", "{:z.2f}") for record in shown])]
    with_sft = any("eval_sft_loss" in record for record in shown)
    rows = [
        ("loss", [_format_metric(record, "eval_loss", "{:z.4f}") for record in shown]),
        (
            "preference loss",
            [_format_metric(record, "eval_preference_loss", "{:z.4f}") for record in shown] if with_sft else [],
        ),
        ("accuracy", [_format_metric(record, "eval_rewards/accuracies", "{:.3f}") for record in shown]),
        ("  95 % interval", [_accuracy_interval(record) for record in shown]),
        ("  ties", [_format_ties(record) for record in shown]),
        ("margin", [_format_metric(record, "eval_rewards/margins", "{:+z.3f}") for record in shown]),
        ("chosen reward", [_format_metric(record, "eval_rewards/chosen", "{:+z.3f}") for record in shown]),
        ("rejected reward", [_format_metric(record, "eval_rewards/rejected", "{:+z.3f}") for record in shown]),
        ("chosen log-prob, nats", [_format_metric(record, "eval_logps/chosen", "{:z.2f}") for record in shown]),
        ("rejected log-prob, nats", [_format_metric(record, "eval_logps/rejected", "{:z.2f}") for record in shown]),
    ]
    return [(label, cells) for label, cells in rows if cells]


def baseline_rows(results: Record) -> list[tuple[str, str]]:
    """Accuracies of picking by length, which need no model, on the same pairs."""
    baselines = results.get("baselines") or {}
    return [
        (f"pick-the-{which} accuracy", f"{baselines[which]:.3f}")
        for which in ("longer", "shorter")
        if baselines.get(which) is not None
    ]


def results_table(results: Record) -> Table:
    """Held-out figures at step 0, at the best and at the last evaluation, with the baselines to beat."""
    shown = shown_steps(results)
    counted = "pairs" if are_compared([record for _, record in shown]) else "answers"
    table = make_table(f"Held-out {counted}: {results['pairs']['eval']}")
    table.add_column("")
    for heading, _ in shown:
        table.add_column(_wrap_heading(heading), justify="right", no_wrap=True)
    for label, cells in result_rows(results):
        table.add_row(label, *cells, style="dim" if label.startswith("  ") else None)
    table.add_section()
    for label, value in baseline_rows(results):
        table.add_row(label, *[value] * len(shown), style="dim")
    return table


def truncated_groups(samples: Iterable[Record]) -> set[tuple[str, str]]:
    """Each (group, "base" or "tuned") with an answer that was stopped by the token limit."""
    return {
        (_group_label(sample), who)
        for sample in samples
        for who in ("base", "tuned")
        if not sample.get(f"{who}_ended", True)
    }


def answer_cells(answers: Sequence[Record], samples: Iterable[Record]) -> tuple[list[str], list[list[str]], list[str]]:
    """Columns, rows and footnotes of the answers table; a mean over answers that were cut off is marked ">="."""
    truncated = truncated_groups(samples)
    has_matching = any(counts.get("tuned_matching") is not None for counts in answers)
    columns = ["group", "prompts", *(MATCHING_COLUMNS if has_matching else []), "base tokens", "tuned tokens"]
    rows = []
    for counts in answers:
        group = _group_label(counts)
        shares = [_format_percent(counts.get(f"{who}_matching")) for who in ("base", "tuned")] if has_matching else []
        tokens = [
            f"{'>= ' if (group, who) in truncated else ''}{counts[f'{who}_tokens']:.1f}" for who in ("base", "tuned")
        ]
        rows.append([group, str(counts["prompts"]), *shares, *tokens])
    is_marked = any(">= " in cell for row in rows for cell in row[1:])
    notes = ([MATCHING_NOTE] if has_matching else []) + ([TRUNCATED_NOTE] if is_marked else [])
    return columns, rows, notes


def answers_table(answers: Sequence[Record], samples: Iterable[Record] = ()) -> RenderableType:
    """Counts of the answers of base and tuned model to the held-out prompts, by group; tokens are means."""
    columns, rows, notes = answer_cells(answers, samples)
    table = make_table("Greedy answers to held-out prompts")
    for column in columns:
        justify: Literal["left", "right"] = "left" if column == "group" else "right"
        table.add_column(column.replace(" ", "\n"), justify=justify, no_wrap=column != "group", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return Group(table, *(Text(note, style="dim") for note in [*notes, ""]))


def results_markdown(results: Record) -> str:
    """The results table in markdown, for a model card."""
    shown = shown_steps(results)
    rows = [[label.strip(), *cells] for label, cells in result_rows(results)]
    rows += [[label, *[value] * len(shown)] for label, value in baseline_rows(results)]
    return markdown_table(["", *(heading for heading, _ in shown)], rows)


def answers_markdown(answers: Sequence[Record], samples: Iterable[Record] = ()) -> str:
    """The answers table in markdown, for a model card, with its footnotes."""
    columns, rows, notes = answer_cells(answers, samples)
    return "\n".join([markdown_table(columns, rows), *(f"{escape_markdown(note)}\n" for note in notes)])


def epoch_table(records: Sequence[Record]) -> str:
    """The table by epoch in markdown, from the records of metrics.jsonl."""
    return markdown_table(epoch_headings(records), epoch_rows(records))


def epoch_headings(records: Sequence[Record]) -> list[str]:
    """The headings of the table by epoch."""
    return ["Epoch", "Training Loss", *_epoch_columns(records)]


def _epoch_columns(records: Sequence[Record]) -> dict[str, tuple[str, str]]:
    evals = [record for record in records if record["kind"] == "eval"]
    return EPOCH_COLUMNS if not evals or are_compared(evals) else SUPERVISED_COLUMNS


def are_compared(evals: Sequence[Record]) -> bool:
    """False for evaluations on rows of one answer each."""
    return not evals or any("eval_rewards/accuracies" in record or "eval_perplexity" not in record for record in evals)


def epoch_rows(records: Sequence[Record]) -> list[list[str]]:
    """The cells of the table by epoch.

    A training loss is the mean over the epoch's steps: each logged loss is weighted by the steps it covers. Validation
    values are those at the epoch's end; if the last evaluation was earlier, its step is named.
    """
    train = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    end = max((record["epoch"] for record in [*train, *evals]), default=0.0)
    rows, columns = [], _epoch_columns(records)
    for number in range(math.ceil(end - 1e-6)):
        start, stop = float(number), min(number + 1.0, end)
        rows.append([f"{stop:.4g}", _epoch_loss(train, start, stop), *_epoch_values(evals, columns, start, stop)])
    return rows


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; its cells are escaped, so that none can break out of it."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(escape_markdown(cell) for cell in line) + " |" for line in lines) + "\n"


def escape_markdown(text: str) -> str:
    """`text` on one line, with everything escaped that markdown or HTML would interpret."""
    line = html.escape(" ".join(sanitize_text(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def make_table(title: str | None = None, *, show_header: bool = True) -> Table:
    """An empty table in the style of all tables here; one without a title has no outer edge either."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if show_header else box.SIMPLE,
        show_header=show_header,
        show_edge=title is not None,
        header_style="",
        pad_edge=False,
    )


def format_interval(low: float, high: float) -> str:
    """Both ends of an interval of shares: `0.377-0.623`."""
    return f"{low:.3f}-{high:.3f}"


def _epoch_loss(train: Sequence[Record], start: float, stop: float) -> str:
    total = weight = before = 0.0
    for record in train:
        covered = min(record["epoch"], stop) - max(before, start)
        before = record["epoch"]
        if covered > 1e-9:
            value = record["loss"]
            total, weight = total + covered * (math.nan if value is None else value), weight + covered
    return f"{total / weight:.4f}" if weight else MISSING_CELL


def _epoch_values(
    evals: Sequence[Record], columns: Mapping[str, tuple[str, str]], start: float, stop: float
) -> list[str]:
    within = [record for record in evals if start + 1e-6 < record["epoch"] <= stop + 1e-6]
    if not within:
        return [MISSING_CELL] * len(columns)
    newest = within[-1]
    cells = [_format_metric(newest, key, form) for key, form in columns.values()]
    if newest["epoch"] < stop - 1e-6:
        cells[0] += f" (step {newest['step']})"
    return cells


def _wrap_heading(heading: str) -> str:
    """`step 36 (best)` on two lines, so that three such columns fit into 80 characters."""
    step, _, role = heading.partition(" (")
    return f"{role.rstrip(')')}\n{step}" if role else f"\n{step}"


def _format_metric(record: Record, key: str, form: str) -> str:
    value = record.get(key)
    return MISSING_CELL if value is None else form.format(value)


def _accuracy_interval(record: Record) -> str:
    accuracy, pairs = record.get("eval_rewards/accuracies"), record.get("eval_pairs")
    if accuracy is None or not pairs:
        return MISSING_CELL
    return format_interval(*wilson_interval(accuracy * pairs, pairs))


def _format_ties(record: Record) -> str:
    ties = record.get("eval_ties")
    return MISSING_CELL if ties is None else f"{ties:.0f}"


def _group_label(record: Record) -> str:
    return "all" if record.get("group") is None else " ".join(sanitize_text(str(record["group"])).split())


def _format_percent(share: float | None) -> str:
    return MISSING_CELL if share is None else f"{share:.0%}".replace("%", " %")
