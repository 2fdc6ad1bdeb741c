"""What every test starts from: no network, no telemetry, caches of its own, and no wandb account."""

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_caches = tempfile.TemporaryDirectory(prefix="qlora-dpo-tests-")

# Libraries read these when they are imported, and subprocesses inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=f"{_caches.name}/hf",
    QLORA_DPO_CACHE=f"{_caches.name}/qlora_dpo",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    COLUMNS="100",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models this small, threads that wait for each other only cost
for name in ("QLORA_DPO_TRACEBACK", "HF_TOKEN", "WANDB_API_KEY", "PYTHONWARNINGS"):
    os.environ.pop(name, None)

# Nothing here can see what a power cut would lose; helpers/file_faults.py tells what was flushed by the calls.
os.fsync = lambda handle: None

# A shell without job control has Ctrl+C ignored by what it puts in the background, and by all that this starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST_FIRST = (
    *(
        "test_end_to_end",
        "test_pairs_command",
        "test_pretended_gpu",
        "test_every_key",
        "test_push",
        "test_services",
        "test_processes",
    ),
    *(
        "test_memory",
        "test_losses",
        "test_canaries",
        "test_exit_codes",
        "test_formats",
        "test_pairwise",
        "test_crashes",
    ),
    *("test_trl_engine", "test_notebook", "test_quality", "test_mixture", "test_best", "test_oom_retry", "test_check"),
    *("test_chat_more", "test_generated_rows", "test_model_sources", "test_slurm", "test_sweep", "test_serve_command"),
)
"""The files that take longest, from 20 seconds up: with `-n 2 --dist loadfile`, both workers then end together."""


def pytest_configure(config: pytest.Config) -> None:
    """Have xdist hand out files in the order of collection, not by their number of tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, whole, and leave all others in their order."""
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Keep the libraries out of every later search for garbage, of which what is tested asks for many."""
    gc.freeze()


@pytest.fixture(autouse=True)
def own_accelerator() -> None:
    """Accelerate keeps what a process runs on; each test starts as a process of its own would."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A command that fails leaves SIGTERM ignored, since it ends; what later tests start would inherit that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def no_plots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs draw no plots, a third of the time of a tiny one, but in a module that says `DRAWS_PLOTS = True`."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules and not getattr(request.module, "DRAWS_PLOTS", False):
            from qlora_dpo.report import write

            patch.setattr(write, "draw_plots", lambda records, results: [])
        yield


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test: a new one, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and empty."""
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """An adapter beside its base, both the test's own to damage."""
    from saved_adapters import save_adapter, save_base  # torch, which most tests do not need

    save_base(tmp_path / "base")
    return save_adapter(tmp_path / "a", tmp_path / "base")
