"""Attaches a LoRA adapter in float32, makes its layers lean, and switches it off to ask the reference.

T tokens, I and O inputs and outputs of a layer, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, Linear4bit, LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.base import dense_weight
from qlora_dpo.recipe import LoraTable


def attach(base: PreTrainedModel, table: LoraTable, seed: int) -> PeftModel:
    """Attach an adapter that changes nothing yet (lora_B is 0); its lora_A is drawn with `seed`."""
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=table.r,
        lora_alpha=table.lora_alpha,
        lora_dropout=table.lora_dropout,
        target_modules=table.target_modules if isinstance(table.target_modules, str) else list(table.target_modules),
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
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    result: PeftModel = model
    return result


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_lean(model: nn.Module, dtype: torch.dtype) -> str:
    """Let every plain LoRA layer compute in one autograd function; says how many do, and why others do not.

    PEFT's layer makes a copy of its output and, in 16 bits, of its input, and keeps more for the backward pass than
    the input. What is not plain LoRA on a dense or 4-bit linear layer (DoRA, dropout, other tuners) stays PEFT's.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    reasons = {id(layer): _not_plain(layer) for layer in layers}
    plain: list[Any] = [layer for layer in layers if not reasons[id(layer)]]
    for layer in plain:
        layer.forward = partial(_lean_forward, layer, dtype)
    others = ", ".join(sorted(set(filter(None, reasons.values()))))
    return f"lora: {len(plain)} of {len(layers)} layers in one function" + (
        f", the others by PEFT: {others}" if others else ""
    )


def _not_plain(layer: Any) -> str:
    """Why a LoRA layer is left to PEFT; empty if it is plain LoRA on a linear layer."""
    if type(layer) not in (Linear, Linear4bit) or type(layer.get_base_layer()) not in (nn.Linear, bnb.nn.Linear4bit):
        return type(layer).__name__
    if list(layer.lora_A) != ["default"]:
        return "several adapters"
    if layer.lora_variant:
        return type(layer.lora_variant["default"]).__name__
    if not isinstance(layer.lora_dropout["default"], nn.Identity):
        return "dropout"
    return "lora_bias" if layer.lora_bias["default"] else ""


def _lean_forward(layer: Any, dtype: torch.dtype, input_TI: Tensor) -> Tensor:
    if layer.merged:
        peft: Tensor = type(layer).forward(layer, input_TI)
        return peft
    base, x_TI = layer.get_base_layer(), _converted(input_TI, dtype)
    if layer.disable_adapters:
        plain_TO = nn.functional.linear(x_TI, dense_weight(base, dtype), _bias(base, dtype))
        return plain_TO.to(_output_dtype(base, input_TI, dtype))
    a_rI, b_Or = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return _LeanLora.apply(  # type: ignore[no-any-return, no-untyped-call]
        input_TI, x_TI, a_rI, b_Or, layer.scaling["default"], base
    )


def _converted(input_TI: Tensor, dtype: torch.dtype) -> Tensor:
    """The input in the compute dtype, without its history: made once for all layers that read the same tensor.

    Query, key and value projections share their input, and so do gate and up projections.
    """
    if input_TI.dtype == dtype:
        return input_TI.detach()
    version, made = getattr(input_TI, "_converted", (-1, None))
    if made is None or made.dtype != dtype or version != input_TI._version:
        made = input_TI.detach().to(dtype)
        input_TI._converted = input_TI._version, made  # type: ignore[attr-defined]
    result: Tensor = made
    return result


def _output_dtype(base: Any, input_TI: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the layer would give without us, so that the base stays the same to the last bit.

    bitsandbytes gives back the dtype it was given, a dense layer under autocast that of the product.
    """
    return input_TI.dtype if isinstance(base, bnb.nn.Linear4bit) else dtype


def _bias(base: Any, dtype: torch.dtype) -> Tensor | None:
    return None if base.bias is None else base.bias.to(dtype)


class _LeanLora(torch.autograd.Function):
    """y = W x + b + scaling * B A x for a frozen W, as two products that add in place; keeps x and A x.

    `x_TI` is `input_TI` in the compute dtype; the gradient goes to `input_TI`.
    """

    @staticmethod
    def forward(
        ctx: Any, input_TI: Tensor, x_TI: Tensor, a_rI: Tensor, b_Or: Tensor, scaling: float, base: Any
    ) -> Tensor:
        shape, dtype = x_TI.shape, x_TI.dtype
        x_TI = x_TI.reshape(-1, shape[-1])
        a_rI, b_Or = a_rI.to(dtype), b_Or.to(dtype)
        with torch.autocast(x_TI.device.type, enabled=False):
            low_Tr = x_TI @ a_rI.T
            output_TO = nn.functional.linear(x_TI, dense_weight(base, dtype), _bias(base, dtype))
            output_TO.addmm_(low_Tr, b_Or.T, alpha=scaling)
        ctx.save_for_backward(x_TI, low_Tr, a_rI, b_Or)
        ctx.scaling, ctx.base, ctx.input = scaling, base, (shape, input_TI.dtype)
        return output_TO.view(*shape[:-1], -1).to(_output_dtype(base, input_TI, dtype))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None, None]:
        x_TI, low_Tr, a_rI, b_Or = ctx.saved_tensors
        slope_TO = slope.reshape(-1, slope.shape[-1]).to(x_TI.dtype)
        with torch.autocast(x_TI.device.type, enabled=False):
            slope_Tr = (slope_TO @ b_Or) * ctx.scaling
            slope_TI = slope_TO @ dense_weight(ctx.base, x_TI.dtype)
            slope_TI.addmm_(slope_Tr, a_rI)
            slope_rI = slope_Tr.T @ x_TI
            slope_Or = (slope_TO.T @ low_Tr) * ctx.scaling
        shape, dtype = ctx.input
        return slope_TI.view(shape).to(dtype), None, slope_rI.float(), slope_Or.float(), None, None


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run `model` as its base; a model without an adapter is its own base."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield
