"""Imports the libraries of every command that opens a model, in less time than their import statements take."""

import atexit
import gc
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
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
    if "transformers.utils.import_utils" not in sys.modules:
        sys.meta_path.insert(0, _ExportsFinder())
    try:
        _import_bitsandbytes()
        import peft  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()
    atexit.register(gc.freeze)


class _ExportsFinder(MetaPathFinder):
    """Makes transformers find the `__all__` of its 1,700 model files, read twice, in a twentieth of the time."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The usual spec of transformers' module of import functions, one of which is replaced once it has run."""
        if name != "transformers.utils.import_utils":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if fetch := getattr(module, "fetch__all__", None):
                    module.fetch__all__ = lambda text: fetch(_from_exports(text))  # type: ignore[attr-defined]

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _from_exports(text: str) -> str:
    """A module's text from its last line that begins with `__all__`, which is all that transformers looks at."""
    start = text.rfind("\n__all__")
    return text[start + 1 :] if start >= 0 else text


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
