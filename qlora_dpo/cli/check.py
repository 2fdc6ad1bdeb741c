"""`qlora-dpo check`: describes what a recipe would do and whether it fits, or this machine."""

import json

import click

from qlora_dpo.cli.options import set_option
from qlora_dpo.cli.startup.libraries import import_libraries
from qlora_dpo.model.gpu_specs import GPU_SPECS


@click.command(
    "check", short_help="Show what a recipe would do and whether it fits in memory, or describe this machine."
)
@click.argument("recipe_file", metavar="[RECIPE]", required=False)
@set_option
@click.option("--gpu", metavar="CARD", help=f"Assume this GPU instead of this machine: {', '.join(GPU_SPECS)}")
@click.option(
    "--forecast", is_flag=True, help="Load the model, and judge by it whether the pairs can teach it anything."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--strict", is_flag=True, help="Exit with 3 if there are warnings.")
def check_command(
    recipe_file: str | None, overrides: tuple[str, ...], gpu: str | None, forecast: bool, as_json: bool, strict: bool
) -> None:
    """Read RECIPE, its data and its model's config, and show what a run would do and how long it would take.

    No weights are read, except with --forecast. Exits with 4 if the run does not fit in memory. Without RECIPE,
    describes this machine, to paste into a bug report.

    \b
    qlora-dpo check recipes/hh.toml --gpu t4
    qlora-dpo check recipes/hh.toml --forecast
    qlora-dpo check
    """
    from qlora_dpo.errors import GateError

    if recipe_file is None:
        if given := [name for name, value in (("--gpu", gpu), ("--set", overrides), ("--forecast", forecast)) if value]:
            raise click.UsageError(f"{given[0]} needs a RECIPE")
        from qlora_dpo.report.machine import collect_machine_info

        machine = collect_machine_info()
        click.echo(json.dumps(machine.to_dict()) if as_json else "\n".join(machine.lines()))
        warnings = machine.warnings
    else:
        if forecast and gpu is not None:
            raise click.UsageError("--forecast loads the model on this machine; leave --gpu out")
        warnings = _check_recipe(recipe_file, overrides, gpu, forecast, as_json)
    if strict and warnings:
        from qlora_dpo.cli.text import check_text

        count = f"{len(warnings)} warnings" if len(warnings) > 1 else "1 warning"
        raise GateError(f"{recipe_file or 'this machine'}: {count}: {check_text.first_warning(warnings)}")


def _check_recipe(
    recipe_file: str, overrides: tuple[str, ...], gpu: str | None, with_forecast: bool, as_json: bool
) -> tuple[str, ...]:
    """Show what the recipe would do, and return its warnings; raises DoesNotFitError if it does not fit."""
    from qlora_dpo.errors import DoesNotFitError
    from qlora_dpo.model.sources import check_model_exists
    from qlora_dpo.recipe import recipe

    loaded = recipe.load_recipe(recipe_file, overrides)
    _check_gpu_known(gpu)
    check_model_exists(loaded.recipe.model)
    import_libraries()
    from qlora_dpo.cli.text import check_text, memory_text
    from qlora_dpo.cli.text.forecast_text import forecast_warning_lines
    from qlora_dpo.model import memory
    from qlora_dpo.model.device import device_for_gpu, select_device

    dtype = loaded.recipe.model.dtype
    device = device_for_gpu(GPU_SPECS[gpu], dtype) if gpu is not None else select_device(dtype)
    free = device.total_bytes if gpu is not None else memory.free_bytes(device)
    click.echo("reading data and tokenizer; whatever is not cached is downloaded, except weights", err=True)
    from qlora_dpo.planning.preflight import run_preflight
    from qlora_dpo.tracking.progress import show_reading_progress

    preflight = run_preflight(loaded.recipe, device, free, on_this_machine=gpu is None)
    forecast = None
    if with_forecast and preflight.memory.fits:
        from qlora_dpo.on_policy.forecast import MAX_FORECAST_PAIRS, forecast_recipe

        pairs = min(MAX_FORECAST_PAIRS, preflight.train.used)
        with show_reading_progress("forecast", pairs) as advance:
            forecast = forecast_recipe(loaded.recipe, device, advance)
    if as_json:
        click.echo(json.dumps(check_text.check_record(loaded, preflight, forecast)))
    else:
        check_text.print_check(loaded, preflight, forecast)
    if not preflight.memory.fits:
        raise DoesNotFitError(
            memory_text.does_not_fit_message(loaded.path, preflight.memory, preflight.memory_fixes, device)
        )
    if not as_json:
        click.echo(check_text.train_command_line(loaded))
    return (*preflight.warnings, *(forecast_warning_lines(forecast) if forecast else ()))


def _check_gpu_known(gpu: str | None) -> None:
    import difflib

    from qlora_dpo.errors import RecipeError

    if gpu is None or gpu in GPU_SPECS:
        return
    matches = difflib.get_close_matches(gpu.lower(), GPU_SPECS, 1)
    guess = f"did you mean {matches[0]}? Known GPUs" if matches else "known GPUs"
    raise RecipeError(f"--gpu {gpu}: unknown GPU; {guess} are {', '.join(GPU_SPECS)}")
