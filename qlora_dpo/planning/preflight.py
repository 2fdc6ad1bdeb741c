"""What a recipe would do, found out before it is done: its rows, their tokens, the steps, and what fits in memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qlora_dpo.data import lint
from qlora_dpo.data.audit import OVERLONG, Audit, check_bad_share, length_quantiles
from qlora_dpo.data.encode import PROMPT_TRUNCATED, PairSet
from qlora_dpo.data.encoded import pair_lengths, sequence_lengths
from qlora_dpo.data.formats import PreferenceFormat
from qlora_dpo.data.lazy_sequence import select_items
from qlora_dpo.data.lint import LengthStats, LintFinding
from qlora_dpo.data.pairs import ParsedRows
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.model.device import Device
from qlora_dpo.model.sources import fetch_without_weights
from qlora_dpo.planning.layer_timing import measure_layer_timing
from qlora_dpo.planning.memory_advice import MemoryFix, find_memory_fixes
from qlora_dpo.planning.memory_estimate import MemoryEstimate, estimate_memory
from qlora_dpo.planning.time_estimate import (
    LayerCounts,
    TimeEstimate,
    count_passes,
    estimate_seconds,
    mean_tokens_per_pair,
)
from qlora_dpo.preference.pack import Packing, micro_batches
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.data_order import make_data_order
from qlora_dpo.training.loss_columns import read_loss_columns
from qlora_dpo.training.meta_model import workload_of
from qlora_dpo.training.optim import check_optimizer
from qlora_dpo.training.prepare import PreparedData, prepare_data

SAMPLE_PAIRS = 256
"""Pairs that are laid out in rows to see what they share; the others are taken to share as much."""
OVERLONG_WARNING_SHARE = 0.05
"""Share of pairs over `max_length` from which on it is worth a warning."""
MIN_HELDOUT_PAIRS = 50
"""With fewer held-out pairs the 95 % interval of an accuracy reaches 14 points and more to either side."""
MEMORY_WARNING_SHARE = 0.9
"""Share of the memory from which on a run may fail that fits: an allocator rounds, and other programs grow."""


@dataclass(frozen=True)
class TokenLengths:
    """Lengths of the training pairs that are used, in tokens; those of three are median, 95th percentile, longest."""

    pair: tuple[int, int, int]
    """Of all that goes through the model for a pair: the prompt once, and its answers."""
    sequence: tuple[int, int, int]
    """Of the prompt with the longer answer, which `data.max_length` limits."""
    epoch_tokens: int
    """All pairs once."""
    overlong_pairs: int
    """Pairs longer than `data.max_length`, which were left out or cut."""
    overlong_share: float


@dataclass(frozen=True)
class Preflight:
    """Everything that is known of a run before its first weight is loaded."""

    device: Device
    train: Audit
    heldout: Audit
    findings: tuple[LintFinding, ...]
    length_bias: LengthStats | None
    tokens: TokenLengths
    steps: int
    memory: MemoryEstimate
    warnings: tuple[str, ...]
    time: TimeEstimate
    memory_fixes: tuple[MemoryFix, ...] = ()
    """What would make it fit, if it does not."""


def run_preflight(recipe: Recipe, device: Device, free: int, *, on_this_machine: bool = True) -> Preflight:
    """Look at the recipe's rows, tokens and memory, as a run on `device` with `free` bytes would meet them.

    How long it takes is found out by a short probe, if `device` is `here`.

    Raises what the run itself would raise before it loads weights.
    """
    check_optimizer(recipe.train, device)
    if recipe.train.engine == "trl":
        from qlora_dpo.training.trl_engine import check_trl_supports  # TRL takes seconds to import

        check_trl_supports(recipe.objective)
    prepared = prepare_data(recipe, fetch_without_weights)
    train, heldout = prepared.train, prepared.heldout
    for side in (train, heldout):
        check_bad_share(side.audit, recipe.data.max_bad_share)
        read_loss_columns(side.pairs, recipe.objective)
    found = tuple(_lint_findings(train, heldout, recipe))
    tokens = _token_lengths(train)
    steps = make_data_order(len(train.encoded), recipe.train).total_steps
    load = workload_of(train, heldout, recipe)
    memory = estimate_memory(prepared.source, recipe, device, load, free)
    bias = lint.length_stats(train.pairs)
    warnings = tuple(_preflight_warnings(recipe, found, bias, tokens, steps, memory, heldout))
    ways = () if memory.fits else find_memory_fixes(prepared.source, recipe, device, load, free)
    time = _estimate_time(prepared, recipe, device, memory, on_this_machine=on_this_machine)
    return Preflight(device, train.audit, heldout.audit, found, bias, tokens, steps, memory, warnings, time, ways)


def _estimate_time(
    prepared: PreparedData, recipe: Recipe, device: Device, memory: MemoryEstimate, *, on_this_machine: bool
) -> TimeEstimate:
    """Seconds by part, after a short probe of this machine; or why they are not known."""
    train, heldout = prepared.train.encoded, prepared.heldout.encoded
    packing = Packing(memory.row_tokens, 0, None if memory.padding_reason else device.attention)
    step = select_items(train, make_data_order(len(train), recipe.train).batch_indices(1)[:SAMPLE_PAIRS])
    done = count_passes(recipe, len(train), len(heldout), multiple_rows=len(micro_batches(step, packing)) > 1)
    if recipe.train.engine == "trl":
        return TimeEstimate(done, unknown_reason='train.engine = "trl" computes in another way')
    if not on_this_machine:
        return TimeEstimate(done, unknown_reason="a probe needs the card")
    if not memory.fits:
        return TimeEstimate(done, unknown_reason="the run has no room")
    amounts = mean_tokens_per_pair(train, step, packing), mean_tokens_per_pair(heldout, heldout[:SAMPLE_PAIRS], packing)
    layers = LayerCounts(memory.num_layers, memory.recomputed_layers, min(recipe.lora.layer_indices or [0]))
    try:
        pace = measure_layer_timing(prepared.source, recipe, device, step, packing, dense=memory.caches_dequantized)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, QloraDpoError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return TimeEstimate(done, unknown_reason=f"one layer alone cannot be timed: {reason}")
    return TimeEstimate(done, estimate_seconds(done, pace, layers, *amounts), pace.probe_seconds)


def _lint_findings(train: PairSet, heldout: PairSet, recipe: Recipe) -> Iterator[LintFinding]:
    """What is odd about the rows that are trained on, and prompts on both sides."""
    dropped = {reason: list(rows) for reason, rows in train.audit.dropped.items() if reason != OVERLONG}
    row_P = np.array([pair.row for pair in train.pairs])
    yield from lint.find_problems(ParsedRows(PreferenceFormat(train.audit.format), train.pairs, dropped, row_P))
    if recipe.data.effective_eval_share is None and (both := lint.prompt_overlap(train.pairs, heldout.pairs)):
        yield LintFinding("held-out prompts that are trained on", both, "set data.eval_share, or other splits", False)


def _token_lengths(train: PairSet) -> TokenLengths:
    pairs = pair_lengths(train.encoded).sum(axis=1)
    overlong = len(train.audit.dropped.get(OVERLONG, ())) + len(train.audit.repaired.get(PROMPT_TRUNCATED, ()))
    looked_at = train.audit.used + len(train.audit.dropped.get(OVERLONG, ()))
    sequences = length_quantiles(sequence_lengths(train.encoded))
    return TokenLengths(length_quantiles(pairs), sequences, int(pairs.sum()), overlong, overlong / max(1, looked_at))


def _preflight_warnings(
    recipe: Recipe,
    findings: tuple[LintFinding, ...],
    bias: LengthStats | None,
    tokens: TokenLengths,
    steps: int,
    memory: MemoryEstimate,
    heldout: PairSet,
) -> Iterator[str]:
    """What a user may want to change before the run, a sentence each."""
    for each in findings:
        yield f"data: {format_row_count(each)}: {each.problem}; {each.advice}"
    if bias is not None and abs(bias.effect_size) >= lint.MEDIUM_EFFECT_SIZE:
        yield f"data: {bias.describe()}"
    if len(heldout.encoded) < MIN_HELDOUT_PAIRS:
        pairs = len(heldout.encoded)
        yield (
            f"data: {pairs} held-out pairs: the 95 % interval of an accuracy reaches {98 / math.sqrt(pairs):.0f} "
            "points to either side; hold out more"
        )
    if tokens.overlong_share >= OVERLONG_WARNING_SHARE:
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
    if memory.fits and memory.needed > MEMORY_WARNING_SHARE * memory.free_bytes:
        yield f"memory: {memory.needed / memory.free_bytes:.0%} of it would be in use; close other programs"


def format_row_count(finding: LintFinding) -> str:
    """How many rows a finding is about."""
    return "1 row" if len(finding.rows) == 1 else f"{len(finding.rows):,} rows"
