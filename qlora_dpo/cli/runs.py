"""`qlora-dpo runs`: all runs of a folder in a table, or what tells two of them apart."""

import json
from pathlib import Path

import click

SORT_CHOICES = ("finished", "name", "loss", "accuracy", "margin", "kl", "minutes")


@click.command("runs", short_help="List runs with their figures, or tell two of them apart.")
@click.argument("words", metavar="[DIR | diff A B]", nargs=-1)
@click.option(
    "--sort",
    type=click.Choice(SORT_CHOICES),
    default="finished",
    show_default=True,
    help="What to sort by, the best first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def runs_command(words: tuple[str, ...], sort: str, as_json: bool) -> None:
    """List the runs in DIR with their held-out figures; absent: adapters. With `diff`: what tells runs A and B apart.

    \b
    qlora-dpo runs --sort accuracy
    qlora-dpo runs diff adapters/hh adapters/hh-fast
    """
    from rich.console import Console

    from qlora_dpo.report.runs import diff_runs, find_runs, run_diff_table, runs_table, sort_runs, summarize_run

    if words[:1] == ("diff",):
        one, other = _two_run_folders(words[1:])
        found = diff_runs(one, other)
        if as_json:
            click.echo(json.dumps(found, ensure_ascii=False))
        else:
            Console().print(run_diff_table(found))
        return
    folders = find_runs(_runs_folder(words))
    if not folders:
        from qlora_dpo.errors import RunError

        raise RunError(
            f"{_runs_folder(words)}: holds no runs; train one first: qlora-dpo train recipes/quickstart.toml"
        )
    listed = sort_runs([summarize_run(each) for each in folders], sort)
    if as_json:
        click.echo(json.dumps({"runs": listed}, ensure_ascii=False))
    else:
        console = Console()
        console.print(runs_table(listed, console.width))


def _runs_folder(words: tuple[str, ...]) -> Path:
    """The folder of the runs."""
    if len(words) > 1:
        raise click.UsageError(f"name one folder, or write: qlora-dpo runs diff {' '.join(words[:2])}")
    return Path(words[0]).expanduser() if words else Path("adapters")


def _two_run_folders(words: tuple[str, ...]) -> tuple[Path, Path]:
    """The two runs that are told apart; each must be one."""
    from qlora_dpo.errors import RecipeError

    if len(words) != 2:
        raise click.UsageError("diff takes two runs, as in: qlora-dpo runs diff adapters/hh adapters/hh-fast")
    one, other = (Path(word).expanduser() for word in words)
    for each in (one, other):
        if not (each / "resolved.toml").is_file():
            raise RecipeError(f"{each}: holds no run; name the folder of one, as in adapters/hh")
    return one, other
