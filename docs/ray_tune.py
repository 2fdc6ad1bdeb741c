"""Search over a recipe's keys with Ray Tune, a process of `qlora-dpo train` for each trial: see docs/sweeps.md.

    pip install 'ray[tune]'
    python docs/ray_tune.py recipes/hh.toml -o adapters/hh-tune --trials 16 --gpus 1

Change SPACE to what you look for. Ray's ASHA ends trials that fall behind at an evaluation, so give the recipe several
(`train.eval_steps`).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths stay those of the folder that this is started in

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

SPACE = {
    "objective.beta": tune.choice([0.05, 0.1, 0.3]),
    "train.learning_rate": tune.loguniform(1e-6, 1e-4),
    "lora.r": tune.choice([8, 16, 32]),
}
"""Keys of the recipe, and what their values are drawn from."""
METRIC, MODE = "eval_loss", "min"
"""A name that the evaluations in metrics.jsonl have, and which way is better."""
SECONDS = 1.0
"""Between two looks at metrics.jsonl."""


def train(config: dict[str, Any]) -> None:
    """One trial: train in a process of its own, and report every evaluation as soon as it is written."""
    folder = Path(config["home"]) / tune.get_context().get_trial_id()
    sets = [word for key, value in config["set"].items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "qlora_dpo", "train", config["recipe"], *config["options"], *sets]
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with log.open("w") as said:
        process = subprocess.Popen([*command, "-o", str(folder)], stdout=said, stderr=subprocess.STDOUT)
        try:
            for record in evaluations(folder / "metrics.jsonl", process):
                tune.report({**record, "folder": str(folder)})  # raises where Ray ends a trial early
        finally:
            process.terminate()  # the run would save a checkpoint, for which Ray does not always wait
            process.wait()
    if process.returncode:
        raise RuntimeError(log.read_text().splitlines()[-1])


def evaluations(file: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, float]]:
    """The evaluations that a run writes into `file`, in turn, until its process has ended."""
    told = 0
    while True:
        ended = process.poll() is not None
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        found = [record for record in found if record["kind"] == "eval"]
        for record in found[told:]:
            yield {name: value for name, value in record.items() if name != "kind" and value is not None}
        told = len(found)
        if ended:
            return
        time.sleep(SECONDS)


def search(recipe: str, home: Path, trials: int, options: list[str], resources: dict[str, float]) -> tune.ResultGrid:
    """Run so many trials, each with `resources`, and return what they reported."""
    tuner = tune.Tuner(
        tune.with_resources(train, resources),
        param_space={"set": SPACE, "recipe": recipe, "home": str(home), "options": options},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode=MODE,
            num_samples=trials,
            scheduler=ASHAScheduler(time_attr="step", max_t=10**9, grace_period=1),
        ),
        run_config=tune.RunConfig(name="ray", storage_path=str(home), verbose=1),
    )
    return tuner.fit()


def main() -> int:
    """Search, show the runs, and copy the recipe of the best one to best.toml."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("recipe", help="the recipe that all trials start from")
    words.add_argument("-o", dest="home", type=Path, required=True, help="folder of the runs")
    words.add_argument("--trials", type=int, default=8, help="how many runs")
    words.add_argument("--cpus", type=float, default=1, help="cores for each run")
    words.add_argument("--gpus", type=float, default=0, help="GPUs for each run; 0.5 lets two share one")
    words.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="of all runs")
    words.add_argument("--address", help="a Ray cluster whose machines share the folder; absent: this machine")
    asked = words.parse_args()
    ray.init(address=asked.address) if asked.address else ray.init(include_dashboard=False)
    home, options = asked.home.resolve(), [word for each in asked.sets for word in ("--set", each)]
    recipe = str(Path(asked.recipe).resolve()) if Path(asked.recipe).exists() else asked.recipe
    found = search(recipe, home, asked.trials, options, {"cpu": asked.cpus, "gpu": asked.gpus})
    subprocess.run([sys.executable, "-m", "qlora_dpo", "runs", str(home), "--sort", "loss"], check=True)
    for error in found.errors:
        print(f"failed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    best = found.get_best_result().metrics
    shutil.copy(Path(best["folder"], "resolved.toml"), home / "best.toml")
    name = Path(best["folder"]).name
    print(f"best: {name}, {METRIC} {best[METRIC]:.4f}, {best['config']['set']}; its recipe: {home / 'best.toml'}")
    return 1 if found.errors else 0


if __name__ == "__main__":
    sys.exit(main())
