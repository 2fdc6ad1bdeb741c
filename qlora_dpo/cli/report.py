"""`qlora-dpo report`: model card, plots and report.html of a run, written anew."""

from pathlib import Path

import click


@click.command("report", short_help="Write model card, plots and report.html of a run.")
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
def report_command(adapter: Path | None) -> None:
    """Write README.md, plots/ and report.html of ADAPTER from what its run logged; absent: the newest adapter.

    `train` does so at its end; this writes them anew. report.html is one file and asks no network.

    \b
    qlora-dpo report adapters/hh
    """
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.report.write import write_report
    from qlora_dpo.run_folder import newest_adapter

    folder = newest_adapter() if adapter is None else adapter.expanduser()
    if not folder.is_dir():
        raise RecipeError(f"{folder}: there is no such folder; name the folder of a run, as in adapters/hh")
    for path in write_report(folder, _base_folder(folder)):
        click.echo(path)


def _base_folder(folder: Path) -> Path | None:
    """The folder of the base, which may name a licence; None if it is not at hand."""
    from qlora_dpo.errors import QloraDpoError
    from qlora_dpo.model.sources import fetch_model
    from qlora_dpo.run_folder import read_run_metadata

    try:
        return fetch_model(read_run_metadata(folder)[0]).folder
    except QloraDpoError:
        return None
