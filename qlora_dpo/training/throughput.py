"""The metrics and the throughput of the steps between two logged lines, and the peak of memory."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_dpo.model.device import Device
from qlora_dpo.preference.metrics import MetricSums, make_metric_sums
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.context import TrainContext


class MetricsWindow:
    """The metrics and the time since the last logged line."""

    def __init__(self, context: TrainContext) -> None:
        self.context = context
        self.sums = make_metric_sums(context.recipe.objective)
        self.started, self.idle = time.monotonic(), 0.0

    def add(self, sums: MetricSums) -> None:
        """Add the metrics of one step."""
        self.sums.add(sums)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the throughput: it is not training."""
        began = time.monotonic()
        yield
        self.idle += time.monotonic() - began

    def record(self, state: TrainState, grad_norm: float, learning_rate: float) -> dict[str, Any]:
        """The line to log after `state.step`, under TRL's names; a collective."""
        sums = self.sums.all_reduce()
        seconds = time.monotonic() - self.started - self.idle
        state.seconds += seconds
        return {
            "step": state.step,
            "epoch": self.context.data_order.epoch(state.step),
            **sums.means(),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "num_tokens": state.num_tokens,
            "pairs_per_second": sums.pairs / seconds,
            "tokens_per_second": sums.tokens / seconds,
            "seconds": state.seconds,
            "memory_bytes": peak_memory_bytes(self.context.device),
            **({"skipped_steps": state.skipped_steps} if self.context.device.needs_grad_scaler else {}),
        }


def peak_memory_bytes(device: Device) -> int:
    """The most memory used so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
