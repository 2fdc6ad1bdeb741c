"""`qlora-dpo report`: writes model card, plots and report.html of a run."""

from pathlib import Path

import click


@click.command("report", short_help="Write model card, plots and report.html of a run.")
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
def report_command(adapter: Path | None) -> None:
    """Write README.md, plots/ and report.html of ADAPTER, by default the newest one, from what its run logged.

    `train` does this at its end; use this command to write them again. report.html is one file and needs no network.

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
    """The folder of the base, whose card may name a licence; None if it cannot be fetched."""
    from qlora_dpo.errors import QloraDpoError
    from qlora_dpo.model.sources import fetch_model
    from qlora_dpo.run_folder import read_run_metadata

    try:
        return fetch_model(read_run_metadata(folder)[0]).folder
    except QloraDpoError:
        return None
