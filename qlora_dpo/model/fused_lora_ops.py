"""Fused autograd functions for LoRA layers, gated MLPs and RMSNorms: the same values with fewer copies and passes.

T tokens, I inputs, O outputs of a layer, r rank, R sum of the ranks of a group's layers, D width. `grad_X` is the
gradient of the loss with respect to something of shape X.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.model.quantized import dense_weight


@dataclass(frozen=True)
class LoraGroup:
    """Plain LoRA layers that read the same input tensor."""

    layers: tuple[Any, ...]
    """In the order in which they are called."""
    dtype: torch.dtype
    """The dtype of matrix products."""

    @property
    def adapters(self) -> tuple[Tensor, ...]:
        """A (r, I) of each layer, then B (O, r) of each."""
        pairs = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in self.layers]
        return tuple(a_rI for a_rI, _ in pairs) + tuple(b_Or for _, b_Or in pairs)

    def cast_weights(self, adapters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All A concatenated (R, I), then B (O, r) of each layer, in the dtype of products."""
        count = len(self.layers)
        return torch.cat(list(adapters[:count])).to(self.dtype), *(b_Or.to(self.dtype) for b_Or in adapters[count:])

    def outputs(self, x_TI: Tensor, weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """W x + b + scaling * B A x of each layer (T, O), and A x of all (T, R), which the backward pass needs."""
        a_RI, *all_b_Or = weights
        low_TR = x_TI @ a_RI.T
        outputs = []
        for layer, b_Or, low_Tr in zip(self.layers, all_b_Or, low_TR.split(_ranks(all_b_Or), 1), strict=True):
            scaled_Tr = low_Tr * layer.scaling["default"]
            outputs.append(_lora_output(layer.get_base_layer(), self.dtype, x_TI, scaled_Tr, b_Or))
        return outputs, low_TR

    def lora_grads(
        self, grads_TO: Sequence[Tensor], low_TR: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The gradients of A x (T, R) and, in float32, of each B (O, r), from those of the outputs."""
        _, *all_b_Or = weights
        grads_Tr, grads_Or = [], []
        for layer, b_Or, low_Tr, grad_TO in zip(
            self.layers, all_b_Or, low_TR.split(_ranks(all_b_Or), 1), grads_TO, strict=True
        ):
            grads_Tr.append((grad_TO @ b_Or).mul_(layer.scaling["default"]))
            # with the narrow A x as the left factor, a CPU multiplies twice as fast
            grads_Or.append((low_Tr.T @ grad_TO).mul_(layer.scaling["default"]).float().T.contiguous())
        return torch.cat(grads_Tr, 1), grads_Or

    def input_grad(self, grads_TO: Sequence[Tensor], grad_TR: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The gradient of the input (T, I), summed over all layers in place."""
        grad_TI = grad_TR @ weights[0]
        for layer, grad_TO in zip(self.layers, grads_TO, strict=True):
            grad_TI.addmm_(grad_TO, dense_weight(layer.get_base_layer(), self.dtype))
        return grad_TI

    def split_a_grad(self, grad_RI: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradient of the concatenated A (R, I) split by layer, in float32."""
        grads_rI: tuple[Tensor, ...] = grad_RI.float().split(_ranks(weights[1:]))
        return grads_rI


def base_output(base: Any, dtype: torch.dtype, x_TI: Tensor) -> Tensor:
    """W x + b in `dtype`."""
    bias = None if base.bias is None else base.bias.to(dtype)
    return nn.functional.linear(x_TI, dense_weight(base, dtype), bias)


def _lora_output(base: Any, dtype: torch.dtype, x_TI: Tensor, scaled_Tr: Tensor, b_Or: Tensor) -> Tensor:
    """W x + b + B s in `dtype`, where s is the scaled A x (T, r); bit for bit `base_output` where B is 0 (on a CPU).

    The sum is rounded once. Added to a W x that is rounded already, whatever is smaller than half a unit in its last
    place is lost: in bfloat16 most of what the first hundred steps write into B.
    """
    if base.bias is None:
        return (scaled_Tr @ b_Or.T).addmm_(x_TI, dense_weight(base, dtype).T)
    # added to the update first, a bias as large as Qwen2's loses most of it, so W and B become one matrix
    x_TIr, weight_OIr = torch.cat((x_TI, scaled_Tr), 1), torch.cat((dense_weight(base, dtype), b_Or), 1)
    return nn.functional.linear(x_TIr, weight_OIr, base.bias.to(dtype))


def _ranks(all_b_Or: Sequence[Tensor]) -> list[int]:
    return [b_Or.shape[1] for b_Or in all_b_Or]


def _reshaped(output: Tensor, shape: Sequence[int]) -> Tensor:
    """`output` in another shape, without a copy and without being a view.

    Falcon and Gemma 3n add to what a layer returns in place, which autograd refuses for a view.
    """
    reshaped: Tensor = torch.ops.aten._unsafe_view(output, list(shape))
    return reshaped


def fused_linear(input_TI: Tensor, group: LoraGroup) -> tuple[Tensor, ...]:
    """W x + b + scaling * B A x of each layer of `group`, in the dtype of the products."""
    outputs: tuple[Tensor, ...] = _FusedLinear.apply(input_TI, group, *group.adapters)  # type: ignore[no-untyped-call]
    return outputs


def fused_gated_mlp(input_TI: Tensor, gate_up: LoraGroup, down: LoraGroup) -> Tensor:
    """down(silu(gate(x)) * up(x)); `gate_up` holds the layers gate and up."""
    adapters = *gate_up.adapters, *down.adapters
    output: Tensor = _FusedGatedMLP.apply(input_TI, gate_up, down, *adapters)  # type: ignore[no-untyped-call]
    return output


def fused_rms_norm(input_TD: Tensor, forward: Callable[[Tensor], Tensor], weight_D: Tensor, epsilon: float) -> Tensor:
    """RMSNorm, w * x / rms(x), computed by the module's own `forward`; only the backward pass is fused."""
    output: Tensor = _FusedRMSNorm.apply(input_TD, forward, weight_D, epsilon)  # type: ignore[no-untyped-call]
    return output


class _FusedLinear(torch.autograd.Function):
    """y = W x + b + scaling * B A x for each layer of a group, with W frozen; saves x and A x only.

    The input is cast to the compute dtype once, all A x are one matrix product, and the layers' contributions to the
    input's gradient are added in place.
    """

    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, group: LoraGroup, *adapters: Tensor) -> tuple[Tensor, ...]:
        shape = input_TI.shape
        x_TI = input_TI.detach().reshape(-1, shape[-1]).to(group.dtype)
        weights = group.cast_weights(adapters)
        with torch.autocast(x_TI.device.type, enabled=False):
            outputs, low_TR = group.outputs(x_TI, weights)
        ctx.save_for_backward(x_TI, low_TR, *weights)
        ctx.group, ctx.input = group, (shape, input_TI.dtype)
        return tuple(_reshaped(output_TO, (*shape[:-1], output_TO.shape[-1])) for output_TO in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, low_TR, *weights = ctx.saved_tensors
        group, (shape, dtype) = ctx.group, ctx.input
        grads_TO = [grad.reshape(-1, grad.shape[-1]).to(group.dtype) for grad in grads]
        grad_input = None
        with torch.autocast(x_TI.device.type, enabled=False):
            grad_TR, grads_Or = group.lora_grads(grads_TO, low_TR, weights)
            grad_RI = grad_TR.T @ x_TI
            if ctx.needs_input_grad[0]:  # the first layer reads embeddings, which are frozen
                grad_input = group.input_grad(grads_TO, grad_TR, weights).view(shape).to(dtype)
        return grad_input, None, *group.split_a_grad(grad_RI, weights), *grads_Or


class _FusedGatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) with LoRA on all three; saves x, gate(x) and up(x), and recomputes the rest.

    Elementwise operations have the precision of the module's own forward, so that an adapter of zeros changes no bit;
    the backward pass computes them in float32.
    """

    @staticmethod
    def forward(ctx: Any, input_TI: Tensor, gate_up: LoraGroup, down: LoraGroup, *adapters: Tensor) -> Tensor:
        shape = input_TI.shape
        x_TI = input_TI.detach().reshape(-1, shape[-1]).to(gate_up.dtype)
        # adapters: A of gate and up, B of gate and up, A and B of down
        weights_gate_up, weights_down = gate_up.cast_weights(adapters[:4]), down.cast_weights(adapters[4:])
        with torch.autocast(x_TI.device.type, enabled=False):
            (gate_TO, up_TO), low_TR = gate_up.outputs(x_TI, weights_gate_up)
            gated_TO = nn.functional.silu(gate_TO).mul_(up_TO)
            (output_TI,), low_Tr = down.outputs(gated_TO, weights_down)
        ctx.save_for_backward(x_TI, gate_TO, up_TO, low_TR, low_Tr, *weights_gate_up, *weights_down)
        ctx.groups, ctx.input = (gate_up, down), (shape, input_TI.dtype)
        return _reshaped(output_TI, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, gate_TO, up_TO, low_TR, low_Tr, *weights = ctx.saved_tensors
        (gate_up, down), (shape, dtype) = ctx.groups, ctx.input
        weights_gate_up, weights_down = weights[:3], weights[3:]
        grad_TI = grad.reshape(x_TI.shape).to(down.dtype)
        grad_input = None
        with torch.autocast(x_TI.device.type, enabled=False):
            grad_Tr, grads_down = down.lora_grads([grad_TI], low_Tr, weights_down)
            grad_gated_TO = down.input_grad([grad_TI], grad_Tr, weights_down)
            gated_TO, *grads_TO = _gated_grads(gate_TO.float(), up_TO.float(), grad_gated_TO.float())
            grad_rO = grad_Tr.T @ gated_TO.to(down.dtype)
            grads_TO = [grad_TO.to(gate_up.dtype) for grad_TO in grads_TO]
            grad_TR, grads_gate_up = gate_up.lora_grads(grads_TO, low_TR, weights_gate_up)
            grad_RI = grad_TR.T @ x_TI
            if ctx.needs_input_grad[0]:
                grad_input = gate_up.input_grad(grads_TO, grad_TR, weights_gate_up).view(shape).to(dtype)
        adapter_grads = *gate_up.split_a_grad(grad_RI, weights_gate_up), *grads_gate_up, grad_rO.float(), *grads_down
        return grad_input, None, None, *adapter_grads


def _gated_grads(gate_TO: Tensor, up_TO: Tensor, grad_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) * up, and the gradients of gate and up; overwrites `grad_TO`, the gradient of silu(gate) * up."""
    activated_TO = nn.functional.silu(gate_TO)
    grad_gate_TO = grad_TO * up_TO
    torch.ops.aten.silu_backward.grad_input(grad_gate_TO, gate_TO, grad_input=grad_gate_TO)
    return activated_TO * up_TO, grad_gate_TO, grad_TO.mul_(activated_TO)


class _FusedRMSNorm(torch.autograd.Function):
    """w * x / rms(x) by the module's own forward, with a gradient that takes fewer passes over x."""

    @staticmethod
    def forward(ctx: Any, input_TD: Tensor, norm: Any, weight_D: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(input_TD, weight_D)
        ctx.epsilon = epsilon
        output_TD: Tensor = norm(input_TD.detach())
        return output_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        input_TD, weight_D = ctx.saved_tensors
        x_TD, grad_TD = input_TD.float(), grad_TD.float() * weight_D
        inverse_T1 = torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + ctx.epsilon)
        along_T1 = (grad_TD * x_TD).mean(-1, keepdim=True) * inverse_T1**3
        return grad_TD.mul_(inverse_T1).addcmul_(x_TD, along_T1, value=-1).to(input_TD.dtype), None, None, None
