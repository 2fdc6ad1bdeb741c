"""Before torch is imported a command says how a GPU's memory is laid out, unless the user has said it."""

import os
import subprocess
import sys

import pytest

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
    own = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
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


@pytest.mark.gpu
def test_torch_heeds_it() -> None:
    assert last_line(ON_A_GPU) == "True"
