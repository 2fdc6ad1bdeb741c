"""Renders report.html: results, signs of trouble, plots, epochs, answers and samples of a run, in one offline file."""

import base64
import functools
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.redact import redact_secrets
from qlora_dpo.report.card import path_name, strip_local_paths
from qlora_dpo.report.objective_names import describe_objective
from qlora_dpo.report.plots import Plot
from qlora_dpo.report.run_files import RunFiles
from qlora_dpo.report.samples import format_prompt
from qlora_dpo.report.tables import answer_cells, baseline_rows, epoch_headings, epoch_rows, result_rows, shown_steps

PAGE_SAMPLES = 20
"""Largest number of samples on the page; samples.jsonl has all of them."""


def render_run_page(files: RunFiles, plots: Sequence[Plot]) -> str:
    """The text of report.html, free of paths of the machine that the run was made on."""
    run, results = files.run, files.results
    shown = shown_steps(results)
    columns, rows, notes = answer_cells(results.get("answers") or [], files.samples)
    base, data = run["base"], run["data"]
    return render_page(
        "report.html.jinja",
        name=run["name"],
        base=path_name(base["hub_id"] or base["name"]),
        objective=describe_objective(files.objective),
        data=f"{data['train_pairs']:,} pairs of {path_name(data['train'])}",
        pairs=results["pairs"]["eval"],
        headings=[heading for heading, _ in shown],
        results=[*result_rows(results), *((label, [value] * len(shown)) for label, value in baseline_rows(results))],
        signs=results.get("signs") or [],
        plots=[(plot.title, f"data:image/svg+xml;base64,{base64.b64encode(plot.svg).decode()}") for plot in plots],
        epoch_columns=epoch_headings(files.records),
        epochs=epoch_rows(files.records),
        answer_columns=columns,
        answers=rows,
        answer_notes=notes,
        samples=[{**sample, "text": format_prompt(sample["prompt"])} for sample in files.samples[:PAGE_SAMPLES]],
        more=max(0, len(files.samples) - PAGE_SAMPLES),
        command=strip_local_paths(run["command"]),
        facts=[
            f"seed {run['seed']}, {run['steps']} steps",
            f"{run['device']['compute_dtype']} on {run['device']['name']}",
            f"{run['seconds']['total'] / 60:.1f} minutes in all",
            ", ".join(f"{package} {version}" for package, version in run["versions"].items()),
        ],
        recipe=strip_local_paths(redact_secrets(sanitize_text(files.recipe_text))),
    )


def render_page(template: str, **values: Any) -> str:
    """Fill a template of this package into one self-contained HTML page.

    Every value is escaped unless it is Markup, and its control characters are removed.
    """
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    """The templates of this package, each compiled once."""
    return Environment(
        loader=PackageLoader("qlora_dpo.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: sanitize_text(value) if type(value) is str else value,
    )
