"""What a model does to its logits behind the output head, and to the hidden states before it, found by measurement.

Cohere and Granite scale their logits, Gemma 2 caps them, MiniCPM divides the states that its head reads. Names and
meanings of the config keys differ, so the model's own forward is run once with known numbers in the place of the head's
output: the map is then seen in float32, however the model itself computes.

T tokens, V vocabulary, D width; c a chunk of states, v a tile of the vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.errors import ModelError
from qlora_dpo.model.decoder_layers import decoder_body, unwrap_peft
from qlora_dpo.model.device import Device
from qlora_dpo.model.quantized import dense_weight

PROBE_IDS = (3, 5, 4, 6)
PROBE_ROWS = 1024
"""Rows of the head whose own product is checked: with 4 states its mean rounding error is 1e-4 in bf16."""
LARGEST_PROBE, SMALLEST_PROBE = 2.0**14, 2.0**-14
"""Magnitudes of the logits that the model is shown: caps of 15 to 50 are reached, and near zero they leave no trace."""


@dataclass(frozen=True)
class LogitMap:
    """How a model's logits follow from the product W x + b of its head: `cap * tanh(scale * (W x + b) / cap)`.

    `input_scale` multiplies the hidden states before the head. Without a cap the logits are `scale * (W x + b)`.
    """

    scale: float = 1.0
    cap: float | None = None
    input_scale: float = 1.0

    @property
    def is_identity(self) -> bool:
        """True if the logits are the head's product itself, as in most models."""
        return self == LogitMap()

    def apply_(self, logits_cv: Tensor) -> Tensor:
        """The model's logits of the head's products, in place."""
        if self.scale != 1:
            logits_cv *= self.scale
        if self.cap is not None:
            logits_cv.div_(self.cap).tanh_().mul_(self.cap)
        return logits_cv

    def slope_(self, logits: Tensor) -> Tensor:
        """The derivative of each logit with respect to the head's product, in place of the model's `logits`."""
        if self.cap is None:
            return logits.fill_(self.scale)
        return logits.div_(self.cap).square_().neg_().add_(1).mul_(self.scale)

    def describe(self) -> str:
        """The map in words; empty for the identity."""
        parts = [
            f"hidden states are multiplied by {self.input_scale:g}" if self.input_scale != 1 else "",
            f"logits are multiplied by {self.scale:g}" if self.scale != 1 else "",
            f"logits are capped at {self.cap:g}" if self.cap is not None else "",
        ]
        return ", ".join(filter(None, parts))


def head_logits(model: Any, hidden_cD: Tensor, weight_VD: Tensor, device: Device) -> Tensor:
    """The model's logits (c, V) in float32 of hidden states (c, D); `weight_VD` is the head's in the compute dtype."""
    head, logit_map = unwrap_peft(model).get_output_embeddings(), logit_map_of(model, device)
    hidden_cD = hidden_cD.to(weight_VD.dtype)
    if logit_map.input_scale != 1:
        hidden_cD = hidden_cD * logit_map.input_scale
    bias = getattr(head, "bias", None)  # PEFT's wrapper of trained tokens has none
    bias = None if bias is None else bias.to(weight_VD.dtype)
    return logit_map.apply_(nn.functional.linear(hidden_cD, weight_VD, bias).float())


def logit_map_of(model: Any, device: Device) -> LogitMap:
    """The map of `model`, with or without an adapter; measured on first use and kept on its head.

    Raises ModelError for logits that are neither the head's product nor that scaled and capped.
    """
    head: Any = unwrap_peft(model).get_output_embeddings()
    known: LogitMap | None = getattr(head, "logit_map", None)
    if known is None:
        known = head.logit_map = _measure(unwrap_peft(model), head, device)
    return known


def _measure(base: Any, head: Any, device: Device) -> LogitMap:
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
        raise _unsupported(base, "its output head is not a linear layer")
    seen: dict[str, Tensor] = {}
    training = {module: module.training for module in base.modules()}
    base.eval()
    try:
        with torch.no_grad(), device.autocast(), _known_logits(head, seen):
            ids_1T = torch.tensor([PROBE_IDS], device=base.get_input_embeddings().weight.device)
            ids_1T %= base.get_input_embeddings().weight.shape[0]
            logits_TV = base(input_ids=ids_1T, use_cache=False).logits[0]
            hidden_TD = decoder_body(base)(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
    finally:
        for module, mode in training.items():
            module.training = mode
    if "input" not in seen or logits_TV.shape != seen["known"].shape[1:]:
        raise _unsupported(base, "its logits are not those of its output head alone")
    _check_product(base, head, seen["input"][0], seen["output"][0])
    scale, cap = _fit(base, seen["known"][0], logits_TV)
    return LogitMap(scale, cap, _input_scale(base, hidden_TD, seen["input"][0]))


@contextmanager
def _known_logits(head: nn.Module, seen: dict[str, Tensor]) -> Iterator[None]:
    """Inside the context the head returns known numbers; what it read and would have returned is put into `seen`."""

    def replace_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"], seen["output"], seen["known"] = inputs[0], output, _known_numbers(output)
        return seen["known"]

    handle = head.register_forward_hook(replace_output)
    try:
        yield
    finally:
        handle.remove()


def _known_numbers(like: Tensor) -> Tensor:
    """Float32 numbers in the shape of `like`, of both signs and all magnitudes, other ones in each row."""
    numbers = torch.linspace(math.log(SMALLEST_PROBE), math.log(LARGEST_PROBE), like.numel(), dtype=torch.float64).exp()
    numbers[1::2] *= -1
    generator = torch.Generator().manual_seed(0)
    return numbers[torch.randperm(len(numbers), generator=generator)].float().view(like.shape).to(like.device)


def _fit(base: Any, known_TV: Tensor, logits_TV: Tensor) -> tuple[float, float | None]:
    """Scale and cap with which the logits follow from the known numbers; raises ModelError if there are none."""
    if torch.equal(known_TV, logits_TV.float()):
        return 1.0, None
    # models that round their logits to 16 bits do so one by one
    tolerance = max(1e-5, 2 * torch.finfo(logits_TV.dtype).eps)
    known, logits = known_TV.double().flatten(), logits_TV.double().flatten()
    small = known.abs() < 16 * SMALLEST_PROBE
    scale = _exact(base, float((logits[small] / known[small]).mean()))
    largest = float(logits.abs().max())
    cap = _exact(base, largest) if largest < abs(scale) * LARGEST_PROBE / 2 else None
    expected = LogitMap(scale, cap).apply_(known.clone())
    if not bool(((logits - expected).abs() <= tolerance * expected.abs()).all()):
        raise _unsupported(base, "it changes its logits behind the output head by more than a scale and a soft cap")
    return scale, cap


def _exact(base: Any, measured: float) -> float:
    """The number of the config, or its inverse, that was measured; `measured` itself if there is none."""
    config = base.config.get_text_config().to_dict()
    numbers = [float(value) for value in config.values() if isinstance(value, int | float) and value]
    candidates = [1.0, *numbers, *(1 / number for number in numbers)]
    return next((number for number in candidates if math.isclose(number, measured, rel_tol=2e-6)), measured)


def _input_scale(base: Any, hidden_TD: Tensor, input_TD: Tensor) -> float:
    """The factor between the hidden states and what the head reads; raises ModelError if it is not one number."""
    hidden, read = hidden_TD.to(input_TD.dtype).double(), input_TD.double()
    if hidden.shape == read.shape:
        if torch.equal(hidden, read):
            return 1.0
        eps = max(1e-5, 4 * torch.finfo(input_TD.dtype).eps)
        scale = float((hidden * read).sum() / hidden.square().sum())
        if math.isfinite(scale) and bool(((read - scale * hidden).abs() <= eps * read.abs()).all()):
            return _exact(base, scale)
    raise _unsupported(base, "it changes its hidden states between the last layer and the output head")


def _check_product(base: Any, head: Any, input_TD: Tensor, output_TV: Tensor) -> None:
    """Raise ModelError unless the head's output is W x + b: 16 bits round numbers, but hardly their mean ratio."""
    row_v = torch.linspace(0, head.weight.shape[0] - 1, PROBE_ROWS, device=input_TD.device).long().unique()
    weight_vD = dense_weight(head, output_TV.dtype)
    if weight_vD.dim() != 2 or weight_vD.shape != (output_TV.shape[-1], input_TD.shape[-1]):
        raise _unsupported(base, "its output head is not a linear layer")
    product_Tv = input_TD.to(output_TV.dtype).double() @ weight_vD[row_v].double().T
    if getattr(head, "bias", None) is not None:
        product_Tv += head.bias[row_v].double()
    output_Tv = output_TV[:, row_v].double()
    ratio = float((output_Tv * product_Tv).sum() / product_Tv.square().sum().clamp(min=1e-300))
    distance = float((output_Tv - product_Tv).norm() / product_Tv.norm().clamp(min=1e-300))
    eps = torch.finfo(output_TV.dtype).eps
    if product_Tv.norm() > 0 and not (abs(ratio - 1) <= max(1e-4, eps / 4) and distance <= max(1e-4, 4 * eps)):
        raise _unsupported(base, "its output head is no plain matrix product")


def _unsupported(base: Any, reason: str) -> ModelError:
    return ModelError(
        f"{type(base).__name__} cannot be trained here: {reason}, so its log-probabilities would be wrong; name a "
        "model of another family in model.name"
    )
