"""PEFT's modules_to_save: norms and embeddings that are trained in full, as copies, beside a LoRA adapter."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.cast_output import CastOutput, casts_output
from qlora_dpo.model.decoder_layers import unwrap_peft


def resolve_modules(base: PreTrainedModel, requested: Sequence[str]) -> list[str]:
    """The full names of the modules whose last name parts are one of the `requested` names.

    PEFT compares the ends of strings instead, so that "norm" would also match every "..._layernorm". Raises RecipeError
    for a name without a module, for linear layers, which get LoRA, and for anything that holds the output head or
    shares its weights, since the head is frozen here.
    """
    resolved: list[str] = []
    for name in requested:
        matches = [path for path, _ in base.named_modules() if path == name or path.endswith(f".{name}")]
        if not matches:
            raise RecipeError(
                f"lora.modules_to_save names {name}, and this model has no such module; it has {_trainable_names(base)}"
            )
        for path in matches:
            if reason := _untrainable_reason(base, base.get_submodule(path)):
                raise RecipeError(f"lora.modules_to_save names {name}, which {reason}; leave it out")
        resolved += [path for path in matches if path not in resolved]
    return resolved


def _untrainable_reason(base: PreTrainedModel, module: nn.Module) -> str:
    """Why `module` cannot be trained as a copy; empty if it can."""
    head = base.get_output_embeddings()
    if any(submodule is head for submodule in module.modules()):
        return "is the output head or holds it, and the head is not trained here"
    if any(isinstance(submodule, nn.Linear) for submodule in module.modules()):
        return "is a linear layer or holds some; they get LoRA, by lora.target_modules"
    head_parameters = {id(parameter) for parameter in head.parameters()}
    if any(id(parameter) in head_parameters for parameter in module.parameters()):
        return "shares its weights with the output head of this model, and the head is not trained here"
    return "" if any(True for _ in module.parameters()) else "has no weights to train"


def _trainable_names(base: PreTrainedModel) -> str:
    """The last name parts of all modules that can be trained as copies."""
    trainable = [
        name
        for name, module in base.named_modules()
        if not list(module.children()) and not _untrainable_reason(base, module)
    ]
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in trainable)) or "none that can be trained so"


def trained_copies(model: nn.Module) -> dict[str, nn.Module]:
    """The trained copies in `model`, a PEFT model or its base, by the base's name of the module each replaces."""
    return {
        name: trained_copy(module)
        for name, module in unwrap_peft(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def unload(model: PeftModel) -> None:
    """Remove the adapter from `model`; unlike PEFT's `unload`, also restore the modules that copies have replaced."""
    base: Any = model.get_base_model()
    originals = {
        name: module.original_module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    model.unload()
    for name, original in originals.items():
        base.set_submodule(name, original)


def trained_copy(wrapper: Any) -> nn.Module:
    """The trained copy inside PEFT's wrapper of a module."""
    copy: nn.Module = wrapper.modules_to_save["default"]
    return copy


def keep_output_dtypes(model: nn.Module) -> None:
    """Make each copy, whose weights are float32, return the dtype of the module that it replaces.

    A layer norm needs no hook: under autocast it computes in float32 and returns float32 in either case.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and not isinstance(module.original_module, nn.LayerNorm):
            if casts_output(trained_copy(module)):  # copied with the hook of its original
                continue
            dtype = next(module.original_module.parameters()).dtype
            trained_copy(module).register_forward_hook(CastOutput(dtype))
