"""What a recipe would do, found out before it is done: its rows, their tokens, the steps, and what fits in memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qlora_dpo.data import lint
from qlora_dpo.data.audit import OVERLONG, Audit, insist_on_few_bad_rows, quantiles
from qlora_dpo.data.encode import CUT, PairSet
from qlora_dpo.data.encoded import lengths, sequence_tokens
from qlora_dpo.data.formats import Shape
from qlora_dpo.data.lazy_sequence import picked
from qlora_dpo.data.lint import Finding, Lengths
from qlora_dpo.data.pairs import Found
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.model.device import Device
from qlora_dpo.model.sources import without_weights
from qlora_dpo.planning.layer_timing import measure
from qlora_dpo.planning.memory_advice import Way, ways_to_fit
from qlora_dpo.planning.memory_estimate import Memory, estimate
from qlora_dpo.planning.time_estimate import Layers, Timetable, amount, passes, seconds
from qlora_dpo.preference.pack import Packing, micro_batches
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.data_order import make_plan
from qlora_dpo.training.loss_columns import columns_of
from qlora_dpo.training.meta_model import load_of
from qlora_dpo.training.optim import insist_on_optimizer
from qlora_dpo.training.run import Prepared, prepare

LAID_OUT = 256
"""Pairs that are laid out in rows to see what they share; the others are taken to share as much."""
MANY_OVERLONG = 0.05
"""Share of pairs over `max_length` from which on it is worth a warning."""
FEW_HELD_OUT = 50
"""With fewer held-out pairs the 95 % interval of an accuracy reaches 14 points and more to either side."""
TIGHT = 0.9
"""Share of the memory from which on a run may fail that fits: an allocator rounds, and other programs grow."""


@dataclass(frozen=True)
class Tokens:
    """Lengths of the training pairs that are used, in tokens; those of three are median, 95th percentile, longest."""

    pair: tuple[int, int, int]
    """Of all that goes through the model for a pair: the prompt once, and its answers."""
    sequence: tuple[int, int, int]
    """Of the prompt with the longer answer, which `data.max_length` limits."""
    epoch: int
    """All pairs once."""
    overlong: int
    """Pairs longer than `data.max_length`, which were left out or cut."""
    overlong_share: float


@dataclass(frozen=True)
class Preflight:
    """Everything that is known of a run before its first weight is loaded."""

    device: Device
    train: Audit
    heldout: Audit
    findings: tuple[Finding, ...]
    lengths: Lengths | None
    tokens: Tokens
    steps: int
    memory: Memory
    warnings: tuple[str, ...]
    time: Timetable
    ways: tuple[Way, ...] = ()
    """What would make it fit, if it does not."""


def examine(recipe: Recipe, device: Device, free: int, *, here: bool = True) -> Preflight:
    """Look at the recipe's rows, tokens and memory, as a run on `device` with `free` bytes would meet them.

    How long it takes is found out by a short probe, if `device` is `here`.

    Raises what the run itself would raise before it loads weights.
    """
    insist_on_optimizer(recipe.train, device)
    if recipe.train.engine == "trl":
        from qlora_dpo.training.trl_engine import insist_on_trls  # TRL takes seconds to import

        insist_on_trls(recipe.objective)
    prepared = prepare(recipe, without_weights)
    train, heldout = prepared.train, prepared.heldout
    for side in (train, heldout):
        insist_on_few_bad_rows(side.audit, recipe.data.max_bad_share)
        columns_of(side.pairs, recipe.objective)
    found = tuple(_findings(train, heldout, recipe))
    tokens = _tokens(train)
    steps = make_plan(len(train.encoded), recipe.train).total_steps
    load = load_of(train, heldout, recipe)
    memory = estimate(prepared.source, recipe, device, load, free)
    bias = lint.lengths(train.pairs)
    warnings = tuple(_warnings(recipe, found, bias, tokens, steps, memory, heldout))
    ways = () if memory.fits else ways_to_fit(prepared.source, recipe, device, load, free)
    time = _time(prepared, recipe, device, memory, here=here)
    return Preflight(device, train.audit, heldout.audit, found, bias, tokens, steps, memory, warnings, time, ways)


def _time(prepared: Prepared, recipe: Recipe, device: Device, memory: Memory, *, here: bool) -> Timetable:
    """Seconds by part, after a short probe of this machine; or why they are not known."""
    train, heldout = prepared.train.encoded, prepared.heldout.encoded
    packing = Packing(memory.row, 0, None if memory.padded else device.attention)
    step = picked(train, make_plan(len(train), recipe.train).indices(1)[:LAID_OUT])
    done = passes(recipe, len(train), len(heldout), several_rows=len(micro_batches(step, packing)) > 1)
    if recipe.train.engine == "trl":
        return Timetable(done, why_not='train.engine = "trl" computes in another way')
    if not here:
        return Timetable(done, why_not="a probe needs the card")
    if not memory.fits:
        return Timetable(done, why_not="the run has no room")
    amounts = amount(train, step, packing), amount(heldout, heldout[:LAID_OUT], packing)
    layers = Layers(memory.layers, memory.recomputed, min(recipe.lora.layers or [0]))
    try:
        pace = measure(prepared.source, recipe, device, step, packing, dense=memory.dense)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, QloraDpoError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Timetable(done, why_not=f"one layer alone cannot be timed: {reason}")
    return Timetable(done, seconds(done, pace, layers, *amounts), pace.probe)


def _findings(train: PairSet, heldout: PairSet, recipe: Recipe) -> Iterator[Finding]:
    """What is odd about the rows that are trained on, and prompts on both sides."""
    dropped = {reason: list(rows) for reason, rows in train.audit.dropped.items() if reason != OVERLONG}
    row_P = np.array([pair.row for pair in train.pairs])
    yield from lint.findings(Found(Shape(train.audit.shape), train.pairs, dropped, row_P))
    if recipe.data.held_out_share is None and (both := lint.overlap(train.pairs, heldout.pairs)):
        yield Finding("held-out prompts that are trained on", both, "set data.eval_share, or other splits", False)


def _tokens(train: PairSet) -> Tokens:
    pairs = lengths(train.encoded).sum(axis=1)
    overlong = len(train.audit.dropped.get(OVERLONG, ())) + len(train.audit.repaired.get(CUT, ()))
    looked_at = train.audit.used + len(train.audit.dropped.get(OVERLONG, ()))
    sequences = quantiles(sequence_tokens(train.encoded))
    return Tokens(quantiles(pairs), sequences, int(pairs.sum()), overlong, overlong / max(1, looked_at))


def _warnings(
    recipe: Recipe,
    found: tuple[Finding, ...],
    bias: Lengths | None,
    tokens: Tokens,
    steps: int,
    memory: Memory,
    heldout: PairSet,
) -> Iterator[str]:
    """What a user may want to change before the run, a sentence each."""
    for each in found:
        yield f"data: {counted_rows(each)}: {each.what}; {each.advice}"
    if bias is not None and abs(bias.effect) >= lint.MARKED_EFFECT:
        yield f"data: {bias.sentence()}"
    if len(heldout.encoded) < FEW_HELD_OUT:
        pairs = len(heldout.encoded)
        yield (
            f"data: {pairs} held-out pairs: the 95 % interval of an accuracy reaches {98 / math.sqrt(pairs):.0f} "
            "points to either side; hold out more"
        )
    if tokens.overlong_share >= MANY_OVERLONG:
        yield (
            f"tokens: {tokens.overlong_share:.1%} of the pairs are longer than data.max_length = "
            f"{recipe.data.max_length}; raise it, or see which are left with qlora-dpo data show"
        )
    if recipe.train.warmup_steps >= steps:
        yield (
            f"steps: train.warmup_steps = {recipe.train.warmup_steps} is no less than the {steps} steps of the run, so "
            "the learning rate never reaches its peak; lower it"
        )
    if recipe.train.engine == "trl":
        yield 'memory: the figures are of train.engine = "qlora_dpo"; TRL needs several times more for a step'
    if memory.fits and memory.needed > TIGHT * memory.free:
        yield f"memory: {memory.needed / memory.free:.0%} of it would be in use; close other programs"


def counted_rows(finding: Finding) -> str:
    """How many rows a finding is about."""
    return "1 row" if len(finding.rows) == 1 else f"{len(finding.rows):,} rows"
