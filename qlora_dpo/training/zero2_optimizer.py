"""Shares the optimizer's state out among the processes by DeepSpeed's ZeRO-2: each steps a stretch of the adapter.

The gradient is summed, judged and clipped before, as with processes that share nothing, and DeepSpeed is handed the
result.
"""

from collections.abc import Mapping, Sequence

import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import deepspeed_engine, processes
from qlora_dpo.recipe.train import TrainTable

ELEMENTWISE_OPTIMIZERS = ("adamw_torch", "sgd")
"""Optimizers that step a stretch of all weights in a row as they step the weights' matrices."""


def check_elementwise(table: TrainTable) -> None:
    """Raise RecipeError for an optimizer whose state cannot be shared out."""
    if table.optim not in ELEMENTWISE_OPTIMIZERS:
        raise RecipeError(
            f'train.optim = "{table.optim}" cannot be shared out by ZeRO-2, which cuts matrices anywhere; take '
            '"adamw_torch", or recipes/accelerate/ddp.yaml'
        )


class Zero2Optimizer:
    """An optimizer of `parameters`, of whose state each process keeps its part, what it has so far included.

    The optimizer's groups stay its own, with DeepSpeed's stretches of float32 weights in place of the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], device: Device) -> None:
        so_far = {each: dict(optimizer.state[each]) for each in parameters if each in optimizer.state}
        optimizer.state.clear()
        # DeepSpeed has parameters of its own, since it takes every backward pass through one for a whole step's
        self.own = {each: nn.Parameter(each.detach()) for each in parameters}
        self.optimizer, self.groups = optimizer, [list(group["params"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [self.own[each] for each in group["params"]]
        self.engine = deepspeed_engine.initialize_engine(
            2, device, model=_AdapterWeights(list(self.own.values())), optimizer=optimizer
        )
        for each, engine_parameters in self.own.items():
            each.data = engine_parameters.data  # a place in DeepSpeed's row of all weights, which its steps fill
        if so_far:
            self._load_state(so_far)

    def step(self) -> None:
        """Take a step by the parameters' gradients, which are the same in all processes."""
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in self.own]
        self.zero_grad()
        self.engine.backward(self.engine(gradients))
        self.engine.step()

    def zero_grad(self) -> None:
        """Forget the parameters' gradients."""
        for each in self.own:
            each.grad = None

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The whole state by parameter, as the optimizer alone would have it; all processes ask for it together."""
        self._link_states()
        with processes.collective_errors():
            return {
                each: {
                    key: safe_get_full_optimizer_state(self.own[each], key) if value.dim() else value.clone()
                    for key, value in self.optimizer.state[stretch].items()
                }
                for members, stretch in zip(self.groups, self._flat_partitions(), strict=True)
                for each in members
            }

    def _load_state(self, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Make the whole `state` this one."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.step()  # moves nothing, and then there is a state to be filled
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._link_states()
        for members, stretch in zip(self.groups, self._flat_partitions(), strict=True):
            for each in members:
                for key, value in state[each].items():
                    if value.dim():
                        safe_set_full_optimizer_state(self.own[each], value, key)
                    else:
                        self.optimizer.state[stretch][key] = value.clone()

    def _link_states(self) -> None:
        """Let DeepSpeed find each weight's part of the state; by itself it does so for the first group alone."""
        for members, stretch in zip(self.groups, self._flat_partitions(), strict=True):
            own = [self.own[each] for each in members]
            lazy_init_hp_params_optimizer_state(own, stretch, self.optimizer.state)

    def _flat_partitions(self) -> list[Tensor]:
        """The stretch that is this process's of the float32 weights of each group."""
        return [group["params"][0] for group in self.optimizer.param_groups]


class _AdapterWeights(nn.Module):
    """The adapter's weights, for DeepSpeed the whole model."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        """A number of which `gradients` are the gradient."""
        parts = [(weight * gradient).sum() for weight, gradient in zip(self.weights, gradients, strict=True)]
        return torch.stack(parts).sum()
