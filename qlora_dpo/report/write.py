"""Writes the report of a run from the files that it logged: model card, plots and report.html."""

from pathlib import Path

from huggingface_hub import ModelCard
from pydantic import ValidationError

from qlora_dpo.errors import RunError
from qlora_dpo.files import atomic_write
from qlora_dpo.report.card import model_card
from qlora_dpo.report.plots import draw_plots
from qlora_dpo.report.run_files import read_run_files
from qlora_dpo.report.run_page import render_run_page
from qlora_dpo.run_folder import METRICS

REQUIRED_FILES = ("run.json", "results.json", METRICS, "resolved.toml")


def write_report(folder: Path, base: Path | None) -> list[Path]:
    """Write README.md, plots/ and report.html of a finished run; returns their paths.

    `base` is the folder of its base model, whose card may name a licence. Raises RunError if a file of a finished run
    is missing or damaged.
    """
    if missing := [name for name in REQUIRED_FILES if not (folder / name).is_file()]:
        raise RunError(f"{folder}: has no {missing[0]}, which a finished run leaves; name the folder of a finished run")
    try:
        files = read_run_files(folder)
        plots = draw_plots(files.records, files.results)
        card = model_card(files, base_licence(base) if base else None)
        page = render_run_page(files, plots)
    except (ValueError, KeyError, TypeError, StopIteration, ValidationError) as error:
        raise RunError(
            f"{folder}: its files do not fit together or are damaged ({type(error).__name__}: {str(error)[:60]}); take "
            "them from a backup"
        ) from error
    contents = {folder / "README.md": card.encode(), folder / "report.html": page.encode()}
    for plot in plots:
        contents |= {folder / "plots" / f"{plot.name}.svg": plot.svg, folder / "plots" / f"{plot.name}.png": plot.png}
    for path, content in contents.items():
        atomic_write(path, content)
    return list(contents)


def base_licence(folder: Path) -> str | None:
    """The licence in the metadata of the model card in a base model's folder; None if it names none."""
    try:
        licence = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except Exception:  # there is no card, or its metadata are not YAML, for which its reader has errors of its own
        return None
    return licence if isinstance(licence, str) else None
