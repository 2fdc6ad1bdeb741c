"""Attaches a LoRA adapter in float32, and disables it for the reference."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed

from qlora_dpo.errors import RecipeError
from qlora_dpo.model import dora, modules_to_save
from qlora_dpo.recipe.model import LoraTable


def attach_lora(base: PreTrainedModel, table: LoraTable, seed: int) -> PeftModel:
    """Attach a new adapter, with lora_A drawn from `seed` and lora_B zero, so that the model's output is unchanged.

    Raises RecipeError for modules and layers that the model does not have or that cannot be trained here.
    """
    set_seed(seed)  # seeds Python, NumPy and torch, whose states a checkpoint saves
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=table.r,
        lora_alpha=table.lora_alpha,
        lora_dropout=table.lora_dropout,
        target_modules=table.target_modules if isinstance(table.target_modules, str) else list(table.target_modules),
        exclude_modules=table.exclude_modules,
        layers_to_transform=_layers_to_transform(base, table),
        modules_to_save=modules_to_save.resolve_modules(base, table.modules_to_save) if table.modules_to_save else None,
        rank_pattern=dict(table.rank_pattern),
        alpha_pattern=dict(table.alpha_pattern),
        use_rslora=table.use_rslora,
        use_dora=table.use_dora,
        init_lora_weights=True if table.init_lora_weights == "default" else table.init_lora_weights,
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        head = base.get_output_embeddings()
        linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head]
        targets = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise RecipeError(
            f"lora.target_modules = {table.target_modules} matches no layer; this model has {targets}"
        ) from error
    head = base.get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise RecipeError("lora.target_modules names the output head, which is not trained here; leave it out")
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()
    modules_to_save.keep_output_dtypes(model)
    dora.use_exact_norms(model)
    dora.reset_magnitudes(model)
    result: PeftModel = model
    return result


def _layers_to_transform(base: PreTrainedModel, table: LoraTable) -> list[int] | None:
    """Indices of the layers to adapt, None for all; raises RecipeError for one that the model does not have."""
    indices = table.layer_indices
    if indices is None:
        return None
    num_layers = base.config.get_text_config().num_hidden_layers
    if max(indices) >= num_layers:
        raise RecipeError(
            f"lora.layers_to_transform asks for layer {max(indices)}; this model has the layers 0 to {num_layers - 1}"
        )
    return indices


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the context, `model` computes as its base; a model without an adapter is left alone."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


def nonfinite_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that contain NaN or infinity."""
    return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
