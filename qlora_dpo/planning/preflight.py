"""Describes a run before any weight is loaded: its rows, tokens and steps, the time, and whether it fits in memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from qlora_dpo.data import lint
from qlora_dpo.data.audit import OVERLONG, Audit, check_bad_share, length_quantiles
from qlora_dpo.data.encode import PairSet
from qlora_dpo.data.encoded import pair_lengths, sequence_lengths
from qlora_dpo.data.formats import PreferenceFormat
from qlora_dpo.data.lazy_sequence import select_items
from qlora_dpo.data.lint import LengthStats, LintFinding
from qlora_dpo.data.pairs import ParsedRows
from qlora_dpo.data.truncation import PROMPT_TRUNCATED
from qlora_dpo.errors import QloraDpoError, first_line
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
from qlora_dpo.training.engine import engine_of
from qlora_dpo.training.loss_columns import read_loss_columns
from qlora_dpo.training.memory.workload import workload_of
from qlora_dpo.training.optim import check_optimizer
from qlora_dpo.training.prepare import PreparedData, prepare_data

SAMPLE_PAIRS = 256
"""Pairs that are laid out in rows to see how many tokens they share; the others are assumed to share as much."""
OVERLONG_WARNING_SHARE = 0.05
"""Share of pairs over `max_length` from which there is a warning."""
MIN_HELDOUT_PAIRS = 50
"""With fewer held-out pairs the 95 % interval of an accuracy reaches 14 points or more to either side."""
MEMORY_WARNING_SHARE = 0.9
"""Share of the free memory above which a run that fits may still fail: allocators round up, and other programs grow."""


@dataclass(frozen=True)
class TokenLengths:
    """Lengths of the usable training pairs, in tokens; triples are median, 95th percentile and longest."""

    pair: tuple[int, int, int]
    """Both answers and the prompt, which is counted once."""
    sequence: tuple[int, int, int]
    """Prompt and longer answer, which `data.max_length` limits."""
    epoch_tokens: int
    """Sum over all pairs."""
    overlong_pairs: int
    """Pairs longer than `data.max_length`, which were dropped or truncated."""
    overlong_share: float


@dataclass(frozen=True)
class Preflight:
    """Everything that is known of a run before its weights are loaded."""

    device: Device
    train: Audit
    heldout: Audit
    findings: tuple[LintFinding, ...]
    length_bias: LengthStats | None
    tokens: TokenLengths
    steps: int
    memory: MemoryEstimate
    time: TimeEstimate
    warnings: tuple[str, ...] = ()
    memory_fixes: tuple[MemoryFix, ...] = ()
    """Changes with which the run would fit, if it does not."""


def run_preflight(recipe: Recipe, device: Device, free: int, *, on_this_machine: bool = True) -> Preflight:
    """Examine rows, tokens, memory and time of the recipe, for a run on `device` with `free` bytes of memory.

    The time is estimated by a short measurement if `on_this_machine`, and is unknown otherwise. Raises whatever the run
    itself would raise before it loads weights.
    """
    check_optimizer(recipe.train, device)
    engine_of(recipe).check_objective(recipe)
    prepared = prepare_data(recipe, fetch_without_weights)
    train, heldout = prepared.train, prepared.heldout
    for pair_set in (train, heldout):
        check_bad_share(pair_set.audit, recipe.data.max_bad_share)
        read_loss_columns(pair_set.pairs, recipe.objective)
    steps = make_data_order(len(train.encoded), recipe.train).total_steps
    workload = workload_of(train, heldout, recipe)
    memory = estimate_memory(prepared.source, recipe, device, workload, free)
    fixes = () if memory.fits else find_memory_fixes(prepared.source, recipe, device, workload, free)
    preflight = Preflight(
        device=device,
        train=train.audit,
        heldout=heldout.audit,
        findings=tuple(_lint_findings(train, heldout, recipe)),
        length_bias=lint.length_stats(train.pairs),
        tokens=_token_lengths(train),
        steps=steps,
        memory=memory,
        time=_estimate_time(prepared, recipe, device, memory, on_this_machine=on_this_machine),
        memory_fixes=fixes,
    )
    return replace(preflight, warnings=tuple(_preflight_warnings(recipe, preflight, len(heldout.encoded))))


def _estimate_time(
    prepared: PreparedData, recipe: Recipe, device: Device, memory: MemoryEstimate, *, on_this_machine: bool
) -> TimeEstimate:
    """Seconds by part, after a short measurement on this machine; or the reason why they are unknown."""
    is_trl = engine_of(recipe).is_trl
    train, heldout = prepared.train.encoded, prepared.heldout.encoded
    packing = Packing(memory.row_tokens, 0, None if memory.padding_reason else device.attention)
    step_pairs = select_items(train, make_data_order(len(train), recipe.train).batch_indices(1)[:SAMPLE_PAIRS])
    multiple_rows = len(micro_batches(step_pairs, packing)) > 1
    passes = count_passes(recipe, len(train), len(heldout), multiple_rows=multiple_rows)
    if is_trl:
        return TimeEstimate(passes, unknown_reason='train.engine = "trl" computes differently')
    if not on_this_machine:
        return TimeEstimate(passes, unknown_reason="measuring it needs the card itself")
    if not memory.fits:
        return TimeEstimate(passes, unknown_reason="the run does not fit in memory")
    sizes = (
        mean_tokens_per_pair(train, step_pairs, packing),
        mean_tokens_per_pair(heldout, heldout[:SAMPLE_PAIRS], packing),
    )
    layers = LayerCounts(memory.num_layers, memory.recomputed_layers, min(recipe.lora.layer_indices or [0]))
    try:
        timing = measure_layer_timing(
            prepared.source, recipe, device, step_pairs, packing, dense=memory.caches_dequantized
        )
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, QloraDpoError) as error:
        reason = first_line(error)
        return TimeEstimate(passes, unknown_reason=f"one layer alone cannot be timed: {reason}")
    seconds = estimate_seconds(passes, timing, layers, *sizes)
    return TimeEstimate(passes, seconds, timing.probe_seconds, timing.other_load)


def _lint_findings(train: PairSet, heldout: PairSet, recipe: Recipe) -> Iterator[LintFinding]:
    """Problems of the training rows, and prompts that are in both sets."""
    dropped = {reason: list(rows) for reason, rows in train.audit.dropped.items() if reason != OVERLONG}
    row_P = np.array([pair.row for pair in train.pairs])
    format = PreferenceFormat(train.audit.format.partition("; ")[0])  # of a mixture, that of its first source
    yield from lint.find_problems(ParsedRows(format, train.pairs, dropped, row_P))
    if recipe.data.effective_eval_share is None and (shared := lint.prompt_overlap(train.pairs, heldout.pairs)):
        yield LintFinding("held-out prompts that are trained on", shared, "set data.eval_share, or other splits", False)


def _token_lengths(train: PairSet) -> TokenLengths:
    pair_tokens = pair_lengths(train.encoded).sum(axis=1)
    dropped = len(train.audit.dropped.get(OVERLONG, ()))
    overlong = dropped + len(train.audit.repaired.get(PROMPT_TRUNCATED, ()))
    return TokenLengths(
        pair=length_quantiles(pair_tokens),
        sequence=length_quantiles(sequence_lengths(train.encoded)),
        epoch_tokens=int(pair_tokens.sum()),
        overlong_pairs=overlong,
        overlong_share=overlong / max(1, train.audit.used + dropped),
    )


def _preflight_warnings(recipe: Recipe, preflight: Preflight, heldout_pairs: int) -> Iterator[str]:
    """What a user may want to change before the run, one sentence each."""
    is_trl = engine_of(recipe).is_trl
    bias, tokens, memory = preflight.length_bias, preflight.tokens, preflight.memory
    for finding in preflight.findings:
        yield f"data: {format_row_count(finding)}: {finding.problem}; {finding.advice}"
    if bias is not None and abs(bias.effect_size) >= lint.MEDIUM_EFFECT_SIZE:
        yield f"data: {bias.describe()}"
    if heldout_pairs < MIN_HELDOUT_PAIRS and "answer" not in preflight.train.tokens:
        yield (
            f"data: {heldout_pairs} held-out pairs: the 95 % interval of an accuracy reaches "
            f"{98 / math.sqrt(heldout_pairs):.0f} points to either side; hold out more"
        )
    if tokens.overlong_share >= OVERLONG_WARNING_SHARE:
        yield (
            f"tokens: {tokens.overlong_share:.1%} of the pairs are longer than data.max_length = "
            f"{recipe.data.max_length}; raise it, or look at the remaining ones with qlora-dpo data show"
        )
    if recipe.train.warmup_steps >= preflight.steps:
        yield (
            f"steps: train.warmup_steps = {recipe.train.warmup_steps} is not below the {preflight.steps} steps of the "
            "run, so the learning rate never reaches its peak; lower it"
        )
    if is_trl:
        yield 'memory: the figures are for train.engine = "qlora_dpo"; TRL needs several times more for a step'
    if memory.fits and memory.needed > MEMORY_WARNING_SHARE * memory.free_bytes:
        yield f"memory: {memory.needed / memory.free_bytes:.0%} of it would be in use; close other programs"


def format_row_count(finding: LintFinding) -> str:
    """The number of rows that a finding is about, in words."""
    return "1 row" if len(finding.rows) == 1 else f"{len(finding.rows):,} rows"
