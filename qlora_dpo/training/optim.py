"""AdamW over the adapter's float32 weights, and the learning rate's course."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from qlora_dpo.recipe import TrainTable


def make_optimizer(parameters: Iterable[nn.Parameter], table: TrainTable) -> AdamW:
    """AdamW with the defaults of the Trainer's `adamw_torch` (betas 0.9 and 0.999, epsilon 1e-8)."""
    return AdamW(parameters, lr=table.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=table.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, table: TrainTable, total_steps: int) -> LambdaLR:
    """The course of the learning rate over `total_steps`, by transformers' names."""
    schedule: LambdaLR = get_scheduler(
        table.lr_scheduler_type, optimizer, num_warmup_steps=table.warmup_steps, num_training_steps=total_steps
    )
    return schedule


def restore_schedule(schedule: LambdaLR, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put the schedule back to where `saved` was taken, and the optimizer's learning rate with it.

    The rate is that of this schedule, so a run that goes on with another `max_steps` follows its new course.
    """
    schedule.load_state_dict(dict(saved))
    rates = [
        base * course(schedule.last_epoch) for base, course in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
