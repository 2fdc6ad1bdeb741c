"""The tables [train], [samples] and [track]: the optimization, the prompts that are sampled, and the trackers."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qlora_dpo.recipe.tables import NonEmptyStr, NonNegativeInt, PositiveInt, RecipeTable

MetricName = Literal[
    "loss",
    "preference_loss",
    "sft_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "perplexity",
    "kl",
]
"""The metrics of an evaluation, under TRL's names."""
LOWER_IS_BETTER: set[MetricName] = {
    *(
        "loss",
        "preference_loss",
        "sft_loss",
        "rewards/rejected",
        "logps/rejected",
        "logits/rejected",
        "entropy",
        "perplexity",
    ),
    "kl",
}

DEFAULT_ROW_TOKENS = 2048
"""Tokens of a row if memory allows it and the recipe does not set `train.micro_batch_tokens`."""


class TrainTable(RecipeTable):
    """The optimization."""

    engine: Literal["qlora_dpo", "trl"] = "qlora_dpo"
    """`qlora_dpo` is this project's loop; `trl` runs the same recipe through stock `trl.DPOTrainer`."""
    optim: Literal[
        "adamw_torch",
        "schedule_free_adamw",
        "adafactor",
        "sgd",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
    ] = "adamw_torch"
    """The optimizer. The 8-bit and paged ones are bitsandbytes' and need a CUDA GPU. `schedule_free_adamw` keeps a
    running mean of the weights; it needs `pip install 'qlora_dpo[schedule-free]'` and a constant schedule."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """The peak learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"
    ] = "linear"
    """The schedule of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay; norms that are trained as full copies have none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this L2 norm."""
    batch_size: PositiveInt = 16
    """Pairs per optimizer step."""
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Tokens that go through the model at once, with shared prompts counted once; affects memory and speed, but not the
    result. `auto` takes 2048, or a half, a quarter, ... of that if memory requires it, before layers are recomputed."""
    num_train_epochs: PositiveInt = 1
    """Passes over the training pairs."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; absent: after the last epoch."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: a third slower, with much less memory. `auto` does so for as few
    layers as memory requires, `true` for all layers, `false` for none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """The seed of the adapter's initial weights, of the order of the pairs and of sampled subsets."""
    logging_steps: PositiveInt = 10
    """Optimizer steps between two logged lines."""
    eval_steps: PositiveInt | None = None
    """Optimizer steps between two evaluations; absent: at step 0, after each epoch and at the end."""
    save_steps: PositiveInt | None = None
    """Optimizer steps between two checkpoints; absent: after each epoch but the last."""
    metric_for_best_model: MetricName = "loss"
    """The held-out metric that decides which evaluation is best. Losses, metrics of rejected completions, `entropy`,
    `perplexity` (of `loss_type = "sft"`) and `kl` are better when lower, all others when higher."""
    load_best_model_at_end: bool = False
    """Write the adapter of the best evaluation instead of the one of the last step."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations in a row that are not better than the best one; absent: never."""

    @property
    def row_tokens(self) -> int:
        """`micro_batch_tokens` as a number: `auto` is the default, before memory is taken into account."""
        return DEFAULT_ROW_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    @field_validator("metric_for_best_model", mode="before")
    @classmethod
    def _strip_eval_prefix(cls, name: Any) -> Any:
        return name.removeprefix("eval_") if isinstance(name, str) else name

    @model_validator(mode="after")
    def _check_warmup(self) -> "TrainTable":
        if self.warmup_steps > 0 and self.lr_scheduler_type == "constant":
            raise ValueError(
                'has warmup_steps, which "constant" skips; write lr_scheduler_type = "constant_with_warmup"'
            )
        return self

    @model_validator(mode="after")
    def _check_schedule_free(self) -> "TrainTable":
        if self.optim == "schedule_free_adamw" and not self.lr_scheduler_type.startswith("constant"):
            raise ValueError(
                f'has optim = "schedule_free_adamw", whose mean takes the place of lr_scheduler_type = '
                f'"{self.lr_scheduler_type}"; write "constant" or "constant_with_warmup"'
            )
        return self


class SamplesTable(RecipeTable):
    """Held-out prompts for which base and tuned model generate greedy completions, after training and during it."""

    prompts: NonNegativeInt = 3
    """How many held-out prompts get completions in samples.jsonl; the first 3 are shown at the end."""
    at_evaluations: PositiveInt | None = None
    """How many held-out prompts get a completion at every evaluation too, including step 0, in evaluation_samples.jsonl
    and in the trackers; absent: none. It does not affect training."""
    max_new_tokens: PositiveInt = 96
    """Maximum length of a completion, in tokens."""
    group_by: NonEmptyStr | None = None
    """The column of the held-out rows by which completions are grouped and counted."""
    count_matching: NonEmptyStr | None = None
    """A regular expression; the share of completions that match it is reported for each group."""

    @field_validator("count_matching")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"a regular expression, and it is not: {error}") from error
        return pattern


class TrackTable(RecipeTable):
    """Experiment trackers, any number of them; they receive what metrics.jsonl holds."""

    wandb: NonEmptyStr | None = None
    """The Weights & Biases project; offline when not logged in."""
    tensorboard: bool | NonEmptyStr = False
    """`true` writes TensorBoard's event files into the run folder; with a folder's name they go there, into a subfolder
    with the run's name. Needs `pip install 'qlora_dpo[tensorboard]'`."""
    trackio: NonEmptyStr | None = None
    """The Trackio project, in the Trackio database on this machine. Needs `pip install 'qlora_dpo[trackio]'`."""

    @model_validator(mode="after")
    def _check_any_tracker(self) -> "TrackTable":
        if self.wandb is None and not self.tensorboard and self.trackio is None:
            raise ValueError('names no tracker; write wandb = "PROJECT", tensorboard = true or trackio = "PROJECT"')
        return self
