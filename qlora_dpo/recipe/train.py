"""The recipe's tables of the optimization, of the samples after it and of its tracking."""

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
    "kl",
]
"""What an evaluation measures, under TRL's names."""
LOWER_IS_BETTER: set[MetricName] = {
    *("loss", "preference_loss", "sft_loss", "rewards/rejected", "logps/rejected", "logits/rejected", "entropy", "kl")
}

DEFAULT_ROW_TOKENS = 2048
"""Tokens of a row where memory allows and the recipe says no others."""


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
    """The optimizer. Those in 8 bits and the paged ones are bitsandbytes' and need a CUDA GPU. `schedule_free_adamw`
    keeps a running mean of its steps; it needs `pip install 'qlora_dpo[schedule-free]'` and a constant schedule."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"
    ] = "linear"
    """How the learning rate moves after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay; norms that are trained as whole copies have none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this L2 norm."""
    batch_size: PositiveInt = 16
    """Pairs per optimizer step."""
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Tokens that go through the model at once, a shared prompt counted once; changes memory and speed, no result.
    `auto` takes 2048, or half of them, a quarter and so on where memory asks for it, before a layer is recomputed."""
    num_train_epochs: PositiveInt = 1
    """Passes over the training pairs."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; absent: after the last epoch."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: a third slower, much less memory. `auto` does so for as few layers as
    memory asks for, `true` for all of them, `false` for none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the adapter's first weights, the order of the pairs and the draw of samples."""
    logging_steps: PositiveInt = 10
    """Optimizer steps between two logged lines."""
    eval_steps: PositiveInt | None = None
    """Optimizer steps between two evaluations; absent: at step 0, after each epoch and at the end."""
    save_steps: PositiveInt | None = None
    """Optimizer steps between two checkpoints; absent: after each epoch but the last."""
    metric_for_best_model: MetricName = "loss"
    """The held-out figure by which one evaluation is better than another. Of losses, of the rejected answers' figures,
    of `entropy` and `kl` less is better, of all others more."""
    load_best_model_at_end: bool = False
    """Write the adapter of the best evaluation rather than that of the last step."""
    early_stopping_patience: PositiveInt | None = None
    """Stop when this many evaluations in a row are no better than the best one; absent: never."""

    @property
    def row_tokens(self) -> int:
        """`micro_batch_tokens` before anyone has looked at the memory."""
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
    """Held-out prompts that base and tuned model answer greedily after training, and on the way."""

    prompts: NonNegativeInt = 3
    """How many held-out prompts are answered and written to samples.jsonl; the first 3 are shown at the end."""
    at_evaluations: PositiveInt | None = None
    """How many held-out prompts the model answers at every evaluation too, step 0 included, into
    evaluation_samples.jsonl and the trackers; absent: none. Changes no step."""
    max_new_tokens: PositiveInt = 96
    """Longest answer, in tokens."""
    group_by: NonEmptyStr | None = None
    """A column of the held-out rows by which the answers are counted."""
    count_matching: NonEmptyStr | None = None
    """A regular expression; the share of answers that contain it is reported by group."""

    @field_validator("count_matching")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"a regular expression, and it is not: {error}") from error
        return pattern


class TrackTable(RecipeTable):
    """Experiment tracking, by as many of these as are named; what they are told is what metrics.jsonl holds."""

    wandb: NonEmptyStr | None = None
    """The Weights & Biases project; offline when not logged in."""
    tensorboard: bool | NonEmptyStr = False
    """`true` writes TensorBoard's event files into the run's folder; a folder's name writes them into a folder of the
    run's name in there. Needs `pip install 'qlora_dpo[tensorboard]'`."""
    trackio: NonEmptyStr | None = None
    """The Trackio project, in Trackio's database on this machine. Needs `pip install 'qlora_dpo[trackio]'`."""

    @model_validator(mode="after")
    def _check_any_tracker(self) -> "TrackTable":
        if self.wandb is None and not self.tensorboard and self.trackio is None:
            raise ValueError('names no tracker; write wandb = "PROJECT", tensorboard = true or trackio = "PROJECT"')
        return self
