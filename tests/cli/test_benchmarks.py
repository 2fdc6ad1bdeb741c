"""The benchmarks run: what they print elsewhere stands in benchmarks/README.md."""

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from fork_server import run_forked

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

pytestmark = tiny_run.LIBRARIES_WARN

Import = Callable[[str], Any]


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Import:
    """Imports a file of the benchmarks by its name, which may set torch's allocator for its own process."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__


def gpu(*words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run `python benchmarks/gpu.py WORDS` to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def first_cells(text: str) -> list[str]:
    """The first column of all tables, their heads included."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]


def test_without_a_gpu_the_acceptance_run_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = gpu("train", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("no CUDA device; --device cpu --tiny shows that the benchmark runs\n")


SMALL = ("--device", "cpu", "--tiny", "--batch", "4", "--rounds", "1")
TOLD = {
    "train": """guards pass, exit code of train; loss, first and mean of the last three; planned and measured peak, GiB;
        exit code after SIGTERM; exit code of --resume; adapter, resumed against whole""",
    "variants": "int8; dense; DoRA; recomputed; adamw_8bit",
    "ceiling": """exit code without a ceiling; a ceiling at rows of 522 tokens; exit code under it;
        losses, largest difference; adapters, relative L2 distance""",
    "commands": "train; eval; compare; merge; chat, run; chat, merged; serve, one request",
    "several": "one process; 2 processes, DDP; DDP, adapter from that of one",
    "speed": """ours, spans, rows of 2,048; ours, spans, rows of 2,048, reference along (first epoch);
        ours, spans, rows of 2,048, no dense weights kept; ours, spans, rows of 16,384; ours, batched, rows of 2,048;
        ours, batched, rows of 16,384; TRL's defaults, micro-batch 4; TRL's best, micro-batch 1;
        TRL's best, micro-batch 4; what; TRL's defaults against ours as shipped; TRL's best against ours as shipped""",
    "memory": "512; 1,024; 2,048",
    "kernels": """cuDNN's attention, batched rows, bf16, other pairs each time;
        fp16 products that sum in fp16, fp32; Triton in TRL's head, bf16""",
}
"""The first column of each part's tables, without the head of the first."""


@pytest.mark.slow
@pytest.mark.parametrize("what", list(TOLD))
def test_every_part_of_the_acceptance_run_runs_on_a_cpu(what: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = gpu(what, *SMALL, "-o", "told.md", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    told = (tmp_path / "told.md").read_text(encoding="utf-8")
    assert first_cells(told)[1:] == [" ".join(cell.split()) for cell in TOLD[what].split(";")]
    assert first_cells(told) == first_cells(done.stdout)  # in which libraries have their say too


COMMANDS = [file for file in sorted(BENCHMARKS.glob("*.py")) if "ArgumentParser(" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    "file", [file for file in COMMANDS if "__main__" in file.read_text()], ids=lambda file: file.name
)
def test_every_benchmark_can_be_imported_and_has_help(file: Path, tmp_path: Path) -> None:
    done = run_forked([str(file), "--help"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {file.name} ")


def report(benchmark_module: Import, file: Path) -> Any:
    return benchmark_module("gpu_table").Report(file)


def test_decoding_is_timed_in_three_ways_that_say_the_same(benchmark_module: Import, tmp_path: Path) -> None:
    table = report(benchmark_module, tmp_path / "told.md")
    benchmark_module("gpu_questions").decode(tmp_path, "card", table, "tiny", 4)
    lines = (tmp_path / "told.md").read_text(encoding="utf-8").splitlines()
    assert first_cells("\n".join(lines)) == [
        "way",
        "bitsandbytes' own (fused where its rule says so)",
        "dequantized for every token",
        "dense weights, kept",
    ]
    assert [line.split("|")[5].strip() for line in lines[-3:]] == ["4 of 4 tokens"] * 3


def test_a_profile_shares_out_all_of_a_steps_time(benchmark_module: Import, tmp_path: Path) -> None:
    table = report(benchmark_module, tmp_path / "told.md")
    benchmark_module("gpu_profile").run(tmp_path, "card", table, "tiny", 64, 2, 2048, None)
    rows = [line.split("|")[1:4] for line in (tmp_path / "told.md").read_text(encoding="utf-8").splitlines()[1:]]
    shares = {row[0].strip(): float(row[2].strip(" %")) for row in rows if len(row) == 3 and row[2].endswith("% ")}
    assert {"products", "attention", "conversions between dtypes", "elementwise and sums"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(100, abs=1)


@pytest.mark.parametrize(
    ("operator", "parent", "kind"),
    [
        ("aten::mm", "", "products"),
        ("aten::addmm_", "", "products"),
        ("aten::copy_", "aten::_to_copy", "conversions between dtypes"),
        ("aten::copy_", "aten::clone", "copies and joins"),
        ("aten::_efficient_attention_backward", "", "attention"),
        ("torch_attn::_varlen_attn", "", "attention"),
        ("bitsandbytes::dequantize_4bit", "", "dequantization"),
        ("aten::index_select", "", "gathers and scatters"),
        ("aten::comm", "", "elementwise and sums"),
    ],
)
def test_an_operator_is_counted_by_what_it_does(
    operator: str, parent: str, kind: str, benchmark_module: Import
) -> None:
    assert benchmark_module("gpu_profile").kind_of(operator, parent) == kind


def test_what_has_to_hold_and_does_not_makes_the_exit_code_1(benchmark_module: Import, tmp_path: Path) -> None:
    table = report(benchmark_module, tmp_path / "told.md")
    table.check("one", "1 | 2", "1", True)
    table.check("two", 2, "", None)
    table.target("speed", 1.5, 4, " times", judged=True)
    assert table.end() == 0
    table.check("three", 4, "3", False)
    assert table.end() == 1
    assert (tmp_path / "told.md").read_text(encoding="utf-8").splitlines() == [
        "| one | 1 / 2 | 1 | yes |",
        "| two | 2 |  |  |",
        "| speed | 1.50 times | at least 4 times | NO |",
        "",
        "0.0 minutes; all that has to hold does",
        "",
        "| three | 4 | 3 | NO |",
        "",
        "0.0 minutes; does not hold: three",
        "",
    ]


def test_planted_memory_is_out_for_long_rows_with_gradients_alone(benchmark_module: Import) -> None:
    words = torch.nn.Embedding(4, 2)
    with benchmark_module("gpu_card").out_of_memory_above(3):
        words(torch.tensor([1, 2, 3]))
        with torch.no_grad():
            words(torch.tensor([0, 1, 2, 3]))
        with pytest.raises(torch.OutOfMemoryError, match="out of memory, as it was planted here"):
            words(torch.tensor([0, 1, 2, 3]))
    words(torch.tensor([0, 1, 2, 3]))


def wheel(file: Path, **contents: bytes) -> Path:
    """A wheel with these files, whose RECORD names them all."""
    with zipfile.ZipFile(file, "w") as packed:
        for name, content in contents.items():
            packed.writestr(name, content)
        packed.writestr("one-1.dist-info/RECORD", "".join(f"{name},sha256=x,1\n" for name in contents))
    return file


def test_a_repacked_wheel_has_the_wanted_library_and_a_true_record(benchmark_module: Import, tmp_path: Path) -> None:
    libraries = {f"one/libone_{kind}.so": kind.encode() * 9 for kind in ("cpu", "cuda126", "cuda130")}
    file = wheel(tmp_path / "one-1-py3-none-any.whl", **{"one/__init__.py": b""}, **libraries)
    left_out = benchmark_module("gpu_repack").repack(file, ["libone_*.so"], ["cuda130.", "_cpu."])
    assert left_out == ["one/libone_cuda126.so"]
    with zipfile.ZipFile(file) as packed:
        record = {name: (digest, size) for name, digest, size in csv.reader(io.StringIO(record_of(packed)))}
        assert set(record) == set(packed.namelist())
        assert record.pop("one-1.dist-info/RECORD") == ("", "")
        for name, (digest, size) in record.items():
            content = packed.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={expected}", str(len(content)))


def record_of(packed: zipfile.ZipFile) -> str:
    return packed.read("one-1.dist-info/RECORD").decode()


def test_a_wheel_without_the_wanted_library_is_left_alone(benchmark_module: Import, tmp_path: Path) -> None:
    file = wheel(tmp_path / "one-1-py3-none-any.whl", **{"one/libone_cpu.so": b"cpu"})
    before = file.read_bytes()
    told = "one-1-py3-none-any.whl: no file is for cuda130.; there are one/libone_cpu.so"
    with pytest.raises(SystemExit, match=f"^{told}$"):
        benchmark_module("gpu_repack").repack(file, ["libone_*.so"], ["cuda130."])
    assert file.read_bytes() == before
