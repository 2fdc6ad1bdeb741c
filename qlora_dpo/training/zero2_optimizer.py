"""Shards the optimizer's state over the ranks with DeepSpeed's ZeRO-2: each rank steps a slice of the adapter.

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
"""Optimizers that update each element alone, so that they can step a slice of the flattened weights."""


def check_elementwise(table: TrainTable) -> None:
    """Raise RecipeError for an optimizer whose state cannot be sharded."""
    if table.optim not in ELEMENTWISE_OPTIMIZERS:
        raise RecipeError(
            f'train.optim = "{table.optim}" cannot be sharded by ZeRO-2, which cuts matrices anywhere; take '
            '"adamw_torch", or recipes/accelerate/ddp.yaml'
        )


class Zero2Optimizer:
    """An optimizer of `parameters` whose state is sharded over the ranks, including what it holds so far.

    Its parameter groups stay, with DeepSpeed's slices of float32 weights in place of the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], device: Device) -> None:
        saved_state = {
            parameter: dict(optimizer.state[parameter]) for parameter in parameters if parameter in optimizer.state
        }
        optimizer.state.clear()
        # DeepSpeed has parameters of its own, since it takes every backward pass through one for a whole step's
        self.engine_weights = {parameter: nn.Parameter(parameter.detach()) for parameter in parameters}
        self.optimizer, self.groups = optimizer, [list(group["params"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [self.engine_weights[parameter] for parameter in group["params"]]
        self.engine = deepspeed_engine.initialize_engine(
            2, device, model=_AdapterWeights(list(self.engine_weights.values())), optimizer=optimizer
        )
        for parameter, engine_weight in self.engine_weights.items():
            parameter.data = engine_weight.data  # a place in DeepSpeed's row of all weights, which its steps fill
        if saved_state:
            self._load_state(saved_state)

    def step(self) -> None:
        """Take a step with the parameters' gradients, which are the same on all ranks."""
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.engine_weights
        ]
        self.zero_grad()
        self.engine.backward(self.engine(gradients))
        self.engine.step()

    def zero_grad(self) -> None:
        """Drop the parameters' gradients."""
        for parameter in self.engine_weights:
            parameter.grad = None

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The full state by parameter, as an unsharded optimizer has it; a collective."""
        self._link_states()
        with processes.collective_errors():
            return {
                parameter: {
                    key: safe_get_full_optimizer_state(self.engine_weights[parameter], key)
                    if value.dim()
                    else value.clone()
                    for key, value in self.optimizer.state[stretch].items()
                }
                for members, stretch in zip(self.groups, self._flat_partitions(), strict=True)
                for parameter in members
            }

    def _load_state(self, state: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
        """Load a full `state`."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.step()  # moves nothing, and then there is a state to be filled
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._link_states()
        for members, stretch in zip(self.groups, self._flat_partitions(), strict=True):
            for parameter in members:
                for key, value in state[parameter].items():
                    if value.dim():
                        safe_set_full_optimizer_state(self.engine_weights[parameter], value, key)
                    else:
                        self.optimizer.state[stretch][key] = value.clone()

    def _link_states(self) -> None:
        """Link each weight to its part of the state; DeepSpeed itself does so for the first group only."""
        for members, stretch in zip(self.groups, self._flat_partitions(), strict=True):
            weights = [self.engine_weights[parameter] for parameter in members]
            lazy_init_hp_params_optimizer_state(weights, stretch, self.optimizer.state)

    def _flat_partitions(self) -> list[Tensor]:
        """The slice of each group's float32 weights that belongs to this rank."""
        return [group["params"][0] for group in self.optimizer.param_groups]


class _AdapterWeights(nn.Module):
    """The adapter's weights, which are the whole model to DeepSpeed."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        """A scalar whose gradient is `gradients`."""
        parts = [(weight * gradient).sum() for weight, gradient in zip(self.weights, gradients, strict=True)]
        return torch.stack(parts).sum()
