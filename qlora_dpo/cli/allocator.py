"""Configures torch's CUDA allocator before torch is imported, unless the user has done so."""

import os
import sys

ALLOC_CONF_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The environment variables for it; torch reads the second if the first is not set."""


def use_expandable_segments() -> None:
    """Let torch grow its blocks of GPU memory.

    Rows have different lengths in every step, and freed blocks of fixed lengths would fragment the memory. Linux only:
    elsewhere torch does not support it, and warns.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOC_CONF_VARIABLES):
        os.environ[ALLOC_CONF_VARIABLES[0]] = "expandable_segments:True"
