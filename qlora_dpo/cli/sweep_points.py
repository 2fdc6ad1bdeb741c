"""Goes through the points of a sweep, one run each on one base, and says at the end which is the best."""

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qlora_dpo.cli.failure import sentence_of
from qlora_dpo.cli.train import run_once
from qlora_dpo.errors import Interrupted, RunError
from qlora_dpo.lock import LOCK, held
from qlora_dpo.manifest import damage
from qlora_dpo.model import device
from qlora_dpo.recipe.grid import Axis, Point
from qlora_dpo.recipe.train import Metric
from qlora_dpo.report.runs import runs_table, summary
from qlora_dpo.report.sweep import cautions, figure
from qlora_dpo.run_folder import WEIGHTS
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.sweep import BEST, Entry, Sweep, begin, evaluation, write_best
from qlora_dpo.training.sweep_base import Shared


@contextmanager
def claimed(
    folder: Path, axes: Sequence[Axis], points: Sequence[Point], metric: Metric, *, resume: bool
) -> Iterator[Sweep]:
    """The sweep in `folder`, new or resumed, for as long as it lasts; no other process gets in meanwhile."""
    new = not folder.exists()
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file; name a new folder with -o DIR")
    try:
        with held(folder, _say):
            yield begin(folder, axes, points, metric, resume=resume)
    except BaseException:
        if new and folder.is_dir():
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def train_each(sweep: Sweep, points: Sequence[Point]) -> None:
    """Train every point that has not ended yet; one that fails is noted, and the next one has its turn.

    Raises Interrupted after SIGINT or SIGTERM, and whatever keeps base or pairs from being read, since no point could
    be trained then.
    """
    left = [
        (point, entry) for point, entry in zip(points, sweep.points, strict=True) if not _has_ended(sweep.folder, entry)
    ]
    if len(left) < len(points):
        _say(f"{len(points) - len(left)} of {len(points)} points have ended already")

    def tell(fingerprints: dict[str, str]) -> None:
        sweep.fingerprints = fingerprints
        sweep.write()

    shared = Shared([point.loaded.recipe for point in points], sweep.fingerprints, tell)
    here = device.choose(points[0].loaded.recipe.model.dtype)
    if left:
        _say("\n".join(here.lines()))
    for point, entry in left:
        place = f"point {points.index(point) + 1} of {len(points)}"
        _say(f"\n{place}: {point.words}")
        sweep.mark(entry, "running")
        folder = sweep.folder / point.name
        try:
            outcome = run_once(point.loaded, folder, here, resume=_goes_on(folder), shared=shared)
            stopped = outcome.state.stopped if outcome.state.stopped_by_sign else ""
            for sentence in outcome.unsaved:
                _say(f"{place}: the adapter is whole, but a checkpoint could not be saved: {sentence}")
            del outcome
        except Interrupted as error:
            raise Interrupted(f"{place}: {error}") from error
        except KeyboardInterrupt as error:
            raise Interrupted(f"{place}: interrupted; the same command with --resume goes on there") from error
        except Exception as error:
            if shared.base is None:
                sweep.mark(entry, "waiting")
                raise
            sweep.mark(entry, "failed", sentence_of(error))
            _say(f"{place} failed: {entry.sentence}")
            continue
        sweep.mark(entry, "stopped" if stopped else "finished", stopped)
        _say(f"{place}: {figure(sweep.metric, sweep.take(entry))} at step {entry.step}")


def conclude(sweep: Sweep, points: Sequence[Point], *, as_json: bool) -> None:
    """Show the runs, the best first, and write the recipe of the best; RunError if any point failed."""
    sweep.measure()
    ranked = [entry for entry in sweep.ranked() if (sweep.folder / entry.name / "resolved.toml").is_file()]
    runs = [summary(sweep.folder / entry.name) for entry in ranked]
    evaluations = {entry.name: evaluation(sweep.folder / entry.name) for entry in ranked if entry.state == "finished"}
    told = list(cautions(evaluations, sweep.metric, list(sweep.over), sweep.folder / (sweep.best or "")))
    best = next((point for point in points if point.name == sweep.best), None)
    failed = [entry for entry in sweep.points if entry.state == "failed"]
    words = ""
    if best is not None:
        record = evaluations[best.name]
        shown = figure(sweep.metric, record[f"eval_{sweep.metric}"])
        words = f"{shown} on {record['eval_pairs']} held-out pairs ({best.words})"
        write_best(sweep, best, f"The best of {len(points)} points of {best.loaded.path.name}: {words}")
    if as_json:
        click.echo(json.dumps(_facts(sweep, runs, told), ensure_ascii=False))
    else:
        _say("")
        if runs:
            console = Console()
            console.print(runs_table(runs, console.width))
        if best is not None:
            click.echo(f"\nbest: {best.name}, {words}")
        for sentence in told:
            click.echo(f"  {sentence}")
        if best is not None:
            click.echo(f"\n{_next_commands(sweep.folder, best.name)}")
    if failed:
        count = f"{len(failed)} of {len(points)} points failed"
        first = f"{failed[0].name}: {failed[0].sentence}"
        raise RunError(f"{sweep.folder}: {count}, the first of them {first}; --resume tries them again")


def _has_ended(folder: Path, entry: Entry) -> bool:
    """True for a point that needs no more training, and whose adapter is whole."""
    if entry.state not in ("finished", "stopped"):
        return False
    damaged = damage(folder / entry.name, needed=WEIGHTS)
    if damaged:
        _say(f"{folder / entry.name}: is damaged: {damaged}; trained again")
    return not damaged


def _goes_on(folder: Path) -> bool:
    """True if a run can go on from a checkpoint there; what another attempt left is removed."""
    if not folder.is_dir():
        return False
    try:
        newest_valid(folder)
        return True
    except RunError:
        with held(folder, _say):
            for each in folder.iterdir():
                if each.is_dir():
                    shutil.rmtree(each)
                elif each.name != LOCK:
                    each.unlink()
        return False


def _facts(sweep: Sweep, runs: Sequence[dict[str, Any]], told: Sequence[str]) -> dict[str, Any]:
    """What `--json` prints."""
    best = next((run for run in runs if run["name"] == sweep.best), None)
    return {
        "folder": str(sweep.folder),
        "metric": sweep.metric,
        "points": [vars(entry) for entry in sweep.points],
        "runs": list(runs),
        "best": None if best is None else best["name"],
        "recipe": None if best is None else str(sweep.folder / BEST),
        "eval_pairs": None if best is None else best["eval_pairs"],
        "cautions": list(told),
    }


def _next_commands(folder: Path, best: str) -> str:
    """Two lines to paste: talk to the best adapter, and train its recipe anew."""
    chat = f"qlora-dpo chat {shlex.quote(str(folder / best))}"
    again = f"qlora-dpo train {shlex.quote(str(folder / BEST))}"
    width = max(len(chat), len(again)) + 3
    return f"{chat:<{width}}# talk to it\n{again:<{width}}# its recipe, trained on its own"


def _say(words: str) -> None:
    click.echo(words, err=True)
