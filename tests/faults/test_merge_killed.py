"""A merge that is killed or finds the disk full at any file event leaves no folder that looks like a model."""

import shutil
from itertools import count
from pathlib import Path

import pytest
import saved_adapters
import tiny_run
from file_faults import Fault, struck

from qlora_dpo.deploy.merge import merge_adapter, open_for_merge
from qlora_dpo.manifest import find_damage

pytestmark = [
    tiny_run.LIBRARIES_WARN,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc"),
]


@pytest.mark.parametrize("fault", ["killed", "torn", "full"])
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_merged_folder_is_whole_or_not_there(
    every: int, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads of a loader do not work in a forked process
    opened = open_for_merge(
        saved_adapters.save_adapter(tmp_path / "adapter", saved_adapters.save_base(tmp_path / "base"), "none")
    )
    home = tmp_path / "merged"
    for point in count(1, every):
        shutil.rmtree(home, ignore_errors=True)
        if not struck(lambda: write(opened, home / "model"), point, fault, home):
            break
        if (home / "model").exists():
            assert find_damage(home / "model", required="config.json") == "", point
    assert find_damage(home / "model", required="config.json") == ""
    assert point > 15
    print(f"{fault}: every {every} of {point} points")


def write(opened: object, folder: Path) -> None:
    merge_adapter(opened, folder, "trained", "fp32", lambda written: {"kl": 0.0, **FIGURES})  # type: ignore[arg-type]


FIGURES = {
    "measured_on": "nothing",
    "computed_in": "float32",
    "tokens": 0,
    "top1": 1.0,
    "trained_accuracy": None,
    "merged_accuracy": None,
    "why_no_accuracy": "nothing was measured",
}
