"""Before torch is imported a command says how memory is laid out and what it keeps, unless the user has said it."""

import os
import subprocess
import sys

import pytest
import torch

from qlora_dpo.model.device import cpu_has_bf16

GROWING = "expandable_segments:True"
TOLD = """
import os, sys
sys.platform = {platform!r}
from qlora_dpo.cli import main
main(["--version"])
assert "torch" not in sys.modules
print(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), os.environ.get("PYTORCH_ALLOC_CONF"))
"""
ON_A_GPU = """
from qlora_dpo.cli import main
main(["--version"])
import torch
torch.zeros(1, device="cuda")
print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""


def last_line(code: str, **environment: str) -> str:
    """The last line that a new process prints, with the allocator's variables as given."""
    own = {name: value for name, value in os.environ.items() if not name.endswith(("ALLOC_CONF", "CACHE_CAPACITY"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**own, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("platform", "given", "expected"),
    [
        ("linux", {}, f"{GROWING} None"),
        ("linux", {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "backend:cudaMallocAsync None"),
        ("linux", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, "None max_split_size_mb:128"),
        ("linux", {"PYTORCH_CUDA_ALLOC_CONF": ""}, " None"),
        ("darwin", {}, "None None"),
    ],
)
def test_segments_grow_on_linux_unless_the_user_has_set_something(
    platform: str, given: dict[str, str], expected: str
) -> None:
    assert last_line(TOLD.format(platform=platform), **given) == expected


KEPT_PRODUCTS = """
import ctypes, sys
from qlora_dpo.cli import main
main(["--version"])
import torch

class HeapCounts(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = HeapCounts
torch.set_num_threads(1)
weight, used = torch.ones(256, 256, dtype=torch.bfloat16), []
for tokens in range(1, 1001):
    torch.ones(tokens, 256, dtype=torch.bfloat16) @ weight
    used.append(mallinfo2().uordblks)
print(used[-1] - used[299])
"""
DEFAULT_CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16 instructions")
def test_products_of_ever_changing_shapes_are_not_all_kept() -> None:
    """After the first 300 shapes, which fill the cache, 700 more take next to nothing."""
    by_default = int(last_line(KEPT_PRODUCTS, **DEFAULT_CAPACITIES))
    assert by_default > 2**22
    assert int(last_line(KEPT_PRODUCTS)) < by_default / 10


def test_the_capacity_of_the_caches_is_what_the_user_says() -> None:
    shown = "from qlora_dpo.cli import main; main(['--version']); import os; print(os.environ['LRU_CACHE_CAPACITY'])"
    assert last_line(shown) == "16"
    assert last_line(shown, LRU_CACHE_CAPACITY="9") == "9"


@pytest.mark.gpu
def test_torch_heeds_it() -> None:
    assert last_line(ON_A_GPU) == "True"
