"""Attaches a LoRA adapter in float32, and switches it off to ask the reference."""

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
    """Attach an adapter that changes nothing yet (lora_B is 0); its lora_A is drawn with `seed`.

    Raises RecipeError for modules and layers that this model does not have, or that cannot be trained here.
    """
    set_seed(seed)  # of every generator: a checkpoint keeps them all
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
        linear = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head}
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise RecipeError(
            f"lora.target_modules = {table.target_modules} matches no layer; this model has {known}"
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
    """The layers that get an adapter, None for all; raises RecipeError for one that the model does not have."""
    asked = table.layer_indices
    if asked is None:
        return None
    count = base.config.get_text_config().num_hidden_layers
    if max(asked) >= count:
        raise RecipeError(
            f"lora.layers_to_transform asks for layer {max(asked)}; this model has the layers 0 to {count - 1}"
        )
    return asked


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Run `model` as its base; a model without an adapter is its own base."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


def nonfinite_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity."""
    return [name for name, each in tensors.items() if not bool(each.isfinite().all())]
