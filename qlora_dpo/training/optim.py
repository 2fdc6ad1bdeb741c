"""The optimizer over the adapter's float32 weights, and the learning rate's schedule."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, assert_never

import bitsandbytes as bnb
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.recipe.train import TrainTable

Optimizer = torch.optim.Optimizer

SCHEDULE_FREE_COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr")
"""What schedule-free AdamW counts in each parameter group."""


def create_optimizer(
    parameters: Mapping[str, nn.Parameter], table: TrainTable, device: Device, loraplus_lr_ratio: float | None = None
) -> Optimizer:
    """The recipe's optimizer, with the Trainer's defaults (betas 0.9 and 0.999, epsilon 1e-8).

    With `loraplus_lr_ratio`, lora_B learns that many times as fast (Hayou et al. 2024, eq. 3). Raises RecipeError for
    one that this device does not have.
    """
    # norms that are trained as whole copies would be pulled to 0 by the decay; the Trainer exempts them as well
    norms = [name for name, weight in parameters.items() if ".modules_to_save." in name and weight.dim() == 1]
    fast = [name for name in parameters if "lora_B" in name and loraplus_lr_ratio is not None]
    groups: list[dict[str, Any]] = [
        {"params": [weight for name, weight in parameters.items() if name not in {*norms, *fast}]}
    ]
    if loraplus_lr_ratio is not None:
        fast_rate = table.learning_rate * loraplus_lr_ratio
        groups.append({"params": [parameters[name] for name in fast], "lr": fast_rate})
    if norms:
        groups.append({"params": [parameters[name] for name in norms], "weight_decay": 0.0})
    rate: dict[str, Any] = {"lr": table.learning_rate, "weight_decay": table.weight_decay}
    adam: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
    check_optimizer(table, device)
    match table.optim:
        case "adamw_torch":
            return torch.optim.AdamW(groups, **rate, **adam)
        case "schedule_free_adamw":
            return create_schedule_free(groups, **rate, **adam)
        case "adafactor":
            return torch.optim.Adafactor(groups, **rate)
        case "sgd":
            return torch.optim.SGD(groups, **rate)
        case "adamw_8bit":
            return bnb.optim.AdamW8bit(groups, **rate, **adam)  # type: ignore[no-any-return]
        case "paged_adamw_8bit":  # pragma: cuda
            return bnb.optim.PagedAdamW8bit(groups, **rate, **adam)  # type: ignore[no-any-return]
        case "paged_adamw_32bit":  # pragma: cuda
            return bnb.optim.PagedAdamW32bit(groups, **rate, **adam)  # type: ignore[no-any-return]
        case never:
            assert_never(never)


def check_optimizer(table: TrainTable, device: Device) -> None:
    """Raise RecipeError for an optimizer that this device does not have."""
    if table.optim not in ("adamw_torch", "schedule_free_adamw", "adafactor", "sgd") and device.type != "cuda":
        raise RecipeError(
            f'train.optim = "{table.optim}" needs a CUDA GPU; on this CPU choose "adamw_torch", "adafactor" or "sgd"'
        )


def create_scheduler(optimizer: Optimizer, table: TrainTable, total_steps: int) -> LambdaLR:
    """The learning rate over `total_steps`, by transformers' names."""
    schedule: LambdaLR = get_scheduler(
        table.lr_scheduler_type, optimizer, num_warmup_steps=table.warmup_steps, num_training_steps=total_steps
    )
    return schedule


def restore_scheduler(scheduler: LambdaLR, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put the schedule back to where `saved` was taken, and the optimizer's learning rate with it.

    The rate is that of this schedule, so a run that goes on with another `max_steps` follows its new course.
    """
    scheduler.load_state_dict(dict(saved))
    rates = [
        base * course(scheduler.last_epoch)
        for base, course in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def create_schedule_free(groups: Sequence[dict[str, Any]], **settings: Any) -> Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024), which steps at one point and keeps a running mean of points.

    Raises RecipeError if the package schedulefree is not installed.
    """
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise RecipeError(
            'train.optim = "schedule_free_adamw" needs the package schedulefree; install it with: pip install '
            "'qlora_dpo[schedule-free]'"
        ) from error
    optimizer: Any = AdamWScheduleFree(list(groups), **settings)
    optimizer.train()
    result: Optimizer = optimizer
    return result


@contextmanager
def eval_weights(optimizer: Optimizer) -> Iterator[None]:
    """Inside, a schedule-free model stands at its mean of points; other optimizers are left alone.

    Going from the point to the mean and back rounds, so the point is put aside meanwhile and put back bit for bit: how
    often the model is evaluated changes no bit of a run.
    """
    if not _is_schedule_free(optimizer):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    points = [parameter.detach().clone() for parameter in parameters]
    finalize(optimizer)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, point in zip(parameters, points, strict=True):
                parameter.copy_(point)
        for group in optimizer.param_groups:
            group["train_mode"] = True


def finalize(optimizer: Any) -> None:
    """Leave a schedule-free model at its mean, for good; other optimizers are left alone."""
    if _is_schedule_free(optimizer):
        optimizer.eval()


def get_counters(optimizer: Optimizer) -> list[dict[str, float]]:
    """What a checkpoint keeps of a schedule-free optimizer beside its moments, by parameter group; else nothing."""
    if not _is_schedule_free(optimizer):
        return []
    return [{name: group[name] for name in SCHEDULE_FREE_COUNTERS} for group in optimizer.param_groups]


def restore_counters(optimizer: Optimizer, saved: Sequence[Mapping[str, float]]) -> None:
    """Put back what `counters` gave."""
    for group, own in zip(optimizer.param_groups, saved, strict=False):
        group |= own


def _is_schedule_free(optimizer: Optimizer) -> bool:
    return "train_mode" in optimizer.param_groups[0]
