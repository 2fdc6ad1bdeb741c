"""The page of a run: results, signs of trouble, plots, epochs, answers and samples, in one file that asks nobody."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.redact import redact_secrets
from qlora_dpo.report.card import path_name, strip_local_paths
from qlora_dpo.report.objective_names import describe_objective
from qlora_dpo.report.page import render_page
from qlora_dpo.report.plots import Plot
from qlora_dpo.report.samples import format_prompt
from qlora_dpo.report.tables import EPOCH_COLUMNS, answer_cells, baseline_rows, epoch_rows, result_rows, shown_steps

PAGE_SAMPLES = 20
"""Samples that are shown; samples.jsonl has them all."""

Record = Mapping[str, Any]


def render_run_page(
    run: Record,
    results: Record,
    samples: Sequence[Record],
    records: Sequence[Record],
    recipe_text: str,
    objective: Record,
    plots: Sequence[Plot],
) -> str:
    """report.html of a run directory; no path of the machine it was made on is in it."""
    shown = shown_steps(results)
    columns, rows, notes = answer_cells(results.get("answers") or [], samples)
    base, data = run["base"], run["data"]
    return render_page(
        "report.html.jinja",
        name=run["name"],
        base=path_name(base["hub_id"] or base["name"]),
        objective=describe_objective(objective),
        data=f"{data['train_pairs']:,} pairs of {path_name(data['train'])}",
        pairs=results["pairs"]["eval"],
        headings=[heading for heading, _ in shown],
        results=[*result_rows(results), *((label, [value] * len(shown)) for label, value in baseline_rows(results))],
        signs=results.get("signs") or [],
        plots=[(plot.title, f"data:image/svg+xml;base64,{base64.b64encode(plot.svg).decode()}") for plot in plots],
        epoch_columns=["Epoch", "Training Loss", *EPOCH_COLUMNS],
        epochs=epoch_rows(records),
        answer_columns=columns,
        answers=rows,
        answer_notes=notes,
        samples=[{**each, "text": format_prompt(each["prompt"])} for each in samples[:PAGE_SAMPLES]],
        more=max(0, len(samples) - PAGE_SAMPLES),
        command=strip_local_paths(run["command"]),
        facts=[
            f"seed {run['seed']}, {run['steps']} steps",
            f"{run['device']['compute_dtype']} on {run['device']['name']}",
            f"{run['seconds']['total'] / 60:.1f} minutes in all",
            ", ".join(f"{package} {version}" for package, version in run["versions"].items()),
        ],
        recipe=strip_local_paths(redact_secrets(sanitize_text(recipe_text))),
    )
