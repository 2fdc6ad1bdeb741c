"""Runs tasks of lm-eval (Gao et al.), the harness behind most leaderboards, on base and tuned model.

lm-eval is an extra; its tasks name their own data sets, which come from the hub or, for custom tasks, from files.
"""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import RecipeError, SourceError
from qlora_dpo.model.device import Device
from qlora_dpo.model.lora import adapter_disabled

logger = logging.getLogger(__name__)

INSTALL_COMMAND = "pip install 'qlora_dpo[tasks]'"
BATCH_SIZE = 8


def make_task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's task manager, which also knows the tasks in `folder`.

    Raises RecipeError if lm-eval is not installed, or has no task with one of the names.
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
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Every metric of every task for base and tuned model, with standard errors where lm-eval reports them.

    At most `limit` rows of each task are used. Raises SourceError if a task's data cannot be read.
    """
    logger.info(f"lm-eval: {', '.join(names)} with the base")
    with adapter_disabled(model):
        base = _simple_evaluate(model, tokenizer, device, manager, names, limit)
    logger.info(f"lm-eval: {', '.join(names)} with the tuned model")
    tuned = _simple_evaluate(model, tokenizer, device, manager, names, limit)
    return {
        task: {
            metric: {
                "base": value,
                "tuned": tuned[task][metric],
                "base_stderr": _metric_stderr(base[task], metric),
                "tuned_stderr": _metric_stderr(tuned[task], metric),
            }
            for metric, value in metrics.items()
            if not metric.partition(",")[0].endswith("_stderr")
        }
        for task, metrics in base.items()
    }


def _simple_evaluate(
    model: Any, tokenizer: Any, device: Device, manager: Any, names: Sequence[str], limit: int | None
) -> dict[str, dict[str, float]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with device.autocast():
            wrapped = HFLM(pretrained=model.get_base_model(), tokenizer=tokenizer, batch_size=BATCH_SIZE)
            results = simple_evaluate(
                wrapped, tasks=list(names), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = sanitize_text((str(error).splitlines() or [""])[0])
        raise SourceError(
            f"--tasks {', '.join(names)}: cannot be run ({type(error).__name__}: {first_line[:200]}); its data must be "
            "in the cache, on the hub, or named as a file in a task of your own"
        ) from error
    return {
        task: {key: float(value) for key, value in metrics.items() if "," in key and isinstance(value, int | float)}
        for task, metrics in (results or {})["results"].items()
    }


def _metric_stderr(metrics: dict[str, float], metric: str) -> float | None:
    """The standard error of `metric`, which is a `name,filter`."""
    name, _, filter_ = metric.partition(",")
    return metrics.get(f"{name}_stderr,{filter_}")
