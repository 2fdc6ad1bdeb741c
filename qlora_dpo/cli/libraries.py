"""Imports the libraries of every command that opens a model, in less time than their import statements take."""

import atexit
import gc
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any


def import_libraries() -> None:
    """Import torch, bitsandbytes, transformers and PEFT: two thirds of the start of `chat` (benchmarks/README.md).

    None of it is ever garbage, so the garbage collector does not look for any: not during the imports, which takes a
    fifth of them, and not when the process ends, which takes a second.
    """
    if "peft" in sys.modules:
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        _import_bitsandbytes()
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()
    atexit.register(gc.freeze)


def _import_bitsandbytes() -> None:
    """Import bitsandbytes, which compiles four functions with torch.compile, and so loads all of torch's compiler.

    They are for devices without kernels of their own. Here each is compiled when it is called for the first time.
    """
    import torch

    compile_at_once = torch.compile

    def compile_when_called(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: compile_when_called(function, **options)
        compiled: list[Callable[..., Any]] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile_at_once(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = compile_when_called  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_at_once
