"""Questions that only a card can settle: how to decode from 4-bit weights, and which kernels to allow in a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_card
import gpu_made
import gpu_speed
import step
import torch
from gpu_card import Form
from gpu_speed import ON_A_GPU, Variant
from gpu_table import Report, gib
from torch import Tensor, nn

from qlora_dpo.model.base import load_base
from qlora_dpo.model.lora import trainable_parameters
from qlora_dpo.model.quantized import cache_dequantized, dense_weight, linear4bit_layers
from qlora_dpo.preference.pack import Packing

PROMPT, ANSWER = 64, 64
"""Tokens of the prompt and of the answer whose decoding is timed."""


def decode(models: Path, form: Form, report: Report, shape: str, answer: int) -> None:
    """Single tokens through bitsandbytes' own 4-bit function, through dequantized weights, and through dense ones."""
    with gpu_card.like(form):
        work = gpu_speed.bench(models, shape, form, [])
        model: Any = load_base(work.source, work.table, work.here)
        layers = list(linear4bit_layers(model).values())
        ways: dict[str, Callable[[Any], Any]] = {
            "bitsandbytes' own (fused where its rule says so)": lambda layer: partial(type(layer).forward, layer),
            "dequantized for every token": lambda layer: partial(_dequantized, layer, work.here.torch_dtype),
            "dense weights, kept": lambda layer: partial(_dequantized, layer, work.here.torch_dtype),
        }
        report.say(f"{work.source.name}, nf4, {work.here.compute_dtype}, {work.here.name}; {len(layers)} layers")
        report.columns(
            "way", "layers alone, ms a token", "greedy decoding, tokens/s", "weights, GiB", "as the first way"
        )
        first: Tensor | None = None
        for name, way in ways.items():
            if name.startswith("dense"):
                cache_dequantized(model, work.here.torch_dtype)
            for layer in layers:
                layer.forward = way(layer)
            alone, said, seconds = _layers_alone(layers, work.here.torch_dtype), *_greedy(model, work.here, answer)
            first = said if first is None else first
            same = int((said == first).sum())
            size = gib(torch.cuda.memory_allocated()) if ON_A_GPU else ""
            report.row(name, f"{alone * 1e3:.2f}", f"{answer / seconds:.1f}", size, f"{same} of {said.numel()} tokens")


def _dequantized(layer: Any, dtype: torch.dtype, inputs: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return nn.functional.linear(inputs.to(dtype), dense_weight(layer, dtype), bias).to(inputs.dtype)


@torch.no_grad()
def _layers_alone(layers: list[Any], dtype: torch.dtype) -> float:
    """Seconds that all linear layers take for one token, the least of some rounds."""
    place = layers[0].weight.device
    inputs = [torch.randn(1, 1, layer.in_features, dtype=dtype, device=place) for layer in layers]
    best = float("inf")
    for _ in range(5):
        gpu_card.wait()
        began = time.perf_counter()
        for layer, each in zip(layers, inputs, strict=True):
            layer.forward(each)
        gpu_card.wait()
        best = min(best, time.perf_counter() - began)
    return best


@torch.no_grad()
def _greedy(model: Any, here: Any, answer: int) -> tuple[Tensor, float]:
    """The answer's ids, and the seconds that they took once everything was warm."""
    ids = torch.arange(6, 6 + PROMPT, device=here.torch_device)[None]
    asked = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False, "use_cache": True}
    said, seconds = ids, 0.0
    for _ in range(2):
        gpu_card.wait()
        began = time.perf_counter()
        with here.autocast():
            said = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **asked)
        gpu_card.wait()
        seconds = time.perf_counter() - began
    return said[0, PROMPT:], seconds


def kernels(models: Path, form: Form, report: Report, shape: str, length: int, batch: int, rounds: int) -> None:
    """Kernels on and off: cuDNN's attention, products that sum in fp16, TRL's Triton head."""
    report.columns("what", "off, s a step", "on, s a step", "")
    _cudnn(models, report, shape, length, batch, rounds)
    _reduction(models, report, shape, length, batch, rounds)
    _triton(models, form, report, shape, length, batch, rounds)


def _cudnn(models: Path, report: Report, shape: str, length: int, batch: int, rounds: int) -> None:
    """Every round has other pairs, since cuDNN plans anew for every shape."""
    work = gpu_speed.bench(models, shape, "card", [])
    model = step.model_for(work, lean=True)
    packing = Packing(work.budget, work.pad, "batched")
    found = {}
    for on in (False, True):
        with _setting(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, on):
            seconds = []
            for turn in range(rounds + 1):
                work.pairs = gpu_made.pairs(batch, length, seed=10 * turn + on)
                known_P2 = gpu_speed.known_logps(work, model[0], packing)
                taken = Variant("", partial(step.our_step, model, work, packing, known_P2), 0.0)
                gpu_card.wait()
                began = time.perf_counter()
                taken.take()
                gpu_card.wait()
                seconds.append(time.perf_counter() - began)
            found[on] = sum(seconds[1:]) / rounds
    what = f"cuDNN's attention, batched rows, {work.here.compute_dtype}, other pairs each time"
    report.row(what, f"{found[False]:.3f}", f"{found[True]:.3f}", "")


def _reduction(models: Path, report: Report, shape: str, length: int, batch: int, rounds: int) -> None:
    """Sums of split products in fp16 or in float32, and what that does to the adapter's gradient."""
    matmul = torch.backends.cuda.matmul

    def get() -> bool:
        return bool(matmul.allow_fp16_reduced_precision_reduction)

    def put(on: bool) -> None:
        matmul.allow_fp16_reduced_precision_reduction = on

    with gpu_card.like("t4"):
        work = gpu_speed.bench(models, shape, "t4", gpu_made.pairs(batch, length))
        model = step.model_for(work, lean=True)
        packing = Packing(work.budget, work.pad, work.here.attention)
        known_P2 = gpu_speed.known_logps(work, model[0], packing)
        seconds, slopes = {}, {}
        for on in (False, True):
            with _setting(get, put, on):
                slopes[on] = _gradient(model, work, packing, known_P2)
        for on in (False, True):
            with _setting(get, put, on):
                taken = Variant("", partial(step.our_step, model, work, packing, known_P2), 0.0)
                gpu_speed.measure([taken], rounds)
                seconds[on] = taken.median
    moved = float((slopes[True] - slopes[False]).norm() / slopes[False].norm())
    words = (f"{seconds[on]:.3f}" if seconds[on] else "does not fit" for on in (False, True))
    report.row(
        f"fp16 products that sum in fp16, {work.here.compute_dtype}", *words, f"moves the gradient by {moved:.1e}"
    )


def _gradient(model: Any, work: step.Bench, packing: Packing, known_P2: Tensor) -> Tensor:
    """The adapter's gradient of one step, as the optimizer would be given it; no weight moves."""
    found: list[Tensor] = []

    def keep(*unused: Any, **more: Any) -> None:
        found.extend(parameter.grad.flatten().double() for parameter in trainable_parameters(model[0]).values())  # type: ignore[union-attr]

    with mock.patch.object(model[1], "step", keep):
        scaler = torch.amp.GradScaler(work.here.type, init_scale=2.0**10, enabled=work.here.needs_grad_scaler)
        step.our_step((model[0], model[1], scaler), work, packing, known_P2)
    return torch.cat(found)


def _triton(models: Path, form: Form, report: Report, shape: str, length: int, batch: int, rounds: int) -> None:
    """TRL's head with its Triton kernels, and the same folded by torch."""
    from trl.kernels import chunked_logprob

    with gpu_card.like(form):
        work = gpu_speed.bench(models, shape, form, gpu_made.pairs(batch, length))
        (variant,) = gpu_speed.trls(work, [], [min(4, batch)])
        found, why = {}, ""
        for on in (False, True):
            with mock.patch.object(chunked_logprob, "_use_triton", lambda device, on=on: on and ON_A_GPU):
                variant.seconds, variant.failed = [], ""
                try:
                    gpu_speed.measure([variant], rounds)
                except Exception as error:  # whatever Triton raises on a card that it does not know
                    why = f"{type(error).__name__}: {error}"[:150]
                    variant.failed = "fails"
                found[on] = f"{variant.median:.3f}" if variant.median else variant.failed
    report.row(f"Triton in TRL's head, {work.here.compute_dtype}", found[False], found[True], why)


@contextmanager
def _setting(get: Callable[[], bool], put: Callable[[bool], None], value: bool) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)
