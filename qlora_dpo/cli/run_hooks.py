"""What the command line adds to a run: sentences about its data and memory, samples, the adapter and its report."""

from pathlib import Path

import click
from peft import PeftModel

from qlora_dpo import adapter
from qlora_dpo.cli.text import memory_text
from qlora_dpo.cli.text.forecast_text import forecast_lines
from qlora_dpo.cli.text.train_text import (
    SampleRecords,
    generate_samples,
    make_sample_fn,
    print_result,
    write_results,
    write_run_metadata,
)
from qlora_dpo.data.audit import check_bad_share
from qlora_dpo.data.progress import ProgressCallback
from qlora_dpo.errors import DoesNotFitError, QloraDpoError, is_out_of_memory
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes, sharding
from qlora_dpo.on_policy.forecast import forecast_run
from qlora_dpo.planning.memory_advice import assess_fit
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.recipe import LoadedRecipe
from qlora_dpo.tracking.progress import show_reading_progress
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.build_model import load_base_for_run
from qlora_dpo.training.context import TrainContext
from qlora_dpo.training.engine import engine_of
from qlora_dpo.training.prepare import PreparedData, prepare_data
from qlora_dpo.training.run import RunHooks, TrainingResult
from qlora_dpo.training.sweep_base import SweepBase


def run_hooks(
    loaded: LoadedRecipe,
    folder: Path,
    device: Device,
    *,
    dropped_rows: bool = False,
    sweep_base: SweepBase | None = None,
) -> RunHooks:
    """The hooks of `train`, or of a run of a sweep, which takes base and pairs from `sweep_base` and prints no result.

    What a sweep has said about its data and memory is not said again for its later runs.
    """
    recipe, is_first = loaded.recipe, sweep_base is None or sweep_base.prepared is None
    samples: SampleRecords = []

    def prepare(recipe: Recipe, watch: ProgressCallback) -> PreparedData:
        if processes.is_main() and is_first:
            click.echo("reading base and data; what is not in the cache is downloaded", err=True)
        return sweep_base.prepare(recipe, watch) if sweep_base else prepare_data(recipe, watch=watch)

    def check_prepared(prepared: PreparedData) -> None:
        for pair_set in (prepared.train, prepared.heldout):
            if is_first:
                click.echo("\n".join(pair_set.audit.lines(with_row_numbers=dropped_rows)), err=True)
            check_bad_share(pair_set.audit, recipe.data.max_bad_share)
        if is_first and not engine_of(recipe).is_trl:  # nobody knows what TRL takes
            _check_memory(prepared, loaded, device)

    def before_training(prepared: PreparedData, model: PeftModel, context: TrainContext) -> None:
        try:
            forecast = forecast_run(prepared, model, context) if is_first else None
        except Exception as error:  # a run is not worth less for want of a forecast
            if not (isinstance(error, QloraDpoError) or is_out_of_memory(error)):
                raise
            click.echo(f"pairs: not judged, since {error}", err=True)
            return
        if forecast is not None:
            click.echo("\n".join(forecast_lines(forecast)), err=True)

    def save(result: TrainingResult, run_log: RunLog) -> None:
        adapter.save_adapter(folder, result.model, result.prepared.tokenizer, result.prepared.source)
        # before the samples, which take a while: without it the adapter would not know its base
        write_run_metadata(folder, result, recipe, device)
        sharding.unshard_layers(result.model)
        samples.extend(generate_samples(result, recipe, device, run_log))

    def conclude(result: TrainingResult) -> None:
        write_run_metadata(folder, result, recipe, device)
        results = write_results(folder, result, samples, recipe)
        if sweep_base is None:
            print_result(folder, results, samples, recipe)

    return RunHooks(
        check_prepared=check_prepared,
        before_training=before_training,
        sample_fn=lambda prepared: make_sample_fn(prepared, recipe, device),
        save=save,
        conclude=conclude,
        prepare=prepare,
        load_base=sweep_base.load_base if sweep_base else load_base_for_run,
        watch=show_reading_progress,
    )


def _check_memory(prepared: PreparedData, loaded: LoadedRecipe, device: Device) -> None:
    """Print what the run takes of memory, by part; raises DoesNotFitError if that is more than there is."""
    memory, fixes = assess_fit(prepared, loaded.recipe, device)
    if not memory.fits:
        raise DoesNotFitError(memory_text.does_not_fit_message(loaded.path, memory, fixes, device))
    click.echo(memory_text.memory_line(memory), err=True)
