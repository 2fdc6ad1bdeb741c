"""A step of ours and of TRL's on a GPU, by time and memory, and what a step's memory is for the longest pairs."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flops
import gpu_card
import gpu_made
import step
import torch
from gpu_card import Form
from gpu_table import GIB, Report, gib

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.errors import is_out_of_memory
from qlora_dpo.model.device import Device
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.preference.pack import Packing, collate, max_sequence_tokens, micro_batches
from qlora_dpo.preference.reference import model_logps
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.train import DEFAULT_ROW_TOKENS

LONG_ROWS = 16_384
"""Tokens of rows for a card that a row of the usual length does not fill."""
AGAINST_DEFAULTS, AGAINST_BEST = 4.0, 1.8
"""How many times as long as our step TRL's should take, with its defaults and at its best."""
MOST_FOR_HH = 6 * GIB
"""What a step of hh.toml at max_length 1024 may take as on a T4."""
MFU = 30.0
"""Per cent of the card's own product rate, in bf16 with rows of LONG_ROWS tokens on an H200."""
ON_A_GPU = torch.cuda.is_available()


@dataclass
class Variant:
    """One way to take a step: what it is, its step, its work, and what was measured."""

    name: str
    take: Callable[[], None]
    operations: float
    seconds: list[float] = field(default_factory=list)
    above: int = 0
    failed: str = ""

    @property
    def median(self) -> float | None:
        """Seconds of a step; None if it could not be taken."""
        return statistics.median(self.seconds) if self.seconds and not self.failed else None


def bench(models: Path, shape: str, form: Form, pairs: Sequence[EncodedPair], quantization: Any = "nf4") -> step.Bench:
    """What all variants share."""
    source, here = gpu_made.source(models, shape), gpu_card.here(form)
    tokenizer: Any = load_tokenizer(source)
    table = ModelTable(name=str(source.folder), quantization=quantization)
    return step.Bench(source, table, here, tokenizer, pairs, best=4, budget=DEFAULT_ROW_TOKENS, pad=0)


def backends(here: Device) -> list[Any]:
    """The ways of attention in packed rows that this device has, the one it takes by itself first."""
    return list(dict.fromkeys([here.attention, "batched"]))


def known_logps(work: step.Bench, model: Any, packing: Packing) -> torch.Tensor:
    """The reference's log-probabilities (P, 2) of all pairs, row by row."""
    known_P2 = torch.zeros(len(work.pairs), 2)
    for group in micro_batches(work.pairs, packing):
        known_P2[group] = model_logps(model.eval(), [work.pairs[i] for i in group], packing, work.here)
    return known_P2


def ours(work: step.Bench, rows: Sequence[int]) -> list[Variant]:
    """Our step, as shipped first: the reference from the cache and asked along, without dense weights, and with each
    backend and row.
    """
    dense, sparse = (step.model_for(work, lean=True, dense=keep) for keep in (True, False))
    shape = flops.shape_of(work.source.folder)
    made = []
    for backend in backends(work.here):
        for tokens in rows:
            packing = Packing(tokens, work.pad, backend)
            known_P2 = known_logps(work, dense[0], packing)
            batches = [collate([work.pairs[i] for i in group], packing) for group in micro_batches(work.pairs, packing)]
            cached, along = (
                sum(flops.ours(shape, each, recomputed=False, reference=reference) for each in batches)
                for reference in (False, True)
            )
            name, first = f"ours, {backend}, rows of {tokens:,}", not made
            made.append(Variant(name, _ours(dense, work, packing, known_P2), cached))
            if first:
                made += [
                    Variant(f"{name}, reference along (first epoch)", _ours(dense, work, packing, None), along),
                    Variant(f"{name}, no dense weights kept", _ours(sparse, work, packing, known_P2), cached),
                ]
    return made


def _ours(model: Any, work: step.Bench, packing: Packing, known_P2: torch.Tensor | None) -> Callable[[], None]:
    return lambda: step.our_step(model, work, packing, known_P2)


def trls(work: step.Bench, defaults: Sequence[int], best: Sequence[int]) -> list[Variant]:
    """TRL's step with its defaults at some micro-batches, and at its best: no checkpointing, reference known, sorted.

    On a GPU its head takes scored tokens only, by Triton.
    """
    shape = flops.shape_of(work.source.folder)
    trainer = step.trainer_for(work)
    made = [
        Variant(
            f"TRL's defaults, micro-batch {size}",
            lambda size=size: step.trl_step(trainer, work, work.pairs, size),  # type: ignore[misc]
            _trl_operations(shape, work.pairs, size, defaults=True),
        )
        for size in defaults
    ]
    lean = step.trainer_for(work, gradient_checkpointing=False)
    lean.precompute_ref_logps = True
    pairs = sorted(work.pairs, key=max_sequence_tokens, reverse=True)
    reference_P2 = torch.zeros(len(pairs), 2)
    made += [
        Variant(
            f"TRL's best, micro-batch {size}",
            lambda size=size: step.trl_step(lean, work, pairs, size, reference_P2),  # type: ignore[misc]
            _trl_operations(shape, pairs, size, defaults=False),
        )
        for size in best
    ]
    return made


def _trl_operations(shape: flops.Shape, pairs: Sequence[EncodedPair], size: int, *, defaults: bool) -> float:
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return sum(
        flops.padded(shape, group, recomputed=defaults, reference=defaults, compact=ON_A_GPU) for group in groups
    )


def measure(variants: Sequence[Variant], rounds: int) -> None:
    """Take each step once to warm up and then once a round, in turn; one that runs out of memory is left out."""
    for turn in range(rounds + 1):
        for each in variants:
            if not each.failed:
                _once(each, counts=turn > 0)


def _once(each: Variant, *, counts: bool) -> None:
    loaded = torch.cuda.memory_allocated() if ON_A_GPU else 0
    if ON_A_GPU:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        each.take()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        each.failed = "does not fit"
    if each.failed:
        free()
        return
    gpu_card.wait()
    if counts:
        each.seconds.append(time.perf_counter() - began)
    if ON_A_GPU:
        each.above = max(each.above, torch.cuda.max_memory_allocated() - loaded)


def free() -> None:
    """Give back what an error's frames held."""
    gc.collect()
    if ON_A_GPU:
        torch.cuda.empty_cache()


def speed(models: Path, form: Form, report: Report, shape: str, length: int, batch: int, rounds: int) -> None:
    """Ours against TRL's on the same pairs."""
    with gpu_card.like(form):
        work = bench(models, shape, form, gpu_made.pairs(batch, length))
        variants = ours(work, (DEFAULT_ROW_TOKENS, LONG_ROWS))
        loaded = torch.cuda.memory_allocated() if ON_A_GPU else 0
        sizes = [size for size in (1, 4, 16) if size <= batch]
        try:
            variants += trls(work, [4] if batch >= 4 else [1], sizes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            report.say("TRL's two models do not fit beside ours")
            free()
        measure(variants, rounds)
        rate = gpu_card.product_rate(work.here, tiny=shape == "tiny")
    _tell_speed(report, work, variants, rate, loaded, length)


def _tell_speed(
    report: Report, work: step.Bench, variants: Sequence[Variant], rate: float, loaded: int, length: int
) -> None:
    median = statistics.median(len(pair.prompt) for pair in work.pairs)
    report.say(
        f"{work.source.name}, {work.table.quantization}, {work.here.compute_dtype}, {work.here.name}; "
        f"{len(work.pairs)} pairs of random ids, up to {length:,} tokens, median prompt {median:.0f}; our model, with "
        f"dense weights and without, takes {gib(loaded)} GiB; products reach {rate / 1e12:.1f} TFLOP/s"
    )
    shipped = variants[0].median
    report.columns("a step of", "s", "times ours as shipped", "above the loaded models, GiB", "TFLOP", "MFU")
    for each in variants:
        if each.median is None:
            report.row(each.name, each.failed, "", "", f"{each.operations / 1e12:.1f}", "")
            continue
        times = f"{each.median / shipped:.2f}" if shipped else ""
        mfu = f"{each.operations / each.median / rate:.1%}"
        operations = f"{each.operations / 1e12:.1f}"
        report.row(each.name, f"{each.median:.3f}", times, gib(each.above), operations, mfu)
    report.checks()
    for kind, least in (("TRL's defaults", AGAINST_DEFAULTS), ("TRL's best", AGAINST_BEST)):
        theirs = [each.median for each in variants if each.name.startswith(kind) and each.median is not None]
        ratio = min(theirs) / shipped if theirs and shipped else None
        judged = ON_A_GPU and work.source.folder.name == "0.5b" and len(work.pairs) == 16
        report.target(f"{kind} against ours as shipped", ratio, least, " times as long", judged=judged)


def memory(models: Path, form: Form, report: Report, shape: str, batch: int) -> None:
    """Peak memory, base included, of a step whose pairs are all as long as may be."""
    report.columns("longest sequence, tokens", "rows, tokens", "peak, GiB", "")
    for length in (512, 1024, 2048):
        with gpu_card.like(form):
            work = bench(models, shape, form, gpu_made.pairs(batch, length, full=True))
            if ON_A_GPU:
                torch.cuda.reset_peak_memory_stats()
            packing = Packing(DEFAULT_ROW_TOKENS, work.pad, work.here.attention)
            model = step.model_for(work, lean=True)
            known_P2 = known_logps(work, model[0], packing)
            took = Variant("", _ours(model, work, packing, known_P2), 0.0)
            measure([took], 1)
            peak = step.peak(work.here)
            del model, took
            free()
        judged = ""
        if length == 1024 and ON_A_GPU:
            judged = f"target for hh.toml: under {gib(MOST_FOR_HH)}: {'yes' if peak < MOST_FOR_HH else 'NO'}"
        report.row(f"{length:,}", f"{DEFAULT_ROW_TOKENS:,}", gib(peak), judged)
