"""The plan that `train` prints before it starts: one decision per line."""

from pathlib import Path

from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed.processes import sharding_strategy
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.recipe.model import QUANTIZATION_NAMES
from qlora_dpo.recipe.objective import Objective, ReferenceFree
from qlora_dpo.recipe.recipe import LoadedRecipe
from qlora_dpo.recipe.reference import AdapterReference, EmaReference, ModelReference
from qlora_dpo.recipe.tables import is_local_path


def plan_lines(loaded: LoadedRecipe, folder: Path, device: Device, world_size: int) -> list[str]:
    """What the run will do, one decision per line."""
    model, lora, data, steps = (getattr(loaded.recipe, name) for name in ("model", "lora", "data", "train"))
    heldout = data.eval or data.train_description
    share = data.effective_eval_share
    holds = {
        "": "the whole base",
        "fsdp2": "a part of each layer of the base (FSDP2)",
        "zero2": "the whole base and a part of the optimizer's state (DeepSpeed's ZeRO-2)",
        "zero3": "a part of each layer of the base (DeepSpeed's ZeRO-3)",
    }[sharding_strategy()]
    return [
        f"recipe      {loaded.path}",
        f"base        {model.name}: "
        + QUANTIZATION_NAMES.get(model.quantization, "not quantized")
        + (" with double quantization" if model.quantization in ("nf4", "fp4") and model.double_quant else ""),
        *device.describe(),
        *([f"processes   {world_size}, each with {holds}; they share a step's pairs"] if world_size > 1 else []),
        f"lora        r {lora.r}, lora_alpha {lora.lora_alpha}, lora_dropout {lora.lora_dropout:g}, target_modules "
        + (lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules))
        + (f"; whole copies of {', '.join(lora.modules_to_save)}" if lora.modules_to_save else "")
        + (f", starting from {loaded.recipe.init_from}" if loaded.recipe.init_from else ""),
        *(f"{'train on' if n == 0 else 'and on':<11} {each}" for n, each in enumerate(_data_source_lines(data))),
        f"held out    {heldout}"
        + (
            f", {share:.0%} of its prompts" if share else "" if is_local_path(heldout) else f", split {data.eval_split}"
        ),
        f"objective   {_objective_text(loaded.recipe.objective)}; {_reference_text(loaded.recipe)}",
        f"steps       {steps.batch_size} pairs each, {steps.num_train_epochs} epoch(s)"
        + (f", at most {steps.max_steps} steps" if steps.max_steps else "")
        + f"; learning rate {steps.learning_rate:g}, {steps.lr_scheduler_type}; engine {steps.engine}",
        f"output      {folder}",
    ]


def _data_source_lines(data: DataTable) -> list[str]:
    """The sources of the training pairs."""
    if data.train is not None:
        return [data.train + ("" if is_local_path(data.train) else f", split {data.train_split}")]
    return [
        source.source
        + ("" if is_local_path(source.source) else f", split {source.split}")
        + (f", weight {source.weight:g}" if source.weight else "")
        + (f", at most {source.max_samples:,} pairs" if source.max_samples else "")
        for source in data.mix or ()
    ]


def _objective_text(table: Objective) -> str:
    """The loss with every key that is not at its default."""
    name = "sigmoid DPO" if table.loss_type == "sigmoid" else table.loss_type
    keys = ["beta", *sorted(table.model_fields_set - {"loss_type", "beta", "sft_weight"})]
    values = [f"{key} {getattr(table, key)}" for key in keys if getattr(table, key, None) is not None]
    sft = getattr(table, "sft_weight", 0)
    return ", ".join([name, *values]) + (f", plus {sft:g} * SFT on the chosen answer" if sft else "")


def _reference_text(recipe: Recipe) -> str:
    """What the policy is compared with."""
    if isinstance(recipe.objective, ReferenceFree):
        return "no reference"
    match recipe.reference:
        case AdapterReference(path=path):
            return f"the reference is the adapter of {path}, which stays as it is"
        case ModelReference(name=name):
            return f"the reference is {name}, computed before the first step"
        case EmaReference() as table:
            steps = table.ref_model_sync_steps
            every = "every step" if steps == 1 else f"every {steps} steps"
            return (
                f"the reference is a copy of the adapter that moves {every}, by {table.ref_model_mixup_alpha:g} of the "
                "way to the policy"
            )
        case _:
            return "the reference is the same model with its adapter off"
