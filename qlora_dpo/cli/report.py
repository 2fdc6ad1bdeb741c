"""`qlora-dpo report`: model card, plots and report.html of a run, written anew."""

from pathlib import Path

import click


@click.command(short_help="Write model card, plots and report.html of a run.")
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
def report(adapter: Path | None) -> None:
    """Write README.md, plots/ and report.html of ADAPTER from what its run logged; absent: the newest adapter.

    `train` does so at its end; this writes them anew. report.html is one file and asks no network.

    \b
    qlora-dpo report adapters/hh
    """
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.report.write import write_report
    from qlora_dpo.run_folder import newest

    folder = newest() if adapter is None else adapter.expanduser()
    if not folder.is_dir():
        raise RecipeError(f"{folder}: there is no such folder; name the folder of a run, as in adapters/hh")
    for path in write_report(folder, _base(folder)):
        click.echo(path)


def _base(folder: Path) -> Path | None:
    """The folder of the base, which may name a licence; None if it is not at hand."""
    from qlora_dpo.errors import QloraDpoError
    from qlora_dpo.model.sources import fetch
    from qlora_dpo.run_folder import described

    try:
        return fetch(described(folder)[0]).folder
    except QloraDpoError:
        return None
