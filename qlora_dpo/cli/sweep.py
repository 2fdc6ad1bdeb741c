"""`qlora-dpo sweep`: trains a recipe with every combination of some values, and writes the best recipe."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_dpo.cli.options import set_option, translate_aliases
from qlora_dpo.cli.startup.libraries import import_libraries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_dpo.recipe.grid import GridPoint, SweepAxis


@click.command("sweep", short_help="Train a recipe with every combination of some values, and show which is best.")
@click.argument("recipe_file", metavar="RECIPE")
@click.option(
    "--over",
    metavar="KEY=[VALUE,...]",
    multiple=True,
    callback=translate_aliases,
    help="Key of the recipe and its values: lora.r=[8,16]. If repeated, all combinations are trained.",
)
@click.option(
    "--probe",
    metavar="KEY,...",
    is_flag=False,
    flag_value="train.learning_rate",
    help="Short runs, of 200 pairs, over a range of these keys [train.learning_rate], and the recipe with the best.",
)
@set_option
@click.option(
    "-o", "output", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the runs [adapters/NAME-sweep]"
)
@click.option("--metric", metavar="NAME", help="Held-out metric to rank by. [train.metric_for_best_model]")
@click.option("--resume", is_flag=True, help="Continue the sweep in the folder; finished runs are kept.")
@click.option("--dry-run", is_flag=True, help="Print the grid and stop before anything is loaded.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def sweep_command(
    recipe_file: str,
    over: tuple[str, ...],
    probe: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    metric: str | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train RECIPE with every combination of the values in --over: one run each, sharing base and reference cache.

    \b
    qlora-dpo sweep recipes/hh.toml --over 'objective.beta=[0.05,0.1]' --over 'lora.r=[8,16]'
    qlora-dpo sweep recipes/quickstart.toml --over 'lora.r=[4,16]' --dry-run
    qlora-dpo sweep recipes/hh.toml --probe
    """
    from qlora_dpo.recipe import grid, load_recipe

    run_overrides, interim_eval_pairs = overrides, None
    if probe is not None:
        from qlora_dpo.cli.probe import INTERIM_EVAL_PAIRS, probe_axes, probe_metric, probe_overrides

        whole = load_recipe(recipe_file, overrides)
        over, run_overrides = probe_axes(probe, over), probe_overrides(whole.recipe, overrides)
        metric = metric or probe_metric(whole.recipe)
        train = whole.recipe.train
        if not train.load_best_model_at_end and train.early_stopping_patience is None:  # which compare evaluations
            interim_eval_pairs = INTERIM_EVAL_PAIRS
    axes = grid.parse_axes(over)
    points = grid.expand_grid(recipe_file, run_overrides, axes)
    first = points[0].loaded
    folder = output or Path("adapters") / f"{first.name}-{'sweep' if probe is None else 'probe'}"

    from qlora_dpo.recipe.extras import check_extras

    for point in points:
        check_extras(point.loaded.recipe)

    from qlora_dpo.training.sweep import parse_metric

    ranking_metric = parse_metric(metric or first.recipe.train.metric_for_best_model)
    click.echo("\n".join(_grid_lines(points, axes, folder, ranking_metric)), err=not dry_run)
    if dry_run:
        return

    import_libraries()
    from qlora_dpo.cli.sweep_points import open_sweep, report_sweep, train_points

    with open_sweep(folder, axes, points, ranking_metric, resume=resume) as sweep:
        train_points(sweep, points, interim_eval_pairs)
        whole_recipes = {
            point.name: load_recipe(recipe_file, (*overrides, *point.set_options))
            for point in points
            if probe is not None
        }
        report_sweep(sweep, points, as_json=as_json, whole_recipes=whole_recipes)


def _grid_lines(points: "Sequence[GridPoint]", axes: "Sequence[SweepAxis]", folder: Path, metric: str) -> list[str]:
    """The plan of the sweep: recipe, grid and output, and each point with the values that it sets."""
    width = max(len(point.name) for point in points)
    shape = " x ".join(str(len(axis.values)) for axis in axes)
    return [
        f"recipe      {points[0].loaded.path}",
        f"grid        {f'{shape} = ' if len(axes) > 1 else ''}{len(points)} runs; the best by {metric}",
        f"output      {folder}",
        *(f"  {point.name:<{width}}  {point.description}" for point in points),
    ]
