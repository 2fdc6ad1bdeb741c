"""`qlora-dpo runs`: lists the runs of a folder, or compares two of them."""

import json
from pathlib import Path

import click

SORT_CHOICES = ("finished", "name", "loss", "accuracy", "margin", "kl", "minutes")


@click.command("runs", short_help="List runs with their results, or compare two of them.")
@click.argument("arguments", metavar="[DIR | diff A B]", nargs=-1)
@click.option(
    "--sort",
    type=click.Choice(SORT_CHOICES),
    default="finished",
    show_default=True,
    help="Key to sort by, best first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def runs_command(arguments: tuple[str, ...], sort: str, as_json: bool) -> None:
    """List the runs in DIR, by default adapters, with their held-out results; `diff` shows how runs A and B differ.

    \b
    qlora-dpo runs --sort accuracy
    qlora-dpo runs diff adapters/hh adapters/hh-fast
    """
    from rich.console import Console

    from qlora_dpo.errors import RunError
    from qlora_dpo.report.runs import diff_runs, find_runs, run_diff_table, runs_table, sort_runs, summarize_run
    from qlora_dpo.tracking.console import printable

    if arguments[:1] == ("diff",):
        diff = diff_runs(*_two_run_folders(arguments[1:]))
        if as_json:
            click.echo(json.dumps(diff, ensure_ascii=False))
        else:
            Console().print(run_diff_table(diff))
        return
    home = _runs_folder(arguments)
    folders = find_runs(home)
    if not folders:
        raise RunError(f"{home}: holds no runs; train one first: qlora-dpo train recipes/quickstart.toml")
    summaries, unreadable = [], list[RunError]()
    for folder in folders:
        try:
            summaries.append(summarize_run(folder))
        except RunError as error:
            unreadable.append(error)
    if not summaries:
        raise unreadable[0]
    for problem in unreadable:
        click.echo(f"left out: {printable(str(problem))}", err=True)
    runs = sort_runs(summaries, sort)
    if as_json:
        left_out = {"unreadable": [str(problem) for problem in unreadable]} if unreadable else {}
        click.echo(json.dumps({"runs": runs, **left_out}, ensure_ascii=False))
    else:
        console = Console()
        console.print(runs_table(runs, console.width))


def _runs_folder(arguments: tuple[str, ...]) -> Path:
    """The folder whose runs are listed."""
    if len(arguments) > 1:
        raise click.UsageError(f"name one folder, or write: qlora-dpo runs diff {' '.join(arguments[:2])}")
    return Path(arguments[0]).expanduser() if arguments else Path("adapters")


def _two_run_folders(arguments: tuple[str, ...]) -> tuple[Path, Path]:
    """The folders of the two runs to compare; raises RecipeError if one of them holds no run."""
    from qlora_dpo.errors import RecipeError

    if len(arguments) != 2:
        raise click.UsageError("diff takes two runs, as in: qlora-dpo runs diff adapters/hh adapters/hh-fast")
    one, other = (Path(argument).expanduser() for argument in arguments)
    for folder in (one, other):
        if not (folder / "resolved.toml").is_file():
            raise RecipeError(f"{folder}: holds no run; name the folder of a run, as in adapters/hh")
    return one, other
