"""What a training run is made of, from its first step to its last, and how a step is abandoned."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.objective import LossColumns
from qlora_dpo.preference.pack import Packing
from qlora_dpo.preference.reference_adapter import ADAPTER_OFF, ReferenceAdapter
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.data_order import DataOrder

SampleFn = Callable[[PeftModel], Sequence[Mapping[str, Any]]]
"""Generates completions of some held-out prompts, one record per prompt, as evaluation_samples.jsonl holds them."""


class StepAborted(Exception):
    """Raised when a stop request abandons a step between micro-batches; its gradient is discarded."""


@dataclass(frozen=True)
class PreferenceDataset:
    """Training or held-out pairs with the reference's log-probabilities (P, 2), in nats, and the columns of the loss.

    Reference log-probabilities of training pairs are NaN until the step that needs them has computed them.
    """

    pairs: Sequence[EncodedPair]
    reference_P2: Tensor
    columns: LossColumns = field(default_factory=LossColumns)
    is_dummy: bool = False
    """True for the single pair of a rank without pairs of its own; its results are discarded."""

    def for_this_rank(self) -> "PreferenceDataset":
        """The pairs of this rank, or one dummy pair if it has none."""
        if processes.world_size() == 1:
            return self
        local = rank_split.rank_indices(self.pairs)
        indices = local or [0]
        pairs = [self.pairs[i] for i in indices]
        return PreferenceDataset(pairs, self.reference_P2[indices], self.columns.select(indices), is_dummy=not local)

    def first(self, count: int | None) -> "PreferenceDataset":
        """The first `count` pairs; None for all of them."""
        if count is None or count >= len(self.pairs):
            return self
        return PreferenceDataset(self.pairs[:count], self.reference_P2[:count], self.columns.select(list(range(count))))

    def set_reference(self, indices: Sequence[int], reference_P2: Tensor) -> None:
        """Fill in reference log-probabilities (P, 2) that were computed during training."""
        self.reference_P2[list(indices)] = reference_P2


@dataclass(frozen=True)
class TrainContext:
    """The fixed inputs of a training run, and the folder it writes to."""

    recipe: Recipe
    device: Device
    data_order: DataOrder
    train: PreferenceDataset
    heldout: PreferenceDataset
    packing: Packing
    run_dir: Path
    reference_cache: ReferenceLogpCache
    reference_adapter: ReferenceAdapter = ADAPTER_OFF
    planned_bytes: int = 0
    """What a step takes beyond the loaded model, by plan; 0 if it is not known."""
    allowed_changes: tuple[str, ...] = ()
    """Keys of the recipe that may differ from the checkpoint's on resume."""
    deadline: float = math.inf
    """The time, by `time.monotonic`, at which the run must have ended."""
    interim_eval_pairs: int | None = None
    """Held-out pairs of an evaluation between the first and the last; None for all of them."""
    start_evaluation_file: Path | None = None
    """Where the evaluation of step 0 is kept for runs that start alike; None if it is not."""
    sample_fn: SampleFn | None = None
    """Called at every evaluation; None if the recipe asks for no samples."""
    save_errors: list[str] = field(default_factory=list)
    """Why checkpoints could not be saved, one sentence each; the run goes on without them."""

    def is_logged(self, step: int) -> bool:
        """True if the metrics of `step` are written to metrics.jsonl."""
        return step in (1, self.data_order.total_steps) or step % self.recipe.train.logging_steps == 0
