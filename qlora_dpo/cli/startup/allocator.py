"""Configures torch's memory before torch is imported, unless the user has done so."""

import os
import sys

ALLOC_CONF_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The environment variables of torch's CUDA allocator; torch reads the second if the first is not set."""
CACHE_CAPACITIES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "16"}
"""How many compiled matrix products oneDNN keeps, and how many torch keeps of those; by default 1,024 each."""


def use_expandable_segments() -> None:
    """Let torch grow its blocks of GPU memory.

    Rows have different lengths in every step, and freed blocks of fixed lengths would fragment the memory. Linux only:
    elsewhere torch does not support it, and warns.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOC_CONF_VARIABLES):
        os.environ[ALLOC_CONF_VARIABLES[0]] = "expandable_segments:True"


def limit_onednn_caches() -> None:
    """Let oneDNN, which multiplies in bf16 on a CPU, keep no more compiled products than the layers of a row ask for.

    Each shape is compiled, and rows of other lengths hardly ask for it again: a run would grow by 0.6 GiB
    (benchmarks/README.md).
    """
    for name, capacity in CACHE_CAPACITIES.items():
        os.environ.setdefault(name, capacity)
