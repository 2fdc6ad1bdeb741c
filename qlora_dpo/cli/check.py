"""`qlora-dpo check`: what a recipe would do and whether it fits, or what this machine can do."""

import json

import click

from qlora_dpo.cli.set_option import set_option
from qlora_dpo.model.gpu_specs import GPU_SPECS


@click.command("check", short_help="Say what a recipe would do and whether it fits, or what this machine can do.")
@click.argument("recipe_file", metavar="[RECIPE]", required=False)
@set_option
@click.option("--gpu", metavar="CARD", help=f"Judge for this card instead of this machine: {', '.join(GPU_SPECS)}")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--strict", is_flag=True, help="Exit with 3 if there is a warning.")
def check_command(
    recipe_file: str | None, overrides: tuple[str, ...], gpu: str | None, as_json: bool, strict: bool
) -> None:
    """Read RECIPE, its data and its model's config, and say what a run would do and how long; no weights are read.

    Exit code 4 if it does not fit in memory. Without RECIPE: this machine, to paste into a bug report.

    \b
    qlora-dpo check recipes/hh.toml --gpu t4
    qlora-dpo check
    """
    from qlora_dpo.cli.text import check_text
    from qlora_dpo.errors import GateError

    if recipe_file is None:
        if gpu is not None or overrides:
            raise click.UsageError(f"{'--gpu' if gpu is not None else '--set'} needs a RECIPE")
        from qlora_dpo.report.machine import collect_machine_info

        here = collect_machine_info()
        click.echo(json.dumps(here.to_dict()) if as_json else "\n".join(here.lines()))
        warnings = here.warnings
    else:
        warnings = _check_recipe(recipe_file, overrides, gpu, as_json)
    if strict and warnings:
        count = f"{len(warnings)} warnings" if len(warnings) > 1 else "1 warning"
        raise GateError(f"{recipe_file or 'this machine'}: {count}: {check_text.first_warning(warnings)}")


def _check_recipe(recipe_file: str, overrides: tuple[str, ...], gpu: str | None, as_json: bool) -> tuple[str, ...]:
    """Show what the recipe would do; raises DoesNotFitError if it does not fit."""
    from qlora_dpo.cli.text import check_text, memory_text
    from qlora_dpo.errors import DoesNotFitError
    from qlora_dpo.recipe import recipe

    loaded = recipe.load_recipe(recipe_file, overrides)
    _check_gpu_known(gpu)
    from qlora_dpo.model import device, memory

    wanted = loaded.recipe.model.dtype
    here = device.device_for_gpu(GPU_SPECS[gpu], wanted) if gpu is not None else device.select_device(wanted)
    free = here.total_bytes if gpu is not None else memory.free_bytes(here)
    click.echo("reading data and tokenizer; what is not in the cache is downloaded, but no weights", err=True)
    from qlora_dpo.planning.preflight import run_preflight

    found = run_preflight(loaded.recipe, here, free, on_this_machine=gpu is None)
    if as_json:
        click.echo(json.dumps(check_text.check_record(loaded, found)))
    else:
        check_text.print_check(loaded, found)
    if not found.memory.fits:
        raise DoesNotFitError(memory_text.does_not_fit_message(loaded.path, found.memory, found.memory_fixes, here))
    if not as_json:
        click.echo(check_text.train_command_line(loaded))
    return found.warnings


def _check_gpu_known(gpu: str | None) -> None:
    import difflib

    from qlora_dpo.errors import RecipeError

    if gpu is None or gpu in GPU_SPECS:
        return
    near = difflib.get_close_matches(gpu.lower(), GPU_SPECS, 1)
    guess = f"did you mean {near[0]}? Known" if near else "known"
    raise RecipeError(f"--gpu {gpu}: no such card is known; {guess} are {', '.join(GPU_SPECS)}")
