"""The three commands with real weights and real HH rows, where ../shared and a package index can be reached."""

import gzip
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_sandbox import DATA, HH, MODEL, Workplace
from hub import Hub

SHARED = Path(__file__).parents[3] / "shared"
ROWS = SHARED / "data" / "hh" / "full-hh-style.jsonl.gz"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(not ROWS.is_file(), reason="the tool that fetches real weights is not beside this checkout"),
]


def fill(root: Path) -> None:
    """SmolLM2-135M-Instruct and 28 rows of HH under the names that recipes/hh.toml has."""
    tool = SHARED / "tools" / "get_models.py"
    subprocess.run([sys.executable, str(tool), "smollm2", str(root / "models" / MODEL)], check=True)
    with gzip.open(ROWS, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 28)]
    (root / "datasets" / DATA / "data").mkdir(parents=True)
    for split, part in (("train", rows[:20]), ("test", rows[20:])):
        table = pa.Table.from_pylist(part)
        pq.write_table(table, root / "datasets" / DATA / "data" / f"{split}-00000-of-00001.parquet")


def test_hh_is_trained_merged_and_talked_to_with_real_weights(tmp_path: Path) -> None:
    fill(tmp_path / "hub")
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    sets = ("train.batch_size=4", "train.warmup_steps=1", "train.learning_rate=1e-4", "train.logging_steps=1")
    changes = [word for each in (*sets, "data.max_length=256", "samples.max_new_tokens=24") for word in ("--set", each)]
    with Hub(tmp_path / "hub") as hub:
        place = Workplace(tmp_path / "work", hub)
        trained = place.run("train", HH, "--max-steps", "4", *changes, most_seconds=900, **threads)
        assert trained.returncode == 0, trained.stderr
        merged = place.run("merge", **threads)
        assert merged.returncode == 0, merged.stderr
        asked = ("--max-new-tokens", "24", "--temperature", "0")
        answers = [
            place.run("chat", *which, *asked, stdin="Name a fruit.", **threads) for which in ((), ("merged/hh",))
        ]

    evals = json.loads((place.folder / "adapters/hh/results.json").read_text(encoding="utf-8"))["evals"]
    assert [record["step"] for record in evals] == [0, 4]
    assert evals[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert evals[0]["eval_rewards/margins"] == 0
    assert abs(evals[1]["eval_rewards/margins"]) > 1e-4
    kl = re.search(r"nats per token +(\S+)", merged.stdout)
    agreement = re.search(r"top-1 agreement +(\S+)", merged.stdout)
    assert kl is not None and float(kl[1]) <= 0.001
    assert agreement is not None and float(agreement[1]) >= 0.99
    for answer in answers:
        assert (answer.returncode, answer.stderr) == (0, "")
        assert re.search(r"[a-z]{3,}", answer.stdout)
