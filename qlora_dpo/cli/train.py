"""`qlora-dpo train`: a recipe becomes an adapter directory."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_dpo.cli.set_option import set_option

if TYPE_CHECKING:
    from qlora_dpo.model.device import Device
    from qlora_dpo.recipe import Recipe
    from qlora_dpo.recipe.data import DataTable
    from qlora_dpo.recipe.objective import Objective
    from qlora_dpo.recipe.recipe import LoadedRecipe
    from qlora_dpo.training.run import PreparedData, TrainingResult
    from qlora_dpo.training.sweep_base import SweepBase


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
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.recipe import recipe

    silence_other_ranks()
    until = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
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

    from qlora_dpo.model import device
    from qlora_dpo.model.distributed import processes as together

    if processes is not None and together.launched_world_size() > 1:
        raise click.UsageError("--processes starts the processes, and this is one of them; leave it out")
    device.check_gpu_count(processes or 1)
    if max(processes or 1, together.launched_world_size()) > 1 and loaded.recipe.train.engine == "trl":
        raise RecipeError('several processes need train.engine = "qlora_dpo"; run TRL in one')
    _check_sharding(loaded.recipe)
    together.init_process_group(cpu=not device.has_gpu())
    here = device.select_device(loaded.recipe.model.dtype)
    count = max(processes or 1, together.world_size())
    if dry_run or count == together.world_size():
        click.echo("\n".join(_plan_lines(loaded, folder, here, count)), err=not dry_run)
    if dry_run:
        return None
    if count > together.world_size():
        given = ("-o", str(output)) if output is not None else ()
        changed = [word for each in (*overrides, *steps) for word in ("--set", each)]
        again = ("--resume",) * resume + tuple(word for key in allow for word in ("--allow", key))
        hours = () if max_hours is None else ("--max-hours", str(max_hours))
        rows = ("--dropped-rows",) * dropped_rows
        return launch_processes(["train", recipe_file, *changed, *given, *again, *hours, *rows], count)
    if together.is_main():
        outcome = train_to_folder(
            loaded, folder, here, resume=resume, allow=allow, deadline=until, dropped_rows=dropped_rows
        )
        _check_outcome(outcome, folder)
    else:
        _train_on_other_rank(loaded, folder, here, resume=resume, allow=allow, deadline=until)
    together.destroy_process_group()
    return None


def _check_sharding(recipe: "Recipe") -> None:
    """Raise RecipeError for what cannot be shared out among processes as accelerate's config file asks."""
    from qlora_dpo.model.distributed import processes

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


def _check_outcome(outcome: "TrainingResult", folder: Path) -> None:
    """Raise GateError for a run that a sign of trouble has stopped, and RunError if checkpoints could not be saved."""
    from qlora_dpo.errors import GateError, RunError

    if outcome.state.stopped_by_sign:
        raise GateError(f"{folder}: {outcome.state.stopped}; the adapter is as it was then, and --resume goes on")
    if outcome.save_errors:
        raise RunError(
            f"{folder}: the adapter is whole, but {len(outcome.save_errors)} checkpoints could not be saved: "
            f"{outcome.save_errors[0]}"
        )


def train_to_folder(
    loaded: "LoadedRecipe",
    folder: Path,
    device: "Device",
    *,
    resume: bool,
    allow: tuple[str, ...] = (),
    deadline: float = math.inf,
    dropped_rows: bool = False,
    sweep_base: "SweepBase | None" = None,
) -> "TrainingResult":
    """Train into `folder` and write all that a finished run leaves; the result is shown on stdout.

    A run of a sweep takes base and pairs from what is `shared`, and shows nothing there.
    """
    from functools import partial

    from qlora_dpo import adapter, run_folder
    from qlora_dpo.cli.text.train_text import (
        generate_samples,
        make_sample_fn,
        print_result,
        write_results,
        write_run_metadata,
    )
    from qlora_dpo.data.audit import check_bad_share
    from qlora_dpo.files import write_json
    from qlora_dpo.model.distributed import processes, sharding
    from qlora_dpo.tracking import progress
    from qlora_dpo.training import interrupted, run
    from qlora_dpo.training.checkpoint import save

    say = partial(click.echo, err=True)
    with run_folder.exclusive_run_folder(folder, loaded, resume=resume, log=say), interrupted.explain_interrupt(folder):
        processes.barrier()
        known = sweep_base is not None and sweep_base.prepared is not None
        if not known:
            click.echo("reading base and data; what is not in the cache is downloaded", err=True)
        prepare = sweep_base.prepare if sweep_base else run.prepare_data
        prepared = prepare(loaded.recipe, watch=progress.show_reading_progress)
        for side in (prepared.train, prepared.heldout):
            if not known:
                click.echo("\n".join(side.audit.lines(with_row_numbers=dropped_rows)), err=True)
            check_bad_share(side.audit, loaded.recipe.data.max_bad_share)
        if loaded.recipe.train.engine == "qlora_dpo" and not known:  # what TRL takes is not known
            _check_memory(prepared, loaded, device)
        write_json(
            folder / run_folder.AUDIT,
            {"train": prepared.train.audit.to_dict(), "eval": prepared.heldout.audit.to_dict()},
        )
        resume_from, skipped = save.newest_valid(folder) if resume else (None, [])
        with run.open_run_log(prepared, loaded, folder, resume_from) as tracker:
            for sentence in skipped:
                tracker.info(sentence)
            ask = make_sample_fn(prepared, loaded.recipe, device)
            load = sweep_base.load if sweep_base else run.load_base_for_run
            outcome = run.run_training(
                prepared, loaded.recipe, device, tracker, resume_from, allow, ask, deadline, load
            )
            adapter.save_adapter(folder, outcome.model, prepared.tokenizer, prepared.source)
            # before the answers, which take a while: without it the adapter would not know its base
            write_run_metadata(folder, outcome, loaded.recipe, device)
            sharding.unshard_layers(outcome.model)
            answers = generate_samples(outcome, loaded.recipe, device, tracker)
        write_run_metadata(folder, outcome, loaded.recipe, device)
        results = write_results(folder, outcome, answers, loaded.recipe)
        if sweep_base is None:
            print_result(folder, results, answers, loaded.recipe)
    return outcome


def _train_on_other_rank(
    loaded: "LoadedRecipe", folder: Path, device: "Device", *, resume: bool, allow: tuple[str, ...], deadline: float
) -> None:
    """Take a part of every step beside the first process, which writes and speaks for all."""
    from qlora_dpo.cli.text.train_text import make_sample_fn
    from qlora_dpo.model.distributed import processes, sharding
    from qlora_dpo.training import run
    from qlora_dpo.training.checkpoint import save

    processes.barrier()
    prepared = run.prepare_data(loaded.recipe)
    resume_from, _ = save.newest_valid(folder) if resume else (None, [])
    with run.open_run_log(prepared, loaded, folder, resume_from) as tracker:
        ask = make_sample_fn(prepared, loaded.recipe, device)
        outcome = run.run_training(prepared, loaded.recipe, device, tracker, resume_from, allow, ask, deadline)
    sharding.unshard_layers(outcome.model)  # the first process answers prompts alone


def _check_memory(prepared: "PreparedData", loaded: "LoadedRecipe", device: "Device") -> None:
    """Say what the run takes of memory, by part; raises DoesNotFitError if that is more than there is."""
    from qlora_dpo.cli.text import memory_text
    from qlora_dpo.errors import DoesNotFitError
    from qlora_dpo.planning.room import assess_fit

    memory, ways = assess_fit(prepared, loaded.recipe, device)
    if not memory.fits:
        raise DoesNotFitError(memory_text.does_not_fit_message(loaded.path, memory, ways, device))
    click.echo(memory_text.memory_line(memory), err=True)


def _plan_lines(loaded: "LoadedRecipe", folder: Path, device: "Device", processes: int) -> list[str]:
    """What the run will do, one decision a line."""
    from qlora_dpo.model.distributed.processes import sharding_strategy
    from qlora_dpo.recipe.model import QUANTIZATION_NAMES
    from qlora_dpo.recipe.tables import is_local_path

    model, lora, data, steps = (getattr(loaded.recipe, name) for name in ("model", "lora", "data", "train"))
    heldout = data.eval or data.train_description
    share = data.effective_eval_share
    holds = {
        "": "the whole base",
        "fsdp2": "a part of each layer of the base (FSDP2)",
        "zero2": "the whole base and a part of the optimizer's state (DeepSpeed's ZeRO-2)",
        "zero3": "a part of each layer of the base (DeepSpeed's ZeRO-3)",
    }[sharding_strategy()]
    return [
        f"recipe      {loaded.path}",
        f"base        {model.name}: "
        + QUANTIZATION_NAMES.get(model.quantization, "not quantized")
        + (" with double quantization" if model.quantization in ("nf4", "fp4") and model.double_quant else ""),
        *device.describe(),
        *([f"processes   {processes}, each with {holds}; they share a step's pairs"] if processes > 1 else []),
        f"lora        r {lora.r}, lora_alpha {lora.lora_alpha}, lora_dropout {lora.lora_dropout:g}, target_modules "
        + (lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules))
        + (f"; whole copies of {', '.join(lora.modules_to_save)}" if lora.modules_to_save else "")
        + (f", starting from {loaded.recipe.init_from}" if loaded.recipe.init_from else ""),
        *(f"{'train on' if n == 0 else 'and on':<11} {each}" for n, each in enumerate(_data_source_lines(data))),
        f"held out    {heldout}"
        + (
            f", {share:.0%} of its prompts" if share else "" if is_local_path(heldout) else f", split {data.eval_split}"
        ),
        f"objective   {_objective_text(loaded.recipe.objective)}; {_reference_text(loaded.recipe)}",
        f"steps       {steps.batch_size} pairs each, {steps.num_train_epochs} epoch(s)"
        + (f", at most {steps.max_steps} steps" if steps.max_steps else "")
        + f"; learning rate {steps.learning_rate:g}, {steps.lr_scheduler_type}; engine {steps.engine}",
        f"output      {folder}",
    ]


def _data_source_lines(data: "DataTable") -> list[str]:
    """The sources of the training pairs."""
    from qlora_dpo.recipe.tables import is_local_path

    if data.train is not None:
        return [data.train + ("" if is_local_path(data.train) else f", split {data.train_split}")]
    return [
        each.source
        + ("" if is_local_path(each.source) else f", split {each.split}")
        + (f", weight {each.weight:g}" if each.weight else "")
        + (f", at most {each.max_samples:,} pairs" if each.max_samples else "")
        for each in data.mix or ()
    ]


def _objective_text(table: "Objective") -> str:
    """The loss with every key that is not at its default."""
    name = "sigmoid DPO" if table.loss_type == "sigmoid" else table.loss_type
    keys = ["beta", *sorted(table.model_fields_set - {"loss_type", "beta", "sft_weight"})]
    told = [f"{key} {getattr(table, key)}" for key in keys if getattr(table, key, None) is not None]
    sft = getattr(table, "sft_weight", 0)
    return ", ".join([name, *told]) + (f", plus {sft:g} * SFT on the chosen answer" if sft else "")


def _reference_text(recipe: "Recipe") -> str:
    """What the policy is compared with."""
    from qlora_dpo.recipe.objective import ReferenceFree
    from qlora_dpo.recipe.reference import AdapterReference, EmaReference, ModelReference

    if isinstance(recipe.objective, ReferenceFree):
        return "no reference"
    match recipe.reference:
        case AdapterReference(path=path):
            return f"the reference is the adapter of {path}, which stays as it is"
        case ModelReference(name=name):
            return f"the reference is {name}, asked before the first step"
        case EmaReference() as table:
            steps = table.ref_model_sync_steps
            every = "every step" if steps == 1 else f"every {steps} steps"
            return (
                f"the reference is a copy of the adapter that moves {every}, by {table.ref_model_mixup_alpha:g} of the "
                "way to the policy"
            )
        case _:
            return "the reference is the same model with its adapter off"
