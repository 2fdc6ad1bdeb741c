"""The notebook runs as a whole on a machine that is not Colab, and goes on where it was stopped."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_sandbox import furnish
from fork_server import write_python

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
RECIPE = """
[model]
name = "./base"
quantization = "none"
dtype = "fp32"

[data]
train = "./train.jsonl"
eval = "./eval.jsonl"
max_length = 200

[train]
batch_size = 4
max_steps = 2
save_steps = 1

[samples]
prompts = 1
max_new_tokens = 2
"""

pytestmark = [
    # ipykernel 7.4 and zmq under Python 3.11 and later
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def executed(folder: Path, python: Path | None = None, **parameters: Any) -> Any:
    """The notebook after all its cells have run in `folder`, with `parameters` instead of its own.

    `python` is the program that the cells start commands with, if it is not the kernel's.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (cell,) = [each for each in notebook.cells if "parameters" in each.metadata.get("tags", [])]
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    if python:
        cell.source += f"\nimport sys\nsys.executable = {str(python)!r}"
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook


def told(notebook: Any) -> str:
    """All that the cells have printed."""
    return "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return tmp_path


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_trains_goes_on_where_it_was_stopped_compares_talks_and_merges(
    stopped: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    furnish(folder, RECIPE)
    python = write_python(folder / "python", os.environ)
    tiny = {"RECIPE": "tiny.toml", "RUN": "adapters/tiny", "MERGED": "merged/tiny"}
    if stopped:
        with pytest.raises(nbclient.exceptions.CellExecutionError, match="stopped; run the cell again"):
            executed(folder, python, **tiny, MAX_HOURS=1e-6)
        assert [each.name for each in (folder / "adapters/tiny/checkpoints").iterdir()] == ["step-000001"]
    after = told(executed(folder, python, **tiny))
    assert "this is not Colab; run and cache stay on this machine" in after
    assert ("step 1/2" in after) is not stopped
    assert "step 2/2" in after
    assert "'model.safetensors'" in after.splitlines()[-1]
    assert json.loads((folder / "adapters/tiny/results.json").read_text())["last"] == 2


@pytest.mark.slow
@pytest.mark.network
def test_with_the_quickstart_recipe(folder: Path) -> None:
    after = told(executed(folder))
    assert "step 104/104" in after
    results = json.loads((folder / "adapters/quickstart/results.json").read_text())
    assert results["evals"][-1]["eval_rewards/accuracies"] > 0.9
    assert (folder / "merged/quickstart/model.safetensors").is_file()


def test_it_is_kept_without_outputs_and_names_no_address_of_a_repository() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert "http" not in NOTEBOOK.read_text()
