"""The merged tensors of a model: the base tensors it was trained against, plus what the adapters add to them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import ParamWrapper as LoraParameter
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from qlora_dpo.adapter_weights import base_name
from qlora_dpo.deploy.rounding import is_on_grid, stochastic_round
from qlora_dpo.errors import ModelError
from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.model.quantized import dequantized, quantization_of, quantized_layers


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor of the merged model that differs from the base's files."""

    shape: tuple[int, ...]
    base: Callable[[], Tensor]
    """A copy, in float32, of the tensor that the adapter was trained against."""
    add: Callable[[Tensor], Tensor] | None
    """Adds the adapters' update in place to a base tensor in float32; None for a tensor that was trained as a whole."""
    replaced: bool = False
    """True if the adapter holds the base tensor itself, so that the merged model takes it from `base` in any case."""

    def merged(self, original: Callable[[], Tensor] | None = None) -> Tensor:
        """The merged tensor in float32, from `base`, or else from `original`, the one in the base's files."""
        tensor = self._before(original)
        return tensor if self.add is None else self.add(tensor)

    def merged_in(self, dtype: torch.dtype, name: str, original: Callable[[], Tensor] | None = None) -> Tensor:
        """The merged tensor in `dtype`, rounded to the nearest, or stochastically if the base is on the grid of it.

        `name` decides the draws of such a rounding.
        """
        if dtype == torch.float32 or self.add is None:
            return self.merged(original).to(dtype)
        tensor = self._before(original)
        on_grid = is_on_grid(tensor, dtype)
        merged = self.add(tensor)
        return stochastic_round(merged, dtype, name) if on_grid else merged.to(dtype)

    def _before(self, original: Callable[[], Tensor] | None) -> Tensor:
        """The tensor that the update is added to, in float32."""
        return self.base() if original is None or self.replaced else original().to(torch.float32, copy=True)


def changed_tensors(model: Any) -> dict[str, ChangedTensor]:
    """The tensors that differ from the base's files, by name in the base: adapted, quantized, or trained as a whole."""
    base = unwrap_peft(model)
    replaced: frozenset[str] = getattr(model, "replaced_tensors", frozenset())
    if replaced & set(tied_names(model) or ()):
        replaced |= set(tied_names(model) or ())
    tensors = _tensors_by_base_name(base) if replaced else {}
    changed = {name: _whole(tensors[name]) for name in sorted(replaced)}
    for path, layer in quantized_layers(base).items():
        changed[f"{base_name(path)}.weight"] = _adapted(layer, partial(base_layer_weight, layer), None)
    for path, layer in base.named_modules():
        name = base_name(path)
        if isinstance(layer, LoraParameter):
            parameter = f"{name}.{layer.parameter_name}"
            before = changed[parameter].add if parameter in changed else None
            changed[parameter] = _adapted(layer, partial(_float_copy, layer.get_param()), before)
        elif isinstance(layer, LoraLayer):
            changed[f"{name}.weight"] = _adapted(layer, partial(base_layer_weight, layer), None)
            if any(layer.lora_bias.values()) and layer.get_base_layer().bias is not None:
                bias = layer.get_base_layer().bias
                add = partial(_add_delta_bias, layer)
                changed[f"{name}.bias"] = ChangedTensor(tuple(bias.shape), partial(_float_copy, bias), add)
        elif isinstance(layer, TrainableTokensWrapper):
            shape = tuple(layer.token_adapter.get_base_layer().weight.shape)
            changed[f"{name}.weight"] = ChangedTensor(shape, partial(_with_trained_tokens, layer), None, replaced=True)
        elif isinstance(layer, ModulesToSaveWrapper):
            copies = layer.modules_to_save[layer.active_adapters[0]].named_parameters()
            changed |= {f"{name}.{parameter}": _whole(tensor) for parameter, tensor in copies}
    return {name: replace(tensor, replaced=tensor.replaced or name in replaced) for name, tensor in changed.items()}


def tied_names(model: Any) -> tuple[str, str] | None:
    """The names of the weights of head and embeddings in the base if they are one tensor; None if they are two."""
    base = unwrap_peft(model)
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or not base.config.get_text_config().tie_word_embeddings:
        return None
    paths = {id(module): base_name(path) for path, module in base.named_modules(remove_duplicate=False)}
    return f"{paths[id(head)]}.weight", f"{paths[id(embeddings)]}.weight"


def adapted_layers(model: Any) -> dict[str, Any]:
    """The LoRA layers of `model`, by name in the base."""
    modules = unwrap_peft(model).named_modules()
    return {base_name(name): module for name, module in modules if isinstance(module, LoraLayer)}


def has_whole_tensors(model: Any) -> bool:
    """True if the adapter holds tensors that were trained as a whole, so that it is no sum."""
    return any(tensor.add is None for tensor in changed_tensors(model).values())


@torch.no_grad()
def base_layer_weight(layer: nn.Module) -> Tensor:
    """A copy of the weight that the adapter was trained against, in float32, as the base's files store it."""
    base_layer: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    return dequantized(base_layer) if quantization_of(base_layer) != "none" else _float_copy(base_layer.weight)


@torch.no_grad()
def add_delta_weight(layer: Any, weight: Tensor) -> Tensor:
    """Add the active adapters' scaling * B A to `weight`, in float32, in place.

    `weight` is (out, in) for a linear layer, (in, out) for GPT-2's Conv1D, (tokens, out) for an embedding. DoRA (Liu
    et al. 2024, eq. 5) then scales each row of the (out, in) sum to its trained magnitude. In place, since the largest
    layer of a large model takes a gigabyte.
    """
    if isinstance(layer, LoraParameter):
        return _add_delta_parameter(layer, weight)
    if not isinstance(layer, LoraLayer):
        return weight
    embedding = isinstance(layer, LoraEmbedding)
    weight_OI = weight.T if embedding or getattr(layer, "fan_in_fan_out", False) else weight
    for name in layer.active_adapters:
        if name in (layer.lora_embedding_A if embedding else layer.lora_A):
            a, b = (
                (layer.lora_embedding_A[name], layer.lora_embedding_B[name])
                if embedding
                else (layer.lora_A[name].weight, layer.lora_B[name].weight)
            )
            weight_OI.addmm_(_to(b, weight), _to(a, weight), alpha=layer.scaling[name])
            if is_dora(layer):
                magnitude_O = _to(layer.lora_magnitude_vector[name].weight, weight)
                weight_OI.mul_((magnitude_O / weight_OI.norm(dim=1))[:, None])
    return weight


def is_dora(layer: Any) -> bool:
    """True if the layer's adapter is a DoRA adapter."""
    return isinstance(layer, LoraLayer) and any(layer.use_dora.values())


@torch.no_grad()
def _add_delta_parameter(layer: Any, weight: Tensor) -> Tensor:
    """Add the update of a parameter that is no linear layer's weight, such as stacked experts (E, in, out)."""
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b = (_to(matrix[name].weight, weight) for matrix in (layer.lora_A, layer.lora_B))
        if layer.num_experts == 1:
            weight.add_(b @ a, alpha=layer.scaling[name])
            continue
        a_ERI = a.reshape(layer.num_experts, -1, a.shape[-1])
        b_ORE = b.reshape(b.shape[0], -1, layer.num_experts)
        swapped = getattr(layer, "_did_swap_in_out_features", False)
        equation = "ore,eri->eoi" if swapped else "ore,eri->eio"
        weight.add_(torch.einsum(equation, b_ORE, a_ERI), alpha=layer.scaling[name])
    return weight


@torch.no_grad()
def _add_delta_bias(layer: Any, bias: Tensor) -> Tensor:
    """Add the active adapters' scaling times the bias of B, in place."""
    for name in layer.active_adapters:
        if layer.lora_bias.get(name):
            bias.add_(_to(layer.lora_B[name].bias, bias), alpha=layer.scaling[name])
    return bias


def _adapted(layer: Any, base: Callable[[], Tensor], before: Callable[[Tensor], Tensor] | None) -> ChangedTensor:
    """The tensor of an adapted or quantized layer; `before` adds the update of another adapter of the same tensor."""

    def add(weight: Tensor) -> Tensor:
        weight = weight if before is None else before(weight)
        probe = _probe(layer)
        if probe is None:
            return add_delta_weight(layer, weight)
        outputs_before = _outputs(layer, weight, probe)
        merged = add_delta_weight(layer, weight)
        _check_update(layer, _outputs(layer, merged, probe) - outputs_before, outputs_before, probe)
        return merged

    return ChangedTensor(_shape(layer), base, add)


PROBES = 8
"""Random inputs on which the update of a layer is compared with what the layer itself adds."""


def _probe(layer: Any) -> Tensor | None:
    """Inputs for the layer; None for one whose own output is rounded, or whose update is no sum or a bias too."""
    if not isinstance(layer, LoraLayer) or isinstance(layer, LoraParameter):
        return None
    inner: Any = layer.get_base_layer()
    plain = not layer.lora_variant and not any(layer.lora_bias.values())
    dtypes = {parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point()}
    if not plain or dtypes != {torch.float32} or getattr(inner, "compute_dtype", torch.float32) != torch.float32:
        return None
    device, generator = inner.weight.device, torch.Generator().manual_seed(0)
    if not isinstance(layer, LoraEmbedding):
        return torch.randn(PROBES, layer.in_features, generator=generator).to(device)
    # a subclass may scale what it returns
    tokens = torch.randint(inner.num_embeddings, (PROBES,), generator=generator)
    return tokens.to(device) if type(inner) is nn.Embedding else None


@torch.no_grad()
def _outputs(layer: Any, weight: Tensor, probe: Tensor) -> Tensor:
    """What a layer with this weight returns, without its bias."""
    if isinstance(layer, LoraEmbedding):
        return weight.to(probe.device)[probe]
    weight_OI = weight.T if getattr(layer, "fan_in_fan_out", False) else weight
    return probe @ weight_OI.T.to(probe.device)


@torch.no_grad()
def _check_update(layer: Any, added: Tensor, outputs: Tensor, probe: Tensor) -> None:
    """Raise ModelError unless the update has `added` to the `outputs` what the adapted layer adds to its base layer."""
    wanted = layer(probe) - layer.get_base_layer()(probe)
    if not (added - wanted).norm() <= 1e-3 * wanted.norm() + 1e-5 * outputs.norm():
        inner = type(layer.get_base_layer()).__name__
        raise ModelError(
            f"the update of a {inner} ({layer.in_features} to {layer.out_features}) cannot be merged: the sum does not "
            "compute what the adapted layer computes; please report this with the model's name. Nothing was kept"
        )


def _shape(layer: Any) -> tuple[int, ...]:
    if isinstance(layer, LoraParameter):
        return tuple(layer.get_param().shape)
    inner: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if quantization_of(inner) != "none":
        return (inner.out_features, inner.in_features)
    return tuple(inner.weight.shape)


def _whole(tensor: Tensor) -> ChangedTensor:
    return ChangedTensor(tuple(tensor.shape), partial(_float_copy, tensor), None, replaced=True)


def _with_trained_tokens(layer: Any) -> Tensor:
    """The embeddings with the rows of the trained tokens put in."""
    tokens = layer.token_adapter
    return _float_copy(tokens.get_merged_weights(tokens.active_adapters))


def _tensors_by_base_name(base: nn.Module) -> dict[str, Tensor]:
    return {base_name(name): tensor for name, tensor in base.state_dict().items()}


def _float_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True)


def _to(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.detach().to(other.device, torch.float32)
