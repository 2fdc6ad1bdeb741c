"""sweep.json: the grid of a sweep, the state of each of its points, and which one is best."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qlora_dpo.errors import RecipeError, RunError
from qlora_dpo.files import atomic_write, write_json
from qlora_dpo.lock import LOCK_FILE
from qlora_dpo.recipe.grid import GridPoint, SweepAxis, describe_changes
from qlora_dpo.recipe.recipe import resolved_toml
from qlora_dpo.recipe.train import MetricName
from qlora_dpo.training.checkpoint.best import metric_to_minimize

SWEEP_FILE, BEST_RECIPE_FILE = "sweep.json", "best.toml"


@dataclass
class SweepEntry:
    """One point: what it sets, and how far it has come."""

    name: str
    set: dict[str, Any]
    state: Literal["waiting", "running", "finished", "stopped", "failed"] = "waiting"
    """`stopped`: by `watch.stop`, so it has figures but is never the best."""
    step: int | None = None
    """The optimizer step that its adapter is of."""
    figure: float | None = None
    """What the sweep's metric is at that step."""
    sentence: str = ""
    """Why it failed or was stopped."""


@dataclass
class Sweep:
    """What sweep.json holds, and the folder it lies in."""

    folder: Path
    recipe: dict[str, Any]
    """The recipe of all points, without the keys in `over`."""
    over: dict[str, list[Any]]
    metric: MetricName
    points: list[SweepEntry]
    fingerprints: dict[str, str] = field(default_factory=dict)
    best: str | None = None

    def write(self) -> None:
        """Write sweep.json, whole or not at all."""
        values = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_json(self.folder / SWEEP_FILE, values)

    def set_state(self, entry: SweepEntry, state: str, sentence: str = "") -> None:
        """Set the state of a point."""
        entry.state, entry.sentence = state, sentence  # type: ignore[assignment]
        self.write()

    def update_results(self) -> None:
        """Read the metric of all points that have ended from their folders, and set the best."""
        for entry in self.points:
            if entry.state in ("finished", "stopped"):
                self.read_result(entry)
        ranked = self.ranked()
        self.best = ranked[0].name if ranked and ranked[0].state == "finished" else None
        self.write()

    def read_result(self, entry: SweepEntry) -> float:
        """Read the metric of a point that has ended; raises RunError if its evaluation has none of that name."""
        found = read_evaluation(self.folder / entry.name)
        figure = found.get(f"eval_{self.metric}")
        if figure is None:
            known = ", ".join(name for name in get_args(MetricName) if f"eval_{name}" in found)
            raise RunError(
                f"--metric {self.metric}: is not measured with this objective; go on with --resume and one of {known}"
            )
        entry.step, entry.figure = found["step"], figure
        return float(figure)

    def ranked(self) -> list[SweepEntry]:
        """The points, best first: those that finished, then the others in grid order."""

        def place(entry: SweepEntry) -> tuple[bool, float]:
            done = entry.state == "finished" and entry.figure is not None
            return not done, metric_to_minimize({f"eval_{self.metric}": entry.figure}, self.metric) if done else 0.0

        return sorted(self.points, key=place)


def load_or_create_sweep(
    folder: Path, axes: Sequence[SweepAxis], points: Sequence[GridPoint], metric: MetricName, *, resume: bool
) -> Sweep:
    """A new sweep in `folder`, or the one that is there.

    Raises RunError if there is one and it does not `resume`, if there is none and it does, or if it was another one.
    """
    keys = {axis.key for axis in axes}
    asked = Sweep(
        folder,
        _without_keys(points[0].loaded.recipe.model_dump(exclude_none=True), keys),
        {axis.key: list(axis.values) for axis in axes},
        metric,
        [SweepEntry(point.name, dict(point.values)) for point in points],
    )
    if not resume:
        return _create_sweep(asked)
    found = _read_sweep(folder)
    differences = [*describe_changes(found.over, asked.over), *describe_changes(found.recipe, asked.recipe)]
    if differences:
        raise RunError(
            f"{folder}: belongs to another sweep; changed since: {'; '.join(differences)}; put it back, or begin "
            "another one with -o DIR"
        )
    found.metric = metric
    return found


def parse_metric(name: str) -> MetricName:
    """The metric of that name; raises RecipeError if evaluations have none of that name."""
    known: tuple[MetricName, ...] = get_args(MetricName)
    for metric in known:
        if metric == name.removeprefix("eval_"):
            return metric
    raise RecipeError(f"--metric {name}: is not measured at an evaluation; write one of {', '.join(known)}")


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The evaluation of the step of a finished run's adapter; raises RunError if its files are damaged."""
    try:
        step = json.loads((folder / "run.json").read_text(encoding="utf-8"))["adapter_step"]
        evals = json.loads((folder / "results.json").read_text(encoding="utf-8"))["evals"]
        record: dict[str, Any] = next(evaluation for evaluation in evals if evaluation["step"] == step)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise RunError(
            f"{folder}: its run.json or results.json is damaged ({type(error).__name__}); remove the folder, and "
            "--resume trains that point again"
        ) from error
    return record


def write_best_recipe(sweep: Sweep, point: GridPoint, comment: str) -> Path:
    """Write best.toml: the resolved recipe of `point`, with a comment above it."""
    path = sweep.folder / BEST_RECIPE_FILE
    atomic_write(path, f"# {comment}\n\n{resolved_toml(point.loaded.recipe)}")
    return path


def _create_sweep(sweep: Sweep) -> Sweep:
    folder = sweep.folder
    if (folder / SWEEP_FILE).is_file():
        raise RunError(f"{folder}: holds a sweep; go on with --resume, or name another folder with -o DIR")
    # a killed write leaves its temporary name, .sweep.json.abc
    if any(file.name != LOCK_FILE and not file.name.startswith(f".{SWEEP_FILE}.") for file in folder.iterdir()):
        raise RunError(f"{folder}: is not empty; name another folder with -o DIR, or remove it")
    sweep.write()
    return sweep


def _read_sweep(folder: Path) -> Sweep:
    if not (folder / SWEEP_FILE).is_file():
        raise RunError(f"{folder}: holds no sweep to go on with; begin it without --resume")
    try:
        facts = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
        return Sweep(folder, **{**facts, "points": [SweepEntry(**entry) for entry in facts["points"]]})
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder / SWEEP_FILE}: is damaged ({type(error).__name__}); take it from a backup, or begin another "
            "sweep with -o DIR"
        ) from error


def _without_keys(tables: Mapping[str, Mapping[str, Any]], keys: set[str]) -> dict[str, Any]:
    return {
        table: {key: value for key, value in values.items() if f"{table}.{key}" not in keys}
        for table, values in tables.items()
    }
