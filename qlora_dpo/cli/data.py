"""`qlora-dpo data`: look at preference data as the trainer sees it, find what is odd about it, and split it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qlora_dpo.data.encoded import EncodedPair
    from qlora_dpo.data.pairs import Pair, ParsedRows
    from qlora_dpo.data.sources import DataPart, SourceRows
    from qlora_dpo.recipe import Recipe
    from qlora_dpo.recipe.data import DataTable

LINT_ROWS_SHOWN = 10


@click.group("data", short_help="Look at preference data, find what is odd about it, split it.")
def data_group() -> None:
    """Look at preference data as the trainer sees it, find what is odd about it, and split it.

    \b
    qlora-dpo data show pairs.jsonl
    qlora-dpo data lint pairs.jsonl
    qlora-dpo data split pairs.jsonl -o pairs
    """


@data_group.command("show", short_help="Show pairs as the trainer sees them.")
@click.argument("source")
@click.option("--model", metavar="NAME", help="Show tokens of this model; a recipe names its own.")
@click.option("--row", metavar="N", type=click.IntRange(min=1), help="Show the pairs of this row.")
@click.option("--sample", metavar="N", type=click.IntRange(min=1), help="Show N pairs drawn at random [1]")
@click.option("--tokens", is_flag=True, help="List every token with its number.")
def show_command(source: str, model: str | None, row: int | None, sample: int | None, tokens: bool) -> None:
    """Show pairs of SOURCE, a recipe, data file, folder or hub data set, as the trainer sees them.

    What is read is dim, what is scored is green or red (without colour: between ⟦ and ⟧), and what the template writes
    behind it is struck through.

    \b
    qlora-dpo data show recipes/quickstart.toml --sample 3
    qlora-dpo data show pairs.jsonl --row 17 --model Qwen/Qwen2-0.5B-Instruct --tokens
    """
    import random

    from qlora_dpo.errors import RecipeError

    if row is not None and sample is not None:
        raise click.UsageError("--row and --sample exclude each other")
    table, recipe = _data_table_and_recipe(source)
    rows, found = _parse_part(table, "train")
    if row is not None:
        some = [pair for pair in found.pairs if pair.row == row]
        reason = next((reason for reason, numbers in found.dropped.items() if row in numbers), None)
        if not some:
            raise RecipeError(f"{rows.name}: row {row} is {f'no pair: {reason}' if reason else 'not there'}")
    else:
        some = random.Random(0).sample(found.pairs, min(sample or 1, len(found.pairs)))  # noqa: S311 - no secret
    click.echo(f"{rows.name}: {found.format.value}", err=True)
    tokenizer = _load_tokenizer(model, recipe)
    for pair in sorted(some, key=lambda each: each.row):
        click.echo(_format_pair(pair, tokenizer, rows.location(pair.row), tokens))


@data_group.command("lint", short_help="Find what is odd about preference data.")
@click.argument("source")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every row number.")
@click.option(
    "--fix", "fixed", metavar="OUT", type=click.Path(path_type=Path), help="Write the other rows as JSON lines."
)
@click.option("--strict", is_flag=True, help="Exit with 3 if anything is found.")
def lint_command(source: str, as_json: bool, fixed: Path | None, strict: bool) -> None:
    """Find what is odd about the rows of SOURCE, a recipe, data file, folder or hub data set.

    Rows that are no pairs, repeats, contradictions, answers that repeat the question, length bias, uneven labels and,
    for a recipe, prompts that are both trained on and held out.

    \b
    qlora-dpo data lint recipes/quickstart.toml
    qlora-dpo data lint pairs.jsonl --fix mended.jsonl
    """
    from qlora_dpo.data import lint as linting
    from qlora_dpo.errors import EXIT_GATE

    table, recipe = _data_table_and_recipe(source)
    rows, found = _parse_part(table, "train")
    odd, bias = linting.find_problems(found), linting.length_stats(found.pairs)
    if recipe is not None and (both := linting.prompt_overlap(*_train_and_heldout_pairs(table))):
        odd.append(
            linting.LintFinding(
                "held-out prompts that are trained on", both, "set data.eval_share, or other splits", False
            )
        )
    if fixed is not None:
        left_out = {number for each in odd if each.fixable for number in each.rows}
        kept = [row for number, row in enumerate(rows.rows, 1) if number not in left_out]
        _write_rows(fixed, kept)
        click.echo(f"{fixed}: {len(kept):,} of {len(rows.rows):,} rows", err=True)
    if as_json:
        click.echo(json.dumps({"source": rows.name, "rows": len(rows.rows), **linting.findings_json(found, odd, bias)}))
    else:
        click.echo(f"{rows.name}: {found.format.value}, {len(rows.rows):,} rows, {len(found.pairs):,} pairs")
        for each in odd:
            numbers = ", ".join(map(str, each.rows[:LINT_ROWS_SHOWN])) + (
                ", ..." if len(each.rows) > LINT_ROWS_SHOWN else ""
            )
            click.echo(f"  {len(each.rows):>7,}  {_printable(each.problem)}: rows {numbers}; {each.advice}")
        if bias:
            click.echo(f"  {bias.describe()}")
        if not odd:
            click.echo("  nothing odd")
    if strict and odd:
        raise click.exceptions.Exit(EXIT_GATE)


@data_group.command("split", short_help="Split a data file by prompt.")
@click.argument("source")
@click.option("-o", "folder", metavar="DIR", required=True, type=click.Path(path_type=Path), help="A new folder.")
@click.option(
    "--share", default=0.1, show_default=True, type=click.FloatRange(0, 1, True, True), help="Held-out prompts."
)
def split_command(source: str, folder: Path, share: float) -> None:
    """Write the rows of SOURCE to DIR/train.jsonl and DIR/test.jsonl; no prompt stands in both.

    A recipe then says `train = "DIR"`. Rows that are no pairs are left out and counted.

    \b
    qlora-dpo data split pairs.jsonl -o pairs
    """
    from qlora_dpo.data.pairs import in_eval_share
    from qlora_dpo.errors import RunError

    if folder.exists():
        raise RunError(f"{folder}: is there already; name a new folder with -o DIR")
    table, _ = _data_table_and_recipe(source)
    rows, found = _parse_part(table, "train")
    held = {pair.row for pair in found.pairs if in_eval_share(pair.prompt, share)}
    train = {pair.row for pair in found.pairs} - held
    if not held or not train:
        raise RunError(f"{rows.name}: has too few prompts for a share of {share:g}; name another --share")
    folder.mkdir(parents=True)
    for name, numbers in (("train", train), ("test", held)):
        _write_rows(folder / f"{name}.jsonl", [rows.rows[number - 1] for number in sorted(numbers)])
        click.echo(f"{folder / name}.jsonl: {len(numbers):,} rows")
    if left := sum(map(len, found.dropped.values())):
        click.echo(f"left out: {left:,} rows that are no pairs; qlora-dpo data lint lists them", err=True)


def _data_table_and_recipe(source: str) -> "tuple[DataTable, Recipe | None]":
    """What SOURCE names: the data of a recipe, or data by itself."""
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


def _parse_part(table: "DataTable", part: "DataPart") -> "tuple[SourceRows, ParsedRows]":
    from qlora_dpo.data.mixture import parse_sources

    mixture = parse_sources(table, part, {})
    return mixture.rows, mixture.parsed


def _train_and_heldout_pairs(table: "DataTable") -> "tuple[Sequence[Pair], Sequence[Pair]]":
    """Training and held-out pairs; no held-out ones where a share of the prompts is held out, which cannot overlap."""
    train = _parse_part(table, "train")[1].pairs
    return train, [] if table.effective_eval_share is not None else _parse_part(table, "eval")[1].pairs


def _load_tokenizer(model: str | None, recipe: "Recipe | None") -> Any:
    """The tokenizer that tokens are shown of; None if no model was named."""
    if model is None and recipe is None:
        return None
    from qlora_dpo.model.base import load_tokenizer
    from qlora_dpo.model.sources import fetch_model
    from qlora_dpo.recipe.model import ModelTable

    table = ModelTable(name=model) if model is not None else recipe.model if recipe is not None else None
    assert table is not None  # noqa: S101 - one of them is there
    return load_tokenizer(fetch_model(table))


def _format_pair(pair: "Pair", tokenizer: Any, place: str, tokens: bool) -> str:
    """One pair: its text, or what the tokenizer makes of it."""
    title = click.style(f"{place}" + ("" if pair.label is None else f", label {str(pair.label).lower()}"), bold=True)
    answers = [("chosen", pair.chosen, "green"), ("rejected", pair.rejected, "red")]
    if pair.label is not None:
        answers = [("good" if pair.label else "bad", pair.chosen, "green" if pair.label else "red")]
    if tokenizer is None:
        turns = [f"{click.style(turn['role'], dim=True)}: {_printable(turn['content'])}" for turn in pair.prompt]
        said = [f"{click.style(name, fg=colour, bold=True)}: {_printable(text)}" for name, text, colour in answers]
        return "\n".join([title, *turns, *said, ""])
    from qlora_dpo.data.chat_format import detect_chat_format
    from qlora_dpo.data.chat_template import render_chats
    from qlora_dpo.data.encode import encode_pairs

    form = detect_chat_format(tokenizer)
    encoded = encode_pairs([pair], tokenizer, form)[0]
    if isinstance(encoded, str):
        return "\n".join([title, f"dropped: {encoded}", ""])
    lines = [title]
    if tokens:
        lines += _format_tokens(tokenizer, encoded, [name for name, *_ in answers])
        return "\n".join([*lines, ""])
    for (name, text, colour), ids in zip(answers, (encoded.chosen, encoded.rejected), strict=False):
        chat = [*pair.prompt, {"role": "assistant", "content": text}]
        whole = render_chats(tokenizer, [chat], answered=True)[0]
        prompt, scored = tokenizer.decode(encoded.prompt), tokenizer.decode(ids)
        behind = whole[len(prompt) + len(scored) :] if whole.startswith(prompt + scored) else ""
        lines.append(f"{click.style(name, bold=True)}: {len(encoded.prompt)} tokens read, {len(ids)} scored")
        lines.append(
            click.style(_printable(prompt), dim=True)
            + click.style(_mark_scored(_printable(scored)), fg=colour)
            + (click.style(repr(behind)[1:-1], strikethrough=True) if behind else "")
        )
    return "\n".join([*lines, ""])


def _mark_scored(text: str) -> str:
    """`text` between brackets where there is no colour to tell it by."""
    import os
    import sys

    return text if sys.stdout.isatty() and "NO_COLOR" not in os.environ else f"⟦{text}⟧"


def _format_tokens(tokenizer: Any, encoded: "EncodedPair", names: Sequence[str]) -> list[str]:
    """One token a line: whether it is read or scored, its number, and its text."""
    parts = [("prompt", encoded.prompt), *zip(names, (encoded.chosen, encoded.rejected), strict=False)]
    return [f"{name:<9}{token:>7}  {tokenizer.decode([token])!r}" for name, ids in parts for token in ids]


def _printable(text: str) -> str:
    from qlora_dpo.data.dialogue import sanitize_text

    return sanitize_text(text)


def _write_rows(path: Path, rows: Sequence[Any]) -> None:
    from qlora_dpo.files import atomic_write

    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
