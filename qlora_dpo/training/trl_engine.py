"""Runs a recipe through stock `trl.DPOTrainer`, so that anyone can check this project's loop against it."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from qlora_dpo.errors import RecipeError, RunError
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.objective import Aot, Discopop, ExoPair, Objective, PlainLoss, Robust, Sigmoid, WeightedSum
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.context import TrainContext
from qlora_dpo.training.data_order import DataOrder, epoch_permutation
from qlora_dpo.training.evaluate import run_evaluation
from qlora_dpo.training.throughput import peak_memory_bytes

logger = logging.getLogger(__name__)


def train_with_trl(
    model: PeftModel,
    context: TrainContext,
    state: TrainState,
    run_log: RunLog,
    resume_from: Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> TrainState:
    """Train `model` in place with TRL: our token ids, first LoRA weights and order of pairs, TRL's step and reference.

    Evaluations are this project's, so that tables compare; the training lines are TRL's own. What differs: TRL's SFT
    term is a mean over the chosen tokens of a micro-batch where ours is a mean over pairs, a last, smaller batch of an
    epoch is a mean over its micro-batches, losses that compare the pairs of a step compare those of a micro-batch, and
    nothing is saved before the end. Raises RecipeError for an objective that TRL's trainer does not have, for a resume
    and for a deadline, and RunError when the loss stops being finite.
    """
    if resume_from is not None or context.deadline < math.inf:
        option = "--max-hours" if resume_from is None else "--resume"
        raise RecipeError(f'{option} needs train.engine = "qlora_dpo"; TRL\'s checkpoints are pickled')
    check_trl_supports(context.recipe.objective)
    if context.recipe.train.optim not in ("adamw_torch", "sgd") or context.recipe.lora.loraplus_lr_ratio is not None:
        key = "lora.loraplus_lr_ratio" if context.recipe.lora.loraplus_lr_ratio is not None else "train.optim"
        raise RecipeError(f'{key} needs train.engine = "qlora_dpo" here; leave it out, or change the engine')
    logger.info(
        f"engine: trl.DPOTrainer {version('trl')}, which computes the reference in every step and saves no checkpoint"
    )
    if getattr(context.recipe.objective, "sft_weight", 0):
        logger.info("engine: TRL's SFT term is a mean over the tokens of a micro-batch, not over pairs")
    with TemporaryDirectory(prefix="qlora-dpo-trl-") as work, _restored_forwards(model):
        trainer = create_trainer(model, context, tokenizer, work)
        trainer.add_callback(_RunLogCallback(model, context, state, run_log))
        trainer.train()
    return state


def create_trainer(model: PeftModel, context: TrainContext, tokenizer: PreTrainedTokenizerBase, folder: str) -> Any:
    """A stock DPOTrainer that trains the adapter of `model` on the training pairs in their order."""
    first: dict[str, Tensor] = {name: parameter.data for name, parameter in trainable_parameters(model).items()}
    # the trainer insists on tokenizing something: one row of text stands in for the pairs, which have their ids
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer: Any = DPOTrainer(
        model=model, args=dpo_config(context.recipe, context, folder), train_dataset=text, processing_class=tokenizer
    )
    # its reference is a copy of the adapter, unless there is none: then it is the base with the adapter off
    model.delete_adapter("ref")
    for name, parameter in model.named_parameters():
        # of a 4-bit model it has rounded the adapter to bf16
        parameter.requires_grad_(name in first)
        if name in first:
            parameter.data = first[name]
    trainer.remove_callback(PrinterCallback)
    trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(_data_loader(context, trainer))
    return trainer


def dpo_config(recipe: Recipe, context: TrainContext, folder: str) -> Any:
    """The recipe as a DPOConfig; where TRL's default differs from this project's loop, the loop's value is set."""
    train, dtype = recipe.train, context.device.compute_dtype
    at_once = per_device_batch_size(recipe)
    return DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=train.batch_size // at_once,
        num_train_epochs=train.num_train_epochs,
        max_steps=context.data_order.total_steps,
        **_objective_args(recipe.objective),
        max_length=None,
        disable_dropout=False,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        optim=train.optim,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=train.gradient_checkpointing is True,
        gradient_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing is True else None,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        use_cpu=context.device.type == "cpu",
        seed=train.seed,
        logging_steps=train.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
    )


def check_trl_supports(table: Objective) -> None:
    """Raise RecipeError unless `trl.DPOTrainer` computes the objective as the recipe means it."""
    why = ""
    if (
        not isinstance(table, Sigmoid | Robust | ExoPair | PlainLoss | Aot | Discopop | WeightedSum)
        or table.loss_type == "cal_dpo"
    ):
        why = f'loss_type = "{table.loss_type}", which TRL\'s DPOTrainer does not have'
    elif isinstance(table, Sigmoid) and table.label_smoothing:
        why = "label_smoothing, which TRL's sigmoid loss ignores"
    else:
        unknown = [key for key in ("weight_column", "margin_column") if getattr(table, key, None) is not None]
        why = f"{unknown[0]}, which TRL's DPOTrainer does not have" if unknown else ""
    if why:
        raise RecipeError(f'[objective] has {why}; leave it out, or set train.engine = "qlora_dpo"')


def _objective_args(table: Any) -> dict[str, Any]:
    """An objective that `check_trl_supports` has passed, as arguments of DPOConfig."""
    weights = (
        {str(name): share for name, share in table.loss_weights.items()}
        if isinstance(table, WeightedSum)
        else {table.loss_type: 1.0}
    )
    if table.sft_weight:
        weights["sft"] = table.sft_weight
    optional = ("f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "discopop_tau")
    return {
        "beta": table.beta,
        "loss_type": list(weights),
        "loss_weights": list(weights.values()),
        "ld_alpha": table.ld_alpha,
        "use_weighting": table.use_weighting,
        **{key: value for key in optional if (value := getattr(table, key, None)) is not None},
    }


def per_device_batch_size(recipe: Recipe) -> int:
    """Pairs per micro-batch: the largest divisor of the batch that fits the token budget at full length, at least 1."""
    fitting = max(1, recipe.train.row_tokens // (2 * recipe.data.max_length))
    return max(n for n in range(1, min(fitting, recipe.train.batch_size) + 1) if recipe.train.batch_size % n == 0)


@dataclass
class DataOrderSampler:
    """A sampler with the order of each epoch; the trainer sets the epoch."""

    data_order: DataOrder
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_permutation(self.data_order.num_pairs, self.data_order.seed, self.epoch))

    def __len__(self) -> int:
        return self.data_order.num_pairs


def _data_loader(context: TrainContext, trainer: Any) -> DataLoader[Any]:
    """The training pairs' token ids in their order, batched by TRL's own collator."""
    rows: Any = [
        {"prompt_ids": list(pair.prompt), "chosen_ids": list(pair.chosen), "rejected_ids": list(pair.rejected)}
        for pair in context.train.pairs
    ]
    return DataLoader(
        rows,
        batch_size=trainer.args.per_device_train_batch_size,
        sampler=DataOrderSampler(context.data_order),
        collate_fn=trainer.data_collator,
    )


@contextmanager
def _restored_forwards(model: PeftModel) -> Iterator[None]:
    """Remove the `forward` that TRL and accelerate put on the model on exit, so that it computes as before."""
    modules = [model, model.get_base_model()]
    before = [vars(module).get("forward") for module in modules]
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


class _RunLogCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluates where this project's loop would, and writes TRL's records to the run log."""

    def __init__(self, model: PeftModel, context: TrainContext, state: TrainState, run_log: RunLog) -> None:
        self.model, self.context, self.state, self.run_log = model, context, state, run_log
        self.pairs, self.since = 0, time.monotonic()

    def on_train_begin(self, args: Any, trl_state: Any, control: Any, **more: Any) -> None:
        run_evaluation(self.model, self.context, self.state, self.run_log)
        self.since = time.monotonic()

    def on_step_end(self, args: Any, trl_state: Any, control: Any, **more: Any) -> None:
        step, order = trl_state.global_step, self.context.data_order
        self.pairs += len(order.batch_indices(step))
        self.state.step = step
        self.run_log.step(step)
        is_last = step == order.total_steps
        control.should_log = control.should_log or is_last
        if order.evaluates_after(step, self.context.recipe.train.eval_steps):
            began = time.monotonic()
            run_evaluation(self.model, self.context, self.state, self.run_log)
            self.since += time.monotonic() - began
        if self.state.stopped:
            control.should_training_stop = control.should_log = True

    def on_log(self, args: Any, trl_state: Any, control: Any, logs: dict[str, Any], **more: Any) -> None:
        if "loss" not in logs:
            return  # the trainer's last record, of its run time
        step, state = trl_state.global_step, self.state
        if not math.isfinite(logs["loss"]):
            raise RunError(f"step {step}: TRL's loss is not finite; lower train.learning_rate or look at the data")
        seconds, tokens = time.monotonic() - self.since, int(logs["num_tokens"]) - state.num_tokens
        state.seconds += seconds
        state.num_tokens += tokens
        names = {name: value for name, value in logs.items() if name != "epoch"}
        if not getattr(self.context.recipe.objective, "sft_weight", 0):
            names["preference_loss"] = logs["loss"]
        self.run_log.log_train(
            {
                "step": step,
                "epoch": self.context.data_order.epoch(step),
                **names,
                "num_tokens": state.num_tokens,
                "pairs_per_second": self.pairs / seconds,
                "tokens_per_second": tokens / seconds,
                "seconds": state.seconds,
                "memory_bytes": peak_memory_bytes(self.context.device),
            }
        )
        self.pairs, self.since = 0, time.monotonic()
