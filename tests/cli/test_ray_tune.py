"""docs/ray_tune.py searches with the real Ray Tune, where it is installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from saved_adapters import save_base, save_pairs
from sweep_recipe import RECIPE

from qlora_dpo.recipe import load_recipe

EXAMPLE = Path(__file__).parents[2] / "docs" / "ray_tune.py"


@pytest.mark.slow
def test_ray_tune_trains_each_trial_and_names_the_best_recipe(tmp_path: Path) -> None:
    pytest.importorskip("ray.tune", reason="needs ray[tune]")
    save_base(tmp_path / "base")
    save_pairs(tmp_path / "train.jsonl", 8)
    save_pairs(tmp_path / "held.jsonl", 4)
    (tmp_path / "r.toml").write_text(RECIPE)
    package = os.pathsep.join([str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "r.toml", "-o", "tuned", "--trials", "2", "--set", "train.batch_size=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": package, "QLORA_DPO_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    name, loss = re.findall(r"^best: (\w+), eval_loss ([\d.]+), ", done.stdout, flags=re.MULTILINE)[0]
    best = tmp_path / "tuned" / name
    assert f"{json.loads((best / 'results.json').read_text())['evals'][-1]['eval_loss']:.4f}" == loss
    assert load_recipe(str(tmp_path / "tuned" / "best.toml")).recipe == load_recipe(str(best / "resolved.toml")).recipe
    assert load_recipe(str(best / "resolved.toml")).recipe.train.batch_size == 2
    runs = [each.parent for each in (tmp_path / "tuned").glob("*/resolved.toml")]
    assert len(runs) == 2
    assert sum((each / "adapter_model.safetensors").is_file() for each in runs) >= 1  # ASHA may end the other one
