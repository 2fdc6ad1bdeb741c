"""The evaluation of step 0 is made once for all runs that start alike, and anew for any that does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from accelerate.state import AcceleratorState

from qlora_dpo import files
from qlora_dpo.errors import SourceError
from qlora_dpo.files import read_cached_record, write_cached_record
from qlora_dpo.model.distributed import processes
from qlora_dpo.preference.objective import LossColumns
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.preference.start_evaluation import start_evaluation_file
from qlora_dpo.recipe import Recipe
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.context import PreferenceDataset
from qlora_dpo.training.loop import train_loop
from qlora_dpo.training.run import _start_evaluation_file

pytestmark = tiny_run.LIBRARIES_WARN


def file_of(what: Recipe, folder: Path, seed: int = 1, columns: LossColumns | None = None) -> Path | None:
    return start_evaluation_file(folder, what, tiny_run.pairs(6, seed), columns or LossColumns())


def evaluations(what: Recipe, folder: Path, file: Path | None) -> list[dict[str, Any]]:
    """The evaluations of a run of one step."""
    AcceleratorState._reset_state(True)
    model = tiny_run.fresh(what)
    job = replace(tiny_run.job(model, what, folder), start_evaluation_file=file)
    state = tiny_run.start(job)
    with RunLog(folder, job.data_order.total_steps, silent=True) as run:
        train_loop(model, job, state, run, None)
    return state.evals


def test_a_second_run_takes_the_figures_of_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    what = tiny_run.recipe(train={"max_steps": 1})
    other = tiny_run.recipe(train={"max_steps": 1, "learning_rate": 1e-2, "seed": 7}, lora={"r": 8})
    file = file_of(what, tmp_path)
    assert file is not None
    assert file == file_of(other, tmp_path)
    first = evaluations(what, tmp_path / "first", file)
    assert first[0]["seconds"] > 0
    assert "known from an earlier run" not in caplog.text
    second = evaluations(other, tmp_path / "second", file)
    assert second[0] == {**first[0], "seconds": 0.0}
    assert second[1]["step"] == 1
    assert second[1]["seconds"] > 0
    alone = evaluations(other, tmp_path / "alone", None)
    without_seconds = [{name: value for name, value in each.items() if name != "seconds"} for each in alone]
    assert without_seconds == [{name: value for name, value in each.items() if name != "seconds"} for each in second]


def test_what_changes_the_figures_has_another_file(tmp_path: Path) -> None:
    what = tiny_run.recipe()
    weighted = LossColumns(weight_P=torch.ones(6))
    files = [
        file_of(what, tmp_path),
        file_of(what, tmp_path, seed=2),
        file_of(what, tmp_path, columns=weighted),
        file_of(what, tmp_path, columns=LossColumns(weight_P=2 * torch.ones(6))),
        file_of(tiny_run.recipe(objective={"beta": 0.3}), tmp_path),
        file_of(tiny_run.recipe(objective={"loss_type": "ipo"}), tmp_path),
        file_of(tiny_run.recipe(lora={"use_dora": True}), tmp_path),
        file_of(what, tmp_path / "another reference"),
    ]
    assert len(set(files)) == len(files)
    assert None not in files


def test_a_run_that_starts_as_another_model_has_none(tmp_path: Path) -> None:
    first = {"init_from": "adapters/first"}
    assert file_of(tiny_run.recipe(lora=first), tmp_path) is None
    assert file_of(tiny_run.recipe(lora=first, reference={"kind": "ema"}), tmp_path) is None
    assert file_of(tiny_run.recipe(reference={"kind": "adapter", "path": "adapters/first"}), tmp_path) is not None


def test_trl_and_several_processes_make_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, plain = ReferenceLogpCache(tmp_path), tiny_run.recipe()
    heldout = PreferenceDataset(tiny_run.pairs(6, 1), torch.zeros(6, 2))
    assert _start_evaluation_file(plain, heldout, cache) == file_of(plain, tmp_path)
    assert _start_evaluation_file(tiny_run.recipe(train={"engine": "trl"}), heldout, cache) is None
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    assert _start_evaluation_file(plain, heldout, cache) is None


def test_a_damaged_file_is_not_read_and_a_full_disk_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "evaluation.json"
    assert read_cached_record(file) is None
    write_cached_record(file, {"eval_loss": 0.5, "eval_pairs": 4})
    assert read_cached_record(file) == {"eval_loss": 0.5, "eval_pairs": 4}
    whole = file.read_text()
    for damaged in (whole[:-9], whole.replace("0.5", "0.4"), "[]", '{"digest": ""}', "\x00"):
        file.write_text(damaged)
        assert read_cached_record(file) is None
    file.unlink()
    write_cached_record(file, {"eval_perplexity": float("inf")})
    assert not file.exists()

    def full(path: Path, value: Any) -> None:
        raise SourceError(f"{path}: no space left on device")

    monkeypatch.setattr(files, "write_json", full)
    write_cached_record(file, {"eval_loss": 0.5})
    assert not file.exists()
