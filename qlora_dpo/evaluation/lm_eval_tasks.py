"""Tasks of lm-eval (Gao et al.), the harness behind most leaderboards, for base and tuned model side by side.

lm-eval is an extra; its tasks name their own data sets, which come from the hub or, for tasks of one's own, from files.
"""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import RecipeError, SourceError
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled

INSTALL_COMMAND = "pip install 'qlora_dpo[tasks]'"
BATCH_SIZE = 8


def make_task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's list of tasks, with those of `folder` among them.

    Raises RecipeError if lm-eval is not installed, or has no task of a name.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f"--tasks needs lm-eval, which is not installed: {INSTALL_COMMAND}") from error
    if folder is not None and not folder.is_dir():
        raise RecipeError(f"--task-path {folder}: there is no such folder; name one with tasks as YAML files")
    manager = TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1)
            raise RecipeError(
                f"--tasks {name}: lm-eval has no such task{f'; did you mean {near[0]}?' if near else ''}"
                + ("" if near else "; --task-path DIR adds tasks of your own")
            )
    return manager


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    device: Device,
    manager: Any,
    names: Sequence[str],
    limit: int | None,
    log_info: Callable[[str], None],
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Every metric of every task: base, tuned, and their standard errors where lm-eval has them.

    `limit` is the most rows of each task. Raises SourceError where a task's data cannot be had.
    """
    log_info(f"lm-eval: {', '.join(names)} by the base")
    with adapter_disabled(model):
        base = _simple_evaluate(model, tokenizer, device, manager, names, limit)
    log_info(f"lm-eval: {', '.join(names)} by the tuned model")
    tuned = _simple_evaluate(model, tokenizer, device, manager, names, limit)
    return {
        task: {
            metric: {
                "base": value,
                "tuned": tuned[task][metric],
                "base_stderr": _metric_stderr(base[task], metric),
                "tuned_stderr": _metric_stderr(tuned[task], metric),
            }
            for metric, value in figures.items()
            if not metric.partition(",")[0].endswith("_stderr")
        }
        for task, figures in base.items()
    }


def _simple_evaluate(
    model: Any, tokenizer: Any, device: Device, manager: Any, names: Sequence[str], limit: int | None
) -> dict[str, dict[str, float]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with device.autocast():
            wrapped = HFLM(pretrained=model.get_base_model(), tokenizer=tokenizer, batch_size=BATCH_SIZE)
            found = simple_evaluate(
                wrapped, tasks=list(names), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise SourceError(
            f"--tasks {', '.join(names)}: cannot be run ({type(error).__name__}: {sanitize_text(first)[:200]}); its data "
            "must be in the cache, on the hub, or named as a file in a task of your own"
        ) from error
    results = (found or {})["results"]
    return {
        task: {key: float(value) for key, value in figures.items() if "," in key and isinstance(value, int | float)}
        for task, figures in results.items()
    }


def _metric_stderr(figures: dict[str, float], metric: str) -> float | None:
    """The standard error of `metric,filter`."""
    name, _, kind = metric.partition(",")
    return figures.get(f"{name}_stderr,{kind}")
