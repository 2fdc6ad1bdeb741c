"""`qlora-dpo data`: shows preference data as the trainer sees it, finds problems in it, and splits it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.data.encoded import EncodedPair
    from qlora_dpo.data.files import Row
    from qlora_dpo.data.lint import LintFinding
    from qlora_dpo.data.pairs import Pair, ParsedRows
    from qlora_dpo.data.sources import DataPart, SourceRows
    from qlora_dpo.data.templates.template_lint import TokenQuantiles
    from qlora_dpo.evaluation.pair_forecast import PairForecast
    from qlora_dpo.recipe import Recipe
    from qlora_dpo.recipe.data import DataTable

LINT_ROWS_SHOWN = 10


@click.group("data", short_help="Show preference data, find problems in it, split it.")
def data_group() -> None:
    """Show preference data as the trainer sees it, find problems in it, and split it.

    \b
    qlora-dpo data show pairs.jsonl
    qlora-dpo data lint pairs.jsonl
    qlora-dpo data split pairs.jsonl -o pairs
    """


@data_group.command("show", short_help="Show pairs as the trainer sees them.")
@click.argument("source")
@click.option("--model", metavar="NAME", help="Show the tokens of this model [the recipe's]")
@click.option("--row", metavar="N", type=click.IntRange(min=1), help="Show the pairs of this row.")
@click.option("--sample", metavar="N", type=click.IntRange(min=1), help="Show N pairs drawn at random [1]")
@click.option("--tokens", is_flag=True, help="List every token with its id.")
def show_command(source: str, model: str | None, row: int | None, sample: int | None, tokens: bool) -> None:
    """Show pairs of SOURCE, a recipe, data file, folder or hub data set, as the trainer sees them.

    Tokens that are only read are dim, scored ones are green or red (without colour: between ⟦ and ⟧), and what the
    template adds after them is struck through.

    \b
    qlora-dpo data show recipes/quickstart.toml --sample 3
    qlora-dpo data show pairs.jsonl --row 17 --model Qwen/Qwen2-0.5B-Instruct --tokens
    """
    import random

    from qlora_dpo.errors import DataError, RecipeError

    if row is not None and sample is not None:
        raise click.UsageError("--row and --sample exclude each other")
    table, recipe = _data_table_and_recipe(source)
    tokenizer = _load_tokenizer(model, recipe)
    rows, parsed = _parse_part(table, "train", recipe, tokenizer)
    if row is not None:
        pairs = [pair for pair in parsed.pairs if pair.row == row]
        reason = next((reason for reason, numbers in parsed.dropped.items() if row in numbers), None)
        if not pairs:
            raise RecipeError(f"{rows.name}: row {row} is {f'no pair: {reason}' if reason else 'not there'}")
    else:
        if not parsed.pairs:
            raise DataError(f"{rows.name}: holds no pair: {_reasons(parsed, rows)}")
        pairs = random.Random(0).sample(parsed.pairs, min(sample or 1, len(parsed.pairs)))  # noqa: S311 - no secret
    click.echo(f"{rows.name}: {parsed.format.value}", err=True)
    for pair in sorted(pairs, key=lambda pair: pair.row):
        text = _format_pair(pair, tokenizer, rows.location(pair.row), tokens)
        click.echo(text, color=None if _has_colour() else False)


@data_group.command("lint", short_help="Find problems in preference data.")
@click.argument("source")
@click.option("--model", metavar="NAME", help="Also find what this model and its template make of the rows.")
@click.option("--no-forecast", is_flag=True, help="With --model, do not load its weights: its template alone is asked.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every row number.")
@click.option(
    "--fix",
    "fixed",
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="Write the rows without fixable problems as JSON lines, mended where that is possible.",
)
@click.option("--strict", is_flag=True, help="Exit with 3 if there are problems.")
def lint_command(
    source: str, model: str | None, no_forecast: bool, as_json: bool, fixed: Path | None, strict: bool
) -> None:
    """Find problems in the rows of SOURCE, a recipe, data file, folder or hub data set.

    Reports rows that are no pairs, duplicates, contradictions, answers that repeat the question, keys that stand twice,
    length bias, unbalanced labels and, for a recipe, prompts that are both trained on and held out; with a model, also
    what its template refuses or changes, pairs that are too long, and whether 200 of the pairs can teach it anything.

    \b
    qlora-dpo data lint recipes/quickstart.toml
    qlora-dpo data lint pairs.jsonl --fix mended.jsonl
    qlora-dpo data lint pairs.jsonl --model Qwen/Qwen2-0.5B-Instruct
    """
    from qlora_dpo.cli.text.forecast_text import figure_lines
    from qlora_dpo.data import lint as linting
    from qlora_dpo.errors import EXIT_GATE
    from qlora_dpo.evaluation.pair_forecast import forecast_warnings

    if no_forecast and model is None:
        raise click.UsageError("--no-forecast goes with --model; leave it out")
    table, recipe = _data_table_and_recipe(source)
    opened = _open_model(model) if model is not None and not no_forecast else None
    tokenizer: Any = opened.tokenizer if opened else _load_tokenizer(model, recipe) if model is not None else None
    rows, parsed = _parse_part(table, "train", recipe, tokenizer)
    findings, bias = linting.find_problems(parsed), linting.length_stats(parsed.pairs)
    if recipe is not None and (shared := linting.prompt_overlap(*_train_and_heldout_pairs(table, recipe))):
        findings.append(
            linting.LintFinding(
                "held-out prompts that are trained on", shared, "set data.eval_share, or other splits", False
            )
        )
    tokens: TokenQuantiles = {}
    if tokenizer is not None:
        from qlora_dpo.data.templates.template_lint import find_template_problems

        template_findings, tokens = find_template_problems(parsed.pairs, tokenizer, table)
        findings += template_findings
    forecast = _forecast(opened, table, parsed.pairs) if opened is not None and parsed.pairs else None
    warnings = list(forecast_warnings(forecast).values()) if forecast is not None else []
    if fixed is not None:
        _write_mended_rows(fixed, rows, parsed, findings)
    if as_json:
        record = {"source": rows.name, "rows": len(rows.rows), **linting.findings_json(parsed, findings, bias)}
        quantiles = {part: dict(zip(("p50", "p95", "max"), each, strict=True)) for part, each in tokens.items()}
        judged = {"tokens": quantiles, "forecast": forecast and forecast.to_dict() | {"warnings": warnings}}
        click.echo(json.dumps(record | (judged if model is not None else {})))
    else:
        click.echo(f"{rows.name}: {parsed.format.value}, {len(rows.rows):,} rows, {len(parsed.pairs):,} pairs")
        for finding in findings:
            numbers = ", ".join(map(str, finding.rows[:LINT_ROWS_SHOWN])) + (
                ", ..." if len(finding.rows) > LINT_ROWS_SHOWN else ""
            )
            click.echo(f"  {len(finding.rows):>7,}  {_printable(finding.problem)}: rows {numbers}; {finding.advice}")
        if bias:
            click.echo(f"  {bias.describe()}")
        if tokens:
            each = ", ".join(f"{part} {' / '.join(map(str, lengths))}" for part, lengths in tokens.items())
            click.echo(f"  tokens (p50 / p95 / max): {each}")
        if forecast is not None:
            click.echo("\n".join(f"  {line}" for line in (*figure_lines(forecast), *warnings)))
        if not findings and not warnings:
            click.echo("  nothing odd")
    if strict and (findings or warnings):
        raise click.exceptions.Exit(EXIT_GATE)


@data_group.command("split", short_help="Split a data file by prompt.")
@click.argument("source")
@click.option("-o", "folder", metavar="DIR", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option(
    "--share",
    default=0.1,
    show_default=True,
    type=click.FloatRange(0, 1, True, True),
    help="Share of the prompts to hold out.",
)
def split_command(source: str, folder: Path, share: float) -> None:
    """Write the rows of SOURCE to DIR/train.jsonl and DIR/test.jsonl, with no prompt in both.

    Set `train = "DIR"` in a recipe to use them. Rows that are no pairs are left out and counted.

    \b
    qlora-dpo data split pairs.jsonl -o pairs
    """
    from qlora_dpo.data.pairs import first_question, in_eval_share
    from qlora_dpo.errors import RunError

    if folder.exists():
        raise RunError(f"{folder}: is there already; name a new folder with -o DIR")
    table, recipe = _data_table_and_recipe(source)
    rows, parsed = _parse_part(table, "train", recipe)
    heldout = {
        pair.row
        for pair in parsed.pairs
        if in_eval_share(pair.prompt if pair.rejected else first_question(pair.prompt), share)
    }
    train = {pair.row for pair in parsed.pairs} - heldout
    if not heldout or not train:
        raise RunError(f"{rows.name}: has too few prompts for a share of {share:g}; name another --share")
    folder.mkdir(parents=True)
    for name, numbers in (("train", train), ("test", heldout)):
        _write_rows(folder / f"{name}.jsonl", [rows.rows[number - 1] for number in sorted(numbers)])
        click.echo(f"{folder / name}.jsonl: {len(numbers):,} rows")
    if dropped := sum(map(len, parsed.dropped.values())):
        click.echo(f"left out: {dropped:,} rows that are no pairs; qlora-dpo data lint lists them", err=True)


def _open_model(model: str) -> "OpenedModel":
    """The model whose judgement is asked for: a full one, or an adapter on its base."""
    from qlora_dpo.cli.startup.libraries import import_libraries

    import_libraries()
    from qlora_dpo.adapter import open_model

    return open_model(model)


def _forecast(opened: "OpenedModel", table: "DataTable", pairs: "Sequence[Pair]") -> "PairForecast | None":
    """What the model itself says of the pairs."""
    from qlora_dpo.on_policy.forecast import MAX_FORECAST_PAIRS, forecast_rows
    from qlora_dpo.tracking.progress import show_reading_progress

    with show_reading_progress("forecast", min(MAX_FORECAST_PAIRS, len(pairs))) as advance:
        return forecast_rows(opened, pairs, table.max_length, advance)


def _write_mended_rows(path: Path, rows: "SourceRows", parsed: "ParsedRows", findings: "Sequence[LintFinding]") -> None:
    """Write the rows that no finding removes, without the question at the head of their answers, and say so."""
    from qlora_dpo.data.lint import QUESTION_FIRST, leave_question_out

    def rows_of(is_meant: "Callable[[LintFinding], bool]") -> set[int]:
        return {number for finding in findings if is_meant(finding) for number in finding.rows}

    to_mend = rows_of(lambda finding: finding.problem == QUESTION_FIRST)
    removed = rows_of(lambda finding: finding.fixable and finding.problem != QUESTION_FIRST)
    pairs_by_row = dict[int, "list[Pair]"]()
    for pair in parsed.pairs if to_mend else ():
        pairs_by_row.setdefault(pair.row, []).append(pair)
    kept, mended, beyond_mending = list[Any](), 0, 0
    for number, row in enumerate(rows.rows, 1):
        if number in removed:
            continue
        if number not in to_mend:
            kept.append(row)
        elif (changed := leave_question_out(row, pairs_by_row[number])) is not None:
            kept.append(changed)
            mended += 1
        else:
            beyond_mending += 1
    _write_rows(path, kept)
    click.echo(f"{path}: {len(kept):,} of {len(rows.rows):,} rows", err=True)
    if mended:
        click.echo(f"{path}: the question at the head of the answers is left out of {mended:,} rows", err=True)
    if beyond_mending:
        click.echo(f"{path}: {beyond_mending:,} rows are left out, which are no pairs without the question", err=True)
    if twice := len(parsed.repeated_keys.keys() - removed):
        click.echo(f"{path}: {twice:,} rows have the last value of a key that stands twice", err=True)


def _data_table_and_recipe(source: str) -> "tuple[DataTable, Recipe | None]":
    """The data that SOURCE names, and the recipe if it is one."""
    from pydantic import ValidationError

    from qlora_dpo.errors import RecipeError
    from qlora_dpo.recipe import recipe
    from qlora_dpo.recipe.data import DataTable

    if source.endswith(".toml"):
        loaded = recipe.load_recipe(source)
        return loaded.recipe.data, loaded.recipe
    name = str(Path(source).expanduser().resolve()) if Path(source).expanduser().exists() else source
    try:
        return DataTable(train=name), None
    except ValidationError as error:
        raise RecipeError(f"{source}: names no data") from error


def _parse_part(
    table: "DataTable", part: "DataPart", recipe: "Recipe | None", tokenizer: Any = None
) -> "tuple[SourceRows, ParsedRows]":
    """The rows of a part and their pairs; a file without a recipe may hold questions and answers too."""
    from qlora_dpo.data.mixture import parse_sources

    own_marks = None
    if tokenizer is not None:
        from qlora_dpo.data.templates.template_marks import find_own_marks

        own_marks = find_own_marks(tokenizer)
    supervised = recipe is None or recipe.objective.loss_type == "sft"
    mixture = parse_sources(table, part, {}, own_marks=own_marks, supervised=supervised)
    return mixture.rows, mixture.parsed


def _train_and_heldout_pairs(table: "DataTable", recipe: "Recipe") -> "tuple[Sequence[Pair], Sequence[Pair]]":
    """Training and held-out pairs; an empty second part where `eval_share` holds out prompts, so none can overlap."""
    train = _parse_part(table, "train", recipe)[1].pairs
    return train, [] if table.effective_eval_share is not None else _parse_part(table, "eval", recipe)[1].pairs


def _load_tokenizer(model: str | None, recipe: "Recipe | None") -> Any:
    """The tokenizer to show tokens of; None if no model was named."""
    from qlora_dpo.recipe.model import ModelTable

    if model is not None:
        folder = Path(model).expanduser()
        table = ModelTable(name=str(folder.resolve()) if folder.is_dir() else model)
    elif recipe is not None:
        table = recipe.model
    else:
        return None
    from qlora_dpo.data.templates.template_settings import apply_template_settings
    from qlora_dpo.model.sources import fetch_model
    from qlora_dpo.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(fetch_model(table))
    for sentence in apply_template_settings(tokenizer, table, table.name):
        click.echo(sentence, err=True)
    return tokenizer


def _format_pair(pair: "Pair", tokenizer: Any, location: str, tokens: bool) -> str:
    """One pair as text, or as tokens if there is a tokenizer."""
    title = click.style(f"{location}" + ("" if pair.label is None else f", label {str(pair.label).lower()}"), bold=True)
    answers = [("chosen", pair.chosen, "green"), ("rejected", pair.rejected, "red")]
    if not pair.rejected:
        answers = [("answer", pair.chosen, "green")]
    elif pair.label is not None:
        answers = [("good" if pair.label else "bad", pair.chosen, "green" if pair.label else "red")]
    if tokenizer is None:
        turns = [f"{click.style(turn['role'], dim=True)}: {_printable(turn['content'])}" for turn in pair.prompt]
        replies = [f"{click.style(name, fg=colour, bold=True)}: {_printable(text)}" for name, text, colour in answers]
        return "\n".join([title, *turns, *replies, ""])
    from qlora_dpo.data.encode import encode_pairs
    from qlora_dpo.data.templates.chat_format import detect_chat_format
    from qlora_dpo.data.templates.chat_template import render_chats

    encoded = encode_pairs([pair], tokenizer, detect_chat_format(tokenizer))[0]
    if isinstance(encoded, str):
        return "\n".join([title, f"dropped: {encoded}", ""])
    lines = [title]
    if tokens:
        lines += _format_tokens(tokenizer, encoded, [name for name, *_ in answers])
        return "\n".join([*lines, ""])
    for (name, text, colour), ids in zip(answers, (encoded.chosen, encoded.rejected), strict=False):
        chat = [*pair.prompt, {"role": "assistant", "content": text}]
        rendered = render_chats(tokenizer, [chat], answered=True)[0]
        prompt, scored = tokenizer.decode(encoded.prompt), tokenizer.decode(ids)
        suffix = rendered[len(prompt) + len(scored) :] if rendered.startswith(prompt + scored) else ""
        lines.append(f"{click.style(name, bold=True)}: {len(encoded.prompt)} tokens read, {len(ids)} scored")
        lines.append(
            click.style(_printable(prompt), dim=True)
            + click.style(_mark_scored(_printable(scored)), fg=colour)
            + (click.style(repr(suffix)[1:-1], strikethrough=True) if suffix else "")
        )
    return "\n".join([*lines, ""])


def _mark_scored(text: str) -> str:
    """`text`, between brackets if the output has no colour to mark it."""
    return text if _has_colour() else f"⟦{text}⟧"


def _has_colour() -> bool:
    """True on a terminal, unless NO_COLOR is set."""
    import os
    import sys

    return sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _reasons(parsed: "ParsedRows", rows: "SourceRows") -> str:
    """The reasons why rows are no pairs, with the place of the first row of each."""
    reasons = [
        f"{_printable(reason)} ({len(numbers):,}, first {rows.location(numbers[0])})"
        for reason, numbers in parsed.dropped.items()
    ]
    return ", ".join(reasons[:5]) + (", ..." if len(reasons) > 5 else "")


def _format_tokens(tokenizer: Any, encoded: "EncodedPair", names: Sequence[str]) -> list[str]:
    """One line per token: its part of the pair, its id and its text."""
    parts = [("prompt", encoded.prompt), *zip(names, (encoded.chosen, encoded.rejected), strict=False)]
    return [f"{name:<9}{token:>7}  {tokenizer.decode([token])!r}" for name, ids in parts for token in ids]


def _printable(text: str) -> str:
    from qlora_dpo.data.dialogue import sanitize_text

    return sanitize_text(text)


def _write_rows(path: Path, rows: "Iterable[Row]") -> None:
    """Write rows as JSON lines, and say which values JSON does not have."""
    from qlora_dpo.cli.text.json_rows import json_rows
    from qlora_dpo.files import atomic_write

    written = json_rows(rows)
    atomic_write(path, written.text)
    for note in written.notes():
        click.echo(f"{path}: {note}", err=True)
