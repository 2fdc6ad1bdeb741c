"""Attaches a LoRA adapter in float32, and disables it for the reference."""

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel, set_seed

from qlora_dpo.errors import RecipeError
from qlora_dpo.model import dora, modules_to_save
from qlora_dpo.recipe.model import LoraTable

logger = logging.getLogger(__name__)


def attach_lora(base: PreTrainedModel, table: LoraTable, seed: int) -> PeftModel:
    """Attach a new adapter, with lora_A drawn from `seed` and lora_B zero, so that the model's output is unchanged.

    Raises RecipeError for modules and layers that the model does not have or that cannot be trained here.
    """
    set_seed(seed)  # seeds Python, NumPy and torch, whose states a checkpoint saves
    linear, routers = _linear_names(base), _routers(base)
    excluded = table.exclude_modules
    unfit = sorted({*map(_suffix, routers), *_read_past_adapters(base)})
    if table.target_modules == "all-linear" and unfit:
        logger.info(f"lora: all-linear leaves out {', '.join(unfit)}, where an adapter fails or changes nothing")
        excluded = [*(excluded or []), *unfit]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=table.r,
        lora_alpha=table.lora_alpha,
        lora_dropout=table.lora_dropout,
        target_modules=table.target_modules if isinstance(table.target_modules, str) else list(table.target_modules),
        exclude_modules=excluded,
        layers_to_transform=_layers_to_transform(base, table),
        modules_to_save=modules_to_save.resolve_modules(base, table.modules_to_save) if table.modules_to_save else None,
        rank_pattern=dict(table.rank_pattern),
        alpha_pattern=dict(table.alpha_pattern),
        use_rslora=table.use_rslora,
        use_dora=table.use_dora,
        init_lora_weights=True if table.init_lora_weights == "default" else table.init_lora_weights,
    )
    try:
        with warnings.catch_warnings():
            # PEFT adapts the experts of a MoE model too, and warns in the pass over the modules in which it does not
            warnings.filterwarnings("ignore", "target_parameters=.* were set but no parameter was matched")
            warnings.filterwarnings(
                "ignore", "The following (rank|alpha)_pattern keys did not match any", RuntimeWarning
            )
            # GPT-2's Conv1D, whose adapters PEFT transposes by itself
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
            model = get_peft_model(base, config)
    except ValueError as error:
        reason = "matches no layer"
        if "incompatible" in str(error):
            reason = f"cannot be adapted: {str(error).partition('Incompatible modules')[0].strip().rstrip('.')}"
        targets = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise RecipeError(f"lora.target_modules = {table.target_modules} {reason}; this model has {targets}") from error
    if adapted := [name for name in routers if isinstance(base.get_submodule(name), LoraLayer)]:
        raise RecipeError(
            f"lora.target_modules names {_suffix(adapted[0])}, which chooses experts and has no single output to "
            "adapt; leave it out"
        )
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


def _linear_names(base: PreTrainedModel) -> list[str]:
    """The names of the linear layers except the output head."""
    head = base.get_output_embeddings()
    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head]


def _routers(base: PreTrainedModel) -> list[str]:
    """The names of linear layers that return more than a product: they choose experts, as in Llama 4 and Phi-MoE."""
    return [name for name in _linear_names(base) if not _returns_product(base.get_submodule(name))]


def _returns_product(layer: nn.Linear) -> bool:
    """True if the layer's forward returns one tensor; tried on meta tensors, if it is not torch's own."""
    if type(layer).forward is nn.Linear.forward or not type(layer).__module__.startswith("transformers."):
        return True
    weights = {name: parameter.to("meta") for name, parameter in layer.named_parameters()}
    inputs = torch.empty(1, layer.in_features, device="meta", dtype=layer.weight.dtype)
    try:
        return isinstance(functional_call(layer, weights, (inputs,)), torch.Tensor)
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def _read_past_adapters(base: PreTrainedModel) -> set[str]:
    """Linear layers in Mamba's mixers whose weight a fused kernel reads, past any adapter; PEFT refuses some too."""
    return {
        f"{name.rpartition('.')[2]}.{child}"
        for name, module in base.named_modules()
        if hasattr(module, "conv1d")
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear) and child in _children_read_by_weight(cast(Any, type(module)))
    }


@cache
def _children_read_by_weight(module: Any) -> frozenset[str]:
    """The names of children whose `weight` the code of this class of transformers computes with."""
    if not module.__module__.startswith("transformers."):
        return frozenset()
    code = inspect.getsource(module).partition("    def forward")
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))", "".join(code[1:])))


def _suffix(name: str) -> str:
    """The last two parts of a module's name, which PEFT matches with the ends of names."""
    return ".".join(name.split(".")[-2:])


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
