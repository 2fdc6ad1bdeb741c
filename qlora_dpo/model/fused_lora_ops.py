"""Lean forms of plain LoRA layers, of gated MLPs made of them and of norms: the same values, fewer copies and passes.

T tokens, I inputs, O outputs of a layer, r rank, R the ranks of a group's layers together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.model.quantized import dense_weight


@dataclass(frozen=True)
class LoraGroup:
    """Plain LoRA layers that read the same tensor, in the order in which they are called, and the dtype of products."""

    layers: tuple[Any, ...]
    dtype: torch.dtype

    @property
    def adapters(self) -> tuple[Tensor, ...]:
        """A (r, I) of each layer, then B (O, r) of each."""
        named = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in self.layers]
        return tuple(a_rI for a_rI, _ in named) + tuple(b_Or for _, b_Or in named)

    def cast_weights(self, adapters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All A as one (R, I), then B of each, in the dtype of the products: what both passes compute with."""
        count = len(self.layers)
        return torch.cat(list(adapters[:count])).to(self.dtype), *(b_Or.to(self.dtype) for b_Or in adapters[count:])

    def outputs(self, x_TI: Tensor, joined: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """W x + b + scaling * B A x of each layer (T, O), and A x of all (T, R), which the backward pass needs."""
        a_RI, *b_Or = joined
        low_TR = x_TI @ a_RI.T
        outputs = []
        for layer, own_Or, low_Tr in zip(self.layers, b_Or, low_TR.split(_ranks(b_Or), 1), strict=True):
            output_TO = base_output(layer.get_base_layer(), self.dtype, x_TI)
            outputs.append(output_TO.addmm_(low_Tr, own_Or.T, alpha=layer.scaling["default"]))
        return outputs, low_TR

    def lora_grads(
        self, slopes_TO: Sequence[Tensor], low_TR: Tensor, joined: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """From the gradients of the outputs those of A x (T, R) and of each B, the latter in float32."""
        _, *b_Or = joined
        slopes_Tr, slopes_Or = [], []
        for layer, own_Or, low_Tr, slope_TO in zip(
            self.layers, b_Or, low_TR.split(_ranks(b_Or), 1), slopes_TO, strict=True
        ):
            slopes_Tr.append((slope_TO @ own_Or).mul_(layer.scaling["default"]))
            # this way round the few columns of A x are the left factor, which a CPU multiplies twice as fast
            slopes_Or.append((low_Tr.T @ slope_TO).mul_(layer.scaling["default"]).float().T.contiguous())
        return torch.cat(slopes_Tr, 1), slopes_Or

    def input_grad(self, slopes_TO: Sequence[Tensor], slope_TR: Tensor, joined: Sequence[Tensor]) -> Tensor:
        """The gradient of the input (T, I), one sum over all layers."""
        slope_TI = slope_TR @ joined[0]
        for layer, slope_TO in zip(self.layers, slopes_TO, strict=True):
            slope_TI.addmm_(slope_TO, dense_weight(layer.get_base_layer(), self.dtype))
        return slope_TI

    def split_grad_A(self, slope_RI: Tensor, joined: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradient of all A as that of each, in float32."""
        slopes_rI: tuple[Tensor, ...] = slope_RI.float().split(_ranks(joined[1:]))
        return slopes_rI


def base_output(base: Any, dtype: torch.dtype, x_TI: Tensor) -> Tensor:
    """W x + b in `dtype`."""
    bias = None if base.bias is None else base.bias.to(dtype)
    return nn.functional.linear(x_TI, dense_weight(base, dtype), bias)


def _ranks(b_Or: Sequence[Tensor]) -> list[int]:
    return [own_Or.shape[1] for own_Or in b_Or]


def fused_linear(input_TI: Tensor, group: LoraGroup) -> tuple[Tensor, ...]:
    """W x + b + scaling * B A x of each layer of `group`, in the dtype of the products."""
    outputs: tuple[Tensor, ...] = _FusedLinear.apply(input_TI, group, *group.adapters)  # type: ignore[no-untyped-call]
    return outputs


def fused_gated_mlp(input_TI: Tensor, into: LoraGroup, down: LoraGroup) -> Tensor:
    """down(silu(gate(x)) * up(x)); `into` are gate and up."""
    adapters = *into.adapters, *down.adapters
    output: Tensor = _FusedGatedMLP.apply(input_TI, into, down, *adapters)  # type: ignore[no-untyped-call]
    return output


def fused_rms_norm(input_TD: Tensor, own: Callable[[Tensor], Tensor], weight_D: Tensor, epsilon: float) -> Tensor:
    """own(x), which is w * x / rms(x)."""
    output: Tensor = _FusedRMSNorm.apply(input_TD, own, weight_D, epsilon)  # type: ignore[no-untyped-call]
    return output


class _FusedLinear(torch.autograd.Function):
    """y = W x + b + scaling * B A x for each layer of a group, W frozen; keeps x and A x, and adds in place.

    The input is converted to the compute dtype once, all A are one product, and the input's gradient is one sum.
    """

    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, group: LoraGroup, *adapters: Tensor) -> tuple[Tensor, ...]:
        shape = input_TI.shape
        x_TI = input_TI.detach().reshape(-1, shape[-1]).to(group.dtype)
        joined = group.cast_weights(adapters)
        with torch.autocast(x_TI.device.type, enabled=False):
            outputs, low_TR = group.outputs(x_TI, joined)
        ctx.save_for_backward(x_TI, low_TR, *joined)
        ctx.group, ctx.input = group, (shape, input_TI.dtype)
        return tuple(output_TO.view(*shape[:-1], -1) for output_TO in outputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, low_TR, *joined = ctx.saved_tensors
        group, (shape, dtype) = ctx.group, ctx.input
        slopes_TO = [slope.reshape(-1, slope.shape[-1]).to(group.dtype) for slope in slopes]
        slope_input = None
        with torch.autocast(x_TI.device.type, enabled=False):
            slope_TR, slopes_Or = group.lora_grads(slopes_TO, low_TR, joined)
            slope_RI = slope_TR.T @ x_TI
            if ctx.needs_input_grad[0]:  # the first layer reads embeddings, which are frozen
                slope_input = group.input_grad(slopes_TO, slope_TR, joined).view(shape).to(dtype)
        return slope_input, None, *group.split_grad_A(slope_RI, joined), *slopes_Or


class _FusedGatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) with LoRA on all three; keeps x, gate(x) and up(x), and makes the rest again.

    What is elementwise has the precision of the module's own forward, so that an adapter of zeros changes no bit, and
    float32 in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, into: LoraGroup, down: LoraGroup, *adapters: Tensor) -> Tensor:
        shape = input_TI.shape
        x_TI = input_TI.detach().reshape(-1, shape[-1]).to(into.dtype)
        # A and B of gate and of up, then those of down; joined, the two A are one
        joined_into, joined_down = into.cast_weights(adapters[:4]), down.cast_weights(adapters[4:])
        with torch.autocast(x_TI.device.type, enabled=False):
            (gate_TO, up_TO), low_TR = into.outputs(x_TI, joined_into)
            gated_TO = nn.functional.silu(gate_TO).mul_(up_TO)
            (output_TI,), low_Tr = down.outputs(gated_TO, joined_down)
        ctx.save_for_backward(x_TI, gate_TO, up_TO, low_TR, low_Tr, *joined_into, *joined_down)
        ctx.groups, ctx.input = (into, down), (shape, input_TI.dtype)
        return output_TI.view(shape)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, gate_TO, up_TO, low_TR, low_Tr, *joined = ctx.saved_tensors
        (into, down), (shape, dtype) = ctx.groups, ctx.input
        joined_into, joined_down = joined[:3], joined[3:]
        slope_TI = slope.reshape(x_TI.shape).to(down.dtype)
        slope_input = None
        with torch.autocast(x_TI.device.type, enabled=False):
            slope_Tr, slopes_down = down.lora_grads([slope_TI], low_Tr, joined_down)
            slope_gated_TO = down.input_grad([slope_TI], slope_Tr, joined_down)
            gated_TO, *slopes_TO = _gated_grads(gate_TO.float(), up_TO.float(), slope_gated_TO.float())
            slope_rO = slope_Tr.T @ gated_TO.to(down.dtype)
            slopes_TO = [slope_TO.to(into.dtype) for slope_TO in slopes_TO]
            slope_TR, slopes_into = into.lora_grads(slopes_TO, low_TR, joined_into)
            slope_RI = slope_TR.T @ x_TI
            if ctx.needs_input_grad[0]:
                slope_input = into.input_grad(slopes_TO, slope_TR, joined_into).view(shape).to(dtype)
        adapters = *into.split_grad_A(slope_RI, joined_into), *slopes_into, slope_rO.float(), *slopes_down
        return slope_input, None, None, *adapters


def _gated_grads(gate_TO: Tensor, up_TO: Tensor, slope_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) * up, and the gradients of gate and up; `slope_TO` is overwritten."""
    acted_TO = nn.functional.silu(gate_TO)
    slope_gate_TO = slope_TO * up_TO
    torch.ops.aten.silu_backward.grad_input(slope_gate_TO, gate_TO, grad_input=slope_gate_TO)
    return acted_TO * up_TO, slope_gate_TO, slope_TO.mul_(acted_TO)


class _FusedRMSNorm(torch.autograd.Function):
    """The gradient of w * x / rms(x) in a few passes over x; what it gives is the module's own."""

    @staticmethod
    def forward(ctx: Any, input_TD: Tensor, own: Any, weight_D: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(input_TD, weight_D)
        ctx.epsilon = epsilon
        output_TD: Tensor = own(input_TD.detach())
        return output_TD

    @staticmethod
    def backward(ctx: Any, slope_TD: Tensor) -> tuple[Tensor, None, None, None]:
        input_TD, weight_D = ctx.saved_tensors
        x_TD, slope_TD = input_TD.float(), slope_TD.float() * weight_D
        inverse_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + ctx.epsilon)
        along_T1 = (slope_TD * x_TD).mean(-1, keepdim=True) * inverse_T1**3
        return slope_TD.mul_(inverse_T1).addcmul_(x_TD, along_T1, value=-1).to(input_TD.dtype), None, None, None
