"""Modules that are trained as whole copies beside an adapter (PEFT's modules_to_save): norms and embeddings."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.cast_output import CastOutput, casts_output


def resolve_modules(base: PreTrainedModel, requested: Sequence[str]) -> list[str]:
    """The full names of the modules whose names end in one of those `asked`, part by part.

    PEFT compares characters instead: its "norm" is every layer norm too. Raises RecipeError for a name that no module
    has, for linear layers, which get LoRA, and for what the output head is or shares, since the head is frozen here.
    """
    found: list[str] = []
    for name in requested:
        own = [each for each, _ in base.named_modules() if each == name or each.endswith(f".{name}")]
        if not own:
            raise RecipeError(
                f"lora.modules_to_save names {name}, and this model has no such module; it has {_trainable_names(base)}"
            )
        for each in own:
            if why := _untrainable_reason(base, base.get_submodule(each)):
                raise RecipeError(f"lora.modules_to_save names {name}, which {why}; leave it out")
        found += [each for each in own if each not in found]
    return found


def _untrainable_reason(base: PreTrainedModel, module: nn.Module) -> str:
    head = base.get_output_embeddings()
    if any(each is head for each in module.modules()):
        return "is the output head or holds it, and the head is not trained here"
    if any(isinstance(each, nn.Linear) for each in module.modules()):
        return "is a linear layer or holds some; they get LoRA, by lora.target_modules"
    shared = {id(parameter) for parameter in head.parameters()}
    if any(id(parameter) in shared for parameter in module.parameters()):
        return "shares its weights with the output head of this model, and the head is not trained here"
    return "" if any(True for _ in module.parameters()) else "has no weights to train"


def _trainable_names(base: PreTrainedModel) -> str:
    """The last names of all modules that can be trained as copies."""
    fit = [
        name
        for name, module in base.named_modules()
        if not list(module.children()) and not _untrainable_reason(base, module)
    ]
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in fit)) or "none that can be trained so"


def trained_copies(model: nn.Module) -> dict[str, nn.Module]:
    """The trained copies of `model`, a PEFT model or its base, by the names that they have in the base."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name: trained_copy(module) for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)
    }


def unload(model: PeftModel) -> None:
    """Take the adapter off `model` for good; unlike PEFT's `unload`, put back what its copies stand for as well."""
    base: Any = model.get_base_model()
    originals = {
        name: each.original_module for name, each in base.named_modules() if isinstance(each, ModulesToSaveWrapper)
    }
    model.unload()
    for name, original in originals.items():
        base.set_submodule(name, original)


def trained_copy(wrapper: Any) -> nn.Module:
    """The trained copy of a module that PEFT has wrapped."""
    copy: nn.Module = wrapper.modules_to_save["default"]
    return copy


def keep_output_dtypes(model: nn.Module) -> None:
    """Let each copy, which is in float32, give its output in the dtype of the module that it stands for.

    A layer norm needs no help: under autocast it computes and gives float32 in either case.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and not isinstance(module.original_module, nn.LayerNorm):
            if casts_output(trained_copy(module)):  # as its original does
                continue
            dtype = next(module.original_module.parameters()).dtype
            trained_copy(module).register_forward_hook(CastOutput(dtype))
