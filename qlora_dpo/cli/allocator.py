"""How torch lays out a GPU's memory, unless the user has said how; set before torch is imported."""

import os
import sys

ALLOC_CONF_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where a user may have said it; torch reads the second where the first is not set."""


def use_expandable_segments() -> None:
    """Let torch grow its blocks of GPU memory: rows have other lengths in every step, and blocks of fixed lengths that
    were freed would lie between them unused. Only on Linux: elsewhere torch cannot do it, and warns.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOC_CONF_VARIABLES):
        os.environ[ALLOC_CONF_VARIABLES[0]] = "expandable_segments:True"
