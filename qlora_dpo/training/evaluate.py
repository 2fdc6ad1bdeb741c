"""Loss, accuracy and rewards over all held-out pairs, weighted by pair, so that batching cannot change them."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qlora_dpo.data.audit import length_baselines
from qlora_dpo.errors import SourceError
from qlora_dpo.files import read_cached_record, write_cached_record
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes, sharding
from qlora_dpo.model.malloc import malloc_trim
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.kl import kl_to_base
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.metrics import MetricSums, make_metric_sums
from qlora_dpo.preference.objective import Logps, Losses, compute_losses, concat_logps, uses_wpo_weighting
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.preference.reference import fresh_reference_logps
from qlora_dpo.recipe.objective import Objective, Sft
from qlora_dpo.tracking.run_log import RunLog
from qlora_dpo.training.checkpoint.best import best_step, out_of_patience, save_best
from qlora_dpo.training.checkpoint.state import SinceEval, TrainState
from qlora_dpo.training.context import PreferenceDataset, TrainContext
from qlora_dpo.training.oom_retry import row_attempts
from qlora_dpo.training.watch import RunHistory, find_warnings

logger = logging.getLogger(__name__)

MAX_EXPONENT = 700.0
"""A little less than the largest number whose exponential a float holds."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: PreferenceDataset,
    table: Objective,
    packing: Packing,
    device: Device,
    advance: Callable[[int], None] = lambda pairs: None,
) -> dict[str, Any]:
    """Means over all pairs of `data`, each name with the prefix `eval_`, and the number of pairs and ties.

    Each rank passes its own part of the pairs as `data`, and all return the means over all ranks.
    """
    started, was_training = time.monotonic(), model.training
    model.eval()
    sums = make_metric_sums(table)
    try:
        local = processes.run_or_raise_everywhere(
            lambda: _forward_all(model, data, table, packing, device, sums, advance)
        )
    finally:
        model.train(was_training)
    # over all pairs at once, since a loss may compare them with each other
    logps = rank_split.all_gather_logps(local.empty() if data.is_dummy else local)
    sums = (make_metric_sums(table) if data.is_dummy else sums).all_reduce()
    losses = compute_losses(logps, table)
    sums.add_losses(losses)
    totals = sums.totals
    return {
        **{f"eval_{name}": value for name, value in sums.means().items()},
        **_for_watch(logps, losses, totals, sums.completion_tokens),
        **({"eval_perplexity": _perplexity(totals, sums)} if isinstance(table, Sft) else {}),
        "eval_pairs": sums.pairs,
        **({"eval_ties": int(totals["ties"])} if sums.completion_tokens[1] else {}),
        "seconds": time.monotonic() - started,
    }


def run_evaluation(model: PeftModel, context: TrainContext, state: TrainState, run_log: RunLog) -> None:
    """Evaluate on the held-out pairs and record the result in `state` and `run_log`; an EMA reference is recomputed.

    Then come completions of held-out prompts, if the recipe wants any, the best adapter, and signs of trouble.
    """
    with run_log.evaluation():
        _evaluate_and_record(model, context, state, run_log)


def _evaluate_and_record(model: PeftModel, context: TrainContext, state: TrainState, run_log: RunLog) -> None:
    file = context.start_evaluation_file if state.step == 0 else None
    known = read_cached_record(file) if file is not None else None
    if known is not None:
        logger.info("evaluation: that of step 0 is known from an earlier run")
        record = {**known, "seconds": 0.0}
    else:
        record = _evaluate_in_rows_that_fit(model, context, state, run_log)
        if file is not None:
            write_cached_record(file, record)
    since, state.since_eval = state.since_eval, SinceEval()
    if since.pairs:
        record |= {
            "eval_train_loss": since.loss / since.pairs,
            "eval_vanishing": since.small_grad_pairs / since.pairs,
        }
    state.evals.append({"step": state.step, "epoch": context.data_order.epoch(state.step), **record})
    run_log.log_evaluation(state.evals[-1])
    if context.sample_fn is not None:
        with sharding.unsharded(model):
            if processes.is_main():
                run_log.log_samples(state.step, context.sample_fn(model))
    _keep_best(model, context, state, run_log)
    _watch(context, state, run_log)


def _evaluate_in_rows_that_fit(
    model: PeftModel, context: TrainContext, state: TrainState, run_log: RunLog
) -> dict[str, Any]:
    packing = row_packing(context, state)
    is_interim = 0 < state.step < context.data_order.total_steps
    heldout = context.heldout.first(context.interim_eval_pairs if is_interim else None)
    for attempt in row_attempts(f"evaluation after step {state.step}", packing):
        with attempt:
            record = _evaluate_heldout(model, context, heldout, attempt.packing, run_log)
    keep_row_tokens(state, packing, attempt.packing)
    if context.device.type == "cpu":
        malloc_trim()  # blocks of other lengths than a step's
    return record


def _evaluate_heldout(
    model: PeftModel, context: TrainContext, heldout: PreferenceDataset, packing: Packing, run_log: RunLog
) -> dict[str, Any]:
    """The metrics of held-out pairs and their KL divergence to the base; an EMA reference is computed anew."""
    device, data = context.device, heldout.for_this_rank()
    with run_log.phase("evaluate", len(data.pairs)) as advance:
        if context.reference_adapter.ema is not None:
            fresh_P2 = fresh_reference_logps(model, data.pairs, packing, device, context.reference_adapter)
            data = replace(data, reference_P2=fresh_P2)
        record = evaluate(model, data, context.recipe.objective, packing, device, advance)
    return record | {"eval_kl": kl_to_base(model, heldout.pairs, packing, device)}


def row_packing(context: TrainContext, state: TrainState) -> Packing:
    """The packing of the run, with the row size that has been found to fit."""
    if state.row_tokens in (None, context.packing.token_budget):
        return context.packing
    return replace(context.packing, token_budget=state.row_tokens)


def keep_row_tokens(state: TrainState, packing: Packing, fitting: Packing) -> None:
    """Note the row size that was found to fit, if it is smaller than that of `packing`."""
    if fitting.token_budget != packing.token_budget:
        state.row_tokens = fitting.token_budget


def _forward_all(
    model: nn.Module,
    data: PreferenceDataset,
    table: Objective,
    packing: Packing,
    device: Device,
    sums: MetricSums,
    advance: Callable[[int], None],
) -> Logps:
    """Log-probabilities of all pairs of `data`, whose metrics are added to `sums`."""
    parts = list[Logps]()
    for group in rank_split.pad_group_count(micro_batches(data.pairs, packing)):
        batch = collate([data.pairs[index] for index in group or [0]], packing).to(device.torch_device)
        if group is None:
            score_batch(model, batch, device, metrics=False)
            continue
        reference_P2 = data.reference_P2[group].to(device.torch_device)
        scores = score_batch(model, batch, device, wpo_weights=uses_wpo_weighting(table))
        parts.append(scores.with_reference(reference_P2, data.columns.select(group).to(device.torch_device)))
        sums.add_scores(scores)
        advance(len(group))
    return concat_logps(parts)


def _perplexity(totals: Mapping[str, float], sums: MetricSums) -> float:
    """The perplexity of the chosen answers, over all of their tokens; infinite where a float cannot hold it."""
    nats = -totals["logps/chosen"] / sums.completion_tokens[0]
    return math.inf if nats > MAX_EXPONENT else math.exp(nats)


def _for_watch(
    logps: Logps, losses: Losses, totals: Mapping[str, float], completion_tokens: tuple[int, int]
) -> dict[str, float]:
    """What signs of trouble are judged by, beside the means; `completion_tokens` are those of chosen and rejected."""
    pairs, (chosen_tokens, rejected_tokens) = len(losses.total_P), completion_tokens
    total_P = losses.total_P.double()
    margin_P = (losses.rewards_P2[:, 0] - losses.rewards_P2[:, 1]).double()
    longer_P = (logps.chosen_tokens_P - logps.rejected_tokens_P).double()
    # a correlation needs differences between pairs on both sides
    is_compared = rejected_tokens and totals["ties"] < pairs > 2
    varies = is_compared and float(margin_P.std()) > 0 and float(longer_P.std()) > 0
    correlation = float(torch.corrcoef(torch.stack([margin_P, longer_P]))[0, 1]) if varies else None
    return {
        "eval_loss_stderr": float(total_P.std(correction=0)) / pairs**0.5,
        "eval_logps/chosen_per_token": totals["logps/chosen"] / chosen_tokens,
    } | ({"eval_length_correlation": correlation} if correlation is not None else {})


def _keep_best(model: PeftModel, context: TrainContext, state: TrainState, run_log: RunLog) -> None:
    """Save the adapter if this evaluation is the best so far, and stop the run once its patience is used up."""
    table, metric = context.recipe.train, context.recipe.train.metric_for_best_model
    if table.load_best_model_at_end and best_step(state.evals, metric) == state.step:
        try:
            if processes.is_main():
                save_best(context.run_dir, state.step, model)
            state.best = state.step
        except SourceError as error:
            context.save_errors.append(str(error))
            logger.info(f"the best adapter so far is not kept: {error}; the run goes on")
    if state.step < context.data_order.total_steps and out_of_patience(state.evals, table):
        state.stopped = (
            f"stopped early after step {state.step}: {table.early_stopping_patience} evaluations were no better by "
            f"{metric} than step {best_step(state.evals, metric)}"
        )
        logger.info(state.stopped)


def _watch(context: TrainContext, state: TrainState, run_log: RunLog) -> None:
    """Report signs of trouble that are new, and stop the run if the recipe says so."""
    history = RunHistory(
        state.evals, context.data_order.total_steps, length_baselines(context.heldout.pairs), state.skipped_steps
    )
    reported = {sign["name"] for sign in state.signs}
    for name, sentence in find_warnings(history).items():
        if name in reported:
            continue
        state.signs.append({"step": state.step, "name": name, "sentence": sentence})
        run_log.log_warning(state.signs[-1])
        if name in context.recipe.watch.stop and not state.stopped_by_sign:
            state.stopped_by_sign = True
            state.stopped = f"stopped after step {state.step} by watch.stop, {name}: {sentence}"
