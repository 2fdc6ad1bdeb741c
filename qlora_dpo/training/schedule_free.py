"""Schedule-free AdamW (Defazio et al. 2024): steps are taken at one point, and a running mean of points is kept.

Going from the point to the mean and back rounds. So the point is put aside while the mean is evaluated, and how often
that happens changes no bit of a run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qlora_dpo.errors import RecipeError

COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr")
"""What the optimizer counts of its steps, in each group of parameters."""


def create_schedule_free(groups: Sequence[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """The optimizer, ready to step; raises RecipeError if the package schedulefree is not installed."""
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise RecipeError(
            'train.optim = "schedule_free_adamw" needs the package schedulefree; install it with: pip install '
            "'qlora_dpo[schedule-free]'"
        ) from error
    optimizer: Any = AdamWScheduleFree(list(groups), **settings)
    optimizer.train()
    result: torch.optim.Optimizer = optimizer
    return result


@contextmanager
def eval_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the model stand at the mean; afterwards it is back where it steps, bit for bit. Others are left alone."""
    if not _is_schedule_free(optimizer):
        yield
        return
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    points = [each.detach().clone() for each in parameters]
    finalize(optimizer)
    try:
        yield
    finally:
        with torch.no_grad():
            for each, point in zip(parameters, points, strict=True):
                each.copy_(point)
        for group in optimizer.param_groups:
            group["train_mode"] = True


def finalize(optimizer: Any) -> None:
    """Leave the model at the mean, for good; an optimizer of another kind has it where it belongs."""
    if _is_schedule_free(optimizer):
        optimizer.eval()


def get_counters(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """What a checkpoint keeps of the optimizer beside its moments, by group; nothing of another kind."""
    if not _is_schedule_free(optimizer):
        return []
    return [{name: group[name] for name in COUNTERS} for group in optimizer.param_groups]


def restore_counters(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, float]]) -> None:
    """Put back what `counters` gave."""
    for group, own in zip(optimizer.param_groups, saved, strict=False):
        group |= own


def _is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    return "train_mode" in optimizer.param_groups[0]
