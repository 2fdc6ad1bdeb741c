"""`qlora-dpo train`: a recipe becomes an adapter directory."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_dpo.cli.options import set_option
from qlora_dpo.cli.startup.libraries import import_libraries

if TYPE_CHECKING:
    from qlora_dpo.recipe import Recipe
    from qlora_dpo.training.run import TrainingResult


@click.command("train", short_help="Tune a model on preference pairs as a recipe says.")
@click.argument("recipe_file", metavar="RECIPE")
@set_option
@click.option("-o", "output", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the run [adapters/NAME]")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the folder.")
@click.option("--allow", metavar="KEY", multiple=True, help="Resume although this key of the recipe has changed.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop before anything is loaded.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after this many optimizer steps.")
@click.option("--max-hours", type=click.FloatRange(min=0, min_open=True), help="Save a checkpoint and end by then.")
@click.option("--processes", type=click.IntRange(min=1), help="Train in this many processes, one for each GPU. [1]")
@click.option("--dropped-rows", is_flag=True, help="List the row numbers of all pairs that are left out.")
def train_command(
    recipe_file: str,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: bool,
    allow: tuple[str, ...],
    dry_run: bool,
    max_steps: int | None,
    max_hours: float | None,
    processes: int | None,
    dropped_rows: bool,
) -> int | None:
    """Tune a model on preference pairs as RECIPE says, and write an adapter directory.

    \b
    qlora-dpo train recipes/quickstart.toml
    qlora-dpo train recipes/hh.toml --set train.learning_rate=1e-5 -o adapters/hh-fast
    qlora-dpo train recipes/hh.toml --processes 2
    accelerate launch -m qlora_dpo train recipes/hh.toml
    """
    import time

    from qlora_dpo.cli.launch import launch_processes, silence_other_ranks
    from qlora_dpo.recipe import recipe

    silence_other_ranks()
    deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
    steps = () if max_steps is None else (f"train.max_steps={max_steps}",)
    loaded = recipe.load_recipe(recipe_file, (*overrides, *steps))
    folder = output or Path("adapters") / loaded.name

    if allow and not resume:
        raise click.UsageError("--allow says what may have changed since a checkpoint; it needs --resume")
    recipe.check_keys(
        allow,
        extra_keys=("base", "tokenizer", "template", "pairs", "heldout", "init_from", "reference"),
        option="--allow",
    )

    from qlora_dpo.recipe.extras import check_extras

    check_extras(loaded.recipe)

    if not dry_run:
        from qlora_dpo.model.sources import check_model_exists

        check_model_exists(loaded.recipe.model)
    from qlora_dpo.cli.text.plan_text import plan_lines
    from qlora_dpo.model import device as devices
    from qlora_dpo.model.distributed import processes as distributed

    if processes is not None and distributed.launched_world_size() > 1:
        raise click.UsageError("--processes starts the processes, and this is one of them; leave it out")
    devices.check_gpu_count(processes or 1)
    _check_strategy(loaded.recipe, max(processes or 1, distributed.launched_world_size()))
    distributed.init_process_group(cpu=not devices.has_gpu())
    device = devices.select_device(loaded.recipe.model.dtype)
    world_size = max(processes or 1, distributed.world_size())
    if dry_run or world_size == distributed.world_size():
        click.echo("\n".join(plan_lines(loaded, folder, device, world_size)), err=not dry_run)
    if dry_run:
        return None
    if world_size > distributed.world_size():
        arguments = [recipe_file, *(word for change in (*overrides, *steps) for word in ("--set", change))]
        arguments += ("-o", str(output)) if output is not None else ()
        arguments += ("--resume",) * resume + tuple(word for key in allow for word in ("--allow", key))
        arguments += () if max_hours is None else ("--max-hours", str(max_hours))
        arguments += ("--dropped-rows",) * dropped_rows
        return launch_processes(["train", *arguments], world_size)

    import_libraries()
    from qlora_dpo.cli.run_hooks import run_hooks
    from qlora_dpo.training.run import RunOptions, run_training

    options, hooks = RunOptions(resume, allow, deadline), run_hooks(loaded, folder, device, dropped_rows=dropped_rows)
    result = run_training(loaded, folder, device, options, hooks)
    if distributed.is_main():
        _check_result(result, folder)
    distributed.destroy_process_group()
    return None


def _check_strategy(recipe: "Recipe", world_size: int) -> None:
    """Raise RecipeError for a recipe that cannot be trained by so many processes, or as accelerate shards it."""
    from qlora_dpo.model.distributed import processes
    from qlora_dpo.training.engine import engine_of

    engine_of(recipe).check_world_size(world_size)
    if processes.is_sharded():
        from qlora_dpo.model.distributed import sharding

        sharding.check_shardable(recipe.model, recipe.lora)
    if processes.sharding_strategy() in ("zero2", "zero3"):
        from qlora_dpo.model.distributed import deepspeed_engine

        deepspeed_engine.require_deepspeed()
    if processes.sharding_strategy() == "zero2":
        from qlora_dpo.model import device

        deepspeed_engine.check_no_grad_scaler(device.select_device(recipe.model.dtype))

        from qlora_dpo.training import zero2_optimizer

        zero2_optimizer.check_elementwise(recipe.train)


def _check_result(result: "TrainingResult", folder: Path) -> None:
    """Raise GateError for a run that a sign of trouble has stopped, and RunError if checkpoints could not be saved."""
    from qlora_dpo.errors import GateError, RunError

    if result.state.stopped_by_sign:
        kept = f"the adapter is that of step {result.state.adapter_step}"
        raise GateError(f"{folder}: {result.state.stopped}; {kept}, and --resume goes on")
    if result.save_errors:
        raise RunError(
            f"{folder}: the adapter is whole, but {len(result.save_errors)} checkpoints could not be saved: "
            f"{result.save_errors[0]}"
        )
