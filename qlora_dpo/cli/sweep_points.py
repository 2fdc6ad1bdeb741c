"""Goes through the points of a sweep, one run each on one base, and says at the end which is the best."""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qlora_dpo.cli.failure import error_sentence
from qlora_dpo.cli.probe import edge_caveats, probe_table
from qlora_dpo.cli.run_hooks import run_hooks
from qlora_dpo.errors import Interrupted, RunError
from qlora_dpo.lock import LOCK_FILE, lock_folder
from qlora_dpo.manifest import find_damage
from qlora_dpo.model.device import select_device
from qlora_dpo.recipe.grid import GridPoint, SweepAxis
from qlora_dpo.recipe.recipe import LoadedRecipe
from qlora_dpo.recipe.train import MetricName
from qlora_dpo.report.runs import runs_table, summarize_run
from qlora_dpo.report.sweep import format_metric, ranking_caveats
from qlora_dpo.run_folder import ADAPTER_SAFE_WEIGHTS_NAME
from qlora_dpo.training.checkpoint.save import has_valid_checkpoint
from qlora_dpo.training.run import RunOptions, run_training
from qlora_dpo.training.sweep import (
    BEST_RECIPE_FILE,
    Sweep,
    SweepEntry,
    load_or_create_sweep,
    read_evaluation,
    write_best_recipe,
)
from qlora_dpo.training.sweep_base import SweepBase


@contextmanager
def open_sweep(
    folder: Path, axes: Sequence[SweepAxis], points: Sequence[GridPoint], metric: MetricName, *, resume: bool
) -> Iterator[Sweep]:
    """The sweep in `folder`, new or resumed, for as long as it lasts; no other process gets in meanwhile."""
    new = not folder.exists()
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; name a new folder with -o DIR")
    try:
        with lock_folder(folder, _echo_stderr):
            yield load_or_create_sweep(folder, axes, points, metric, resume=resume)
    except BaseException:
        if new and folder.is_dir():
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def train_points(sweep: Sweep, points: Sequence[GridPoint], interim_eval_pairs: int | None = None) -> None:
    """Train every point that has not ended yet; one that fails is noted, and the next one has its turn.

    `interim_eval_pairs` is how many held-out pairs an evaluation on the way takes; None for all of them.

    Raises Interrupted after SIGINT or SIGTERM, and whatever keeps base or pairs from being read, since no point could
    be trained then.
    """
    unfinished = [
        (point, entry)
        for point, entry in zip(points, sweep.points, strict=True)
        if not _is_finished(sweep.folder, entry)
    ]
    if len(unfinished) < len(points):
        _echo_stderr(f"{len(points) - len(unfinished)} of {len(points)} points have ended already")

    def store_fingerprints(fingerprints: dict[str, str]) -> None:
        sweep.fingerprints = fingerprints
        sweep.write()

    sweep_base = SweepBase([point.loaded.recipe for point in points], sweep.fingerprints, store_fingerprints)
    device = select_device(points[0].loaded.recipe.model.dtype)
    if unfinished:
        _echo_stderr("\n".join(device.describe()))
    for point, entry in unfinished:
        place = f"point {points.index(point) + 1} of {len(points)}"
        _echo_stderr(f"\n{place}: {point.description}")
        sweep.set_state(entry, "running")
        folder = sweep.folder / point.name
        try:
            hooks = run_hooks(point.loaded, folder, device, sweep_base=sweep_base)
            options = RunOptions(resume=_can_resume(folder), interim_eval_pairs=interim_eval_pairs)
            result = run_training(point.loaded, folder, device, options, hooks)
            stopped = result.state.stopped if result.state.stopped_by_sign else ""
            for sentence in result.save_errors:
                _echo_stderr(f"{place}: the adapter is whole, but a checkpoint could not be saved: {sentence}")
            del result, hooks  # before the next run loads its adapter
        except Interrupted as error:
            raise Interrupted(f"{place}: {error}") from error
        except KeyboardInterrupt as error:
            raise Interrupted(f"{place}: interrupted; the same command with --resume goes on there") from error
        except Exception as error:
            if sweep_base.base is None:
                sweep.set_state(entry, "waiting")
                raise
            sweep.set_state(entry, "failed", error_sentence(error))
            _echo_stderr(f"{place} failed: {entry.sentence}")
            continue
        sweep.set_state(entry, "stopped" if stopped else "finished", stopped)
        _echo_stderr(f"{place}: {format_metric(sweep.metric, sweep.read_result(entry))} at step {entry.step}")


def report_sweep(
    sweep: Sweep, points: Sequence[GridPoint], *, as_json: bool, whole_recipes: Mapping[str, LoadedRecipe]
) -> None:
    """Show the runs, the best first, and write the recipe of the best; RunError if any point failed.

    `whole_recipes` are those that the short runs of a probe were for, by the names of the points.
    """
    sweep.update_results()
    ranked = [entry for entry in sweep.ranked() if (sweep.folder / entry.name / "resolved.toml").is_file()]
    runs = [summarize_run(sweep.folder / entry.name) for entry in ranked]
    evaluations = {
        entry.name: read_evaluation(sweep.folder / entry.name) for entry in ranked if entry.state == "finished"
    }
    told = list(ranking_caveats(evaluations, sweep.metric, list(sweep.over), sweep.folder / (sweep.best or "")))
    best = next((point for point in points if point.name == sweep.best), None)
    if best is not None and whole_recipes:
        told += edge_caveats(best.values, sweep.over)
    failed = [entry for entry in sweep.points if entry.state == "failed"]
    words = ""
    if best is not None:
        record = evaluations[best.name]
        shown = format_metric(sweep.metric, record[f"eval_{sweep.metric}"])
        words = f"{shown} on {record['eval_pairs']} held-out pairs ({best.description})"
        told_best = f"The best of {len(points)} points of {best.loaded.path.name}: {words}"
        whole = whole_recipes.get(best.name, best.loaded)
        write_best_recipe(sweep, replace(best, loaded=whole), told_best)
    if as_json:
        click.echo(json.dumps(_sweep_record(sweep, runs, told), ensure_ascii=False))
    else:
        _echo_stderr("")
        if runs:
            console = Console()
            console.print(runs_table(runs, console.width))
        if whole_recipes:
            click.echo("\n".join(["", *probe_table(points, sweep.folder, sweep.metric)]))
            if best is None:
                click.echo("\nno value kept its short run free of signs of trouble; try others with --over")
        if best is not None:
            click.echo(f"\nbest: {best.name}, {words}")
        for sentence in told:
            click.echo(f"  {sentence}")
        if best is not None:
            click.echo(f"\n{_next_commands(sweep.folder, best.name, is_probe=bool(whole_recipes))}")
    if failed:
        count = f"{len(failed)} of {len(points)} points failed"
        first = f"{failed[0].name}: {failed[0].sentence}"
        raise RunError(f"{sweep.folder}: {count}, the first of them {first}; --resume tries them again")


def _is_finished(folder: Path, entry: SweepEntry) -> bool:
    """True for a point that needs no more training, and whose adapter is whole."""
    if entry.state not in ("finished", "stopped"):
        return False
    damaged = find_damage(folder / entry.name, required=ADAPTER_SAFE_WEIGHTS_NAME)
    if damaged:
        _echo_stderr(f"{folder / entry.name}: is damaged: {damaged}; trained again")
    return not damaged


def _can_resume(folder: Path) -> bool:
    """True if a run can go on from a checkpoint there; what another attempt left is removed."""
    if has_valid_checkpoint(folder):
        return True
    if folder.is_dir():
        with lock_folder(folder, _echo_stderr):
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK_FILE:
                    path.unlink()
    return False


def _sweep_record(sweep: Sweep, runs: Sequence[dict[str, Any]], warnings: Sequence[str]) -> dict[str, Any]:
    """What `--json` prints."""
    best = next((run for run in runs if run["name"] == sweep.best), None)
    return {
        "folder": str(sweep.folder),
        "metric": sweep.metric,
        "points": [vars(entry) for entry in sweep.points],
        "runs": list(runs),
        "best": None if best is None else best["name"],
        "recipe": None if best is None else str(sweep.folder / BEST_RECIPE_FILE),
        "eval_pairs": None if best is None else best["eval_pairs"],
        "cautions": list(warnings),
    }


def _next_commands(folder: Path, best: str, *, is_probe: bool) -> str:
    """Lines to paste: talk to the best adapter, unless it had a short run, and train its recipe."""
    chat = f"qlora-dpo chat {shlex.quote(str(folder / best))}"
    again = f"qlora-dpo train {shlex.quote(str(folder / BEST_RECIPE_FILE))}"
    if is_probe:
        return f"{again}   # all of its pairs"
    width = max(len(chat), len(again)) + 3
    return f"{chat:<{width}}# talk to it\n{again:<{width}}# its recipe, trained on its own"


def _echo_stderr(text: str) -> None:
    click.echo(text, err=True)
