"""Has a model judge preference pairs before it trains on them, beside its own answers to some of their prompts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.data.encode import encode_pairs
from qlora_dpo.data.encoded import EncodedPair, TokenIds, digest_ids
from qlora_dpo.data.lazy_sequence import select_items
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.evaluation.pair_forecast import OwnAnswers, PairForecast, forecast_pairs
from qlora_dpo.files import write_json
from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.preference.logps import hidden_states, mean_answer_states, score_batch
from qlora_dpo.preference.objective import needs_reference
from qlora_dpo.preference.pack import Packing, collate, max_sequence_tokens, micro_batches
from qlora_dpo.preference.packing_choice import choose_packing
from qlora_dpo.preference.reference import model_logps
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.train import TrainTable
from qlora_dpo.talk.generate import context_tokens, sample_completions
from qlora_dpo.talk.sampling import SamplingParams
from qlora_dpo.tracking.progress import Advance
from qlora_dpo.training.build_model import build_model, load_base_for_run
from qlora_dpo.training.context import TrainContext
from qlora_dpo.training.engine import engine_of
from qlora_dpo.training.prepare import PreparedData, prepare_data

MAX_FORECAST_PAIRS = 200
"""Pairs that a forecast before a run is made of, drawn at random."""
MAX_KNOWN_PAIRS = 1000
"""Pairs that the forecast of a run is made of, where their log-probabilities are known."""
MIN_TRAINING_PAIRS = 100
"""With fewer training pairs whose log-probabilities are known, held-out pairs are judged with them."""
OWN_PROMPTS = 20
"""Prompts that the model answers itself."""
MAX_OWN_TOKENS = 64
"""The longest answer of its own; longer ones are cut off."""
OWN_BATCH_TOKENS = 4096


def forecast_recipe(recipe: Recipe, device: Device, advance: Advance = lambda pairs: None) -> PairForecast:
    """The forecast for MAX_FORECAST_PAIRS training pairs of a recipe by the model that its training starts from."""
    prepared = prepare_data(recipe)
    places = _draw(len(prepared.train.encoded))
    pairs = list(select_items(prepared.train.encoded, places))
    loaded = build_model(load_base_for_run(prepared, device), prepared, device, None)
    labels = [prepared.train.pairs[place].label for place in places]
    return _forecast(loaded.model, prepared.tokenizer, pairs, labels, loaded.packing, device, advance)


def forecast_rows(
    opened: OpenedModel, pairs: Sequence[Pair], max_length: int, advance: Advance = lambda pairs: None
) -> PairForecast | None:
    """The forecast for MAX_FORECAST_PAIRS of `pairs`, rows of data without a recipe, of at most `max_length` tokens.

    None if the model's template can write none of them, or none of that length.
    """
    model, tokenizer = opened.model, opened.tokenizer
    limit = min(max_length, context_tokens(model) or max_length)
    drawn = [pairs[place] for place in _draw(len(pairs))]
    encoded, labels = list[EncodedPair](), list[bool | None]()
    for pair, result in zip(drawn, encode_pairs(drawn, tokenizer, detect_chat_format(tokenizer)), strict=True):
        if isinstance(result, EncodedPair) and max_sequence_tokens(result) <= limit:
            encoded.append(result)
            labels.append(pair.label)
    if not encoded:
        return None
    padded = Packing(TrainTable().row_tokens, int(tokenizer.pad_token_id or 0), backend=None)
    model.eval()
    packing, _ = choose_packing(model, encoded, padded, opened.device)
    return _forecast(model, tokenizer, encoded, labels, packing, opened.device, advance)


def forecast_run(prepared: PreparedData, model: Any, context: TrainContext) -> PairForecast | None:
    """The forecast for the pairs of a run whose reference log-probabilities are known before its first step.

    The model's own answers are among it if the recipe wants samples; those of an earlier run are used again. None if
    the reference is not the model that training starts from, or computes no plain log-probabilities.
    """
    recipe, packing = context.recipe, context.packing
    has_reference = recipe.starts_as_reference and needs_reference(recipe.objective)
    if not has_reference or packing.token_weighting is not None or engine_of(recipe).is_trl:
        return None
    pairs, labels, logps = list[EncodedPair](), list[bool | None](), []
    for parsed, data in ((prepared.train, context.train), (prepared.heldout, context.heldout)):
        known = (~data.reference_P2.isnan().any(1)).nonzero()[: MAX_KNOWN_PAIRS - len(pairs), 0].tolist()
        if len(pairs) >= MIN_TRAINING_PAIRS:
            break
        pairs += [data.pairs[place] for place in known]
        labels += [parsed.pairs[place].label for place in known]
        logps.append(data.reference_P2[known])
    if not pairs:
        return None
    own = None
    if recipe.samples.prompts and not processes.is_sharded():
        first = select_items(context.train.pairs, range(min(len(context.train.pairs), MAX_FORECAST_PAIRS)))
        prompts = _own_prompts(model, list(first))
        file = context.reference_cache.folder / f"own-{digest_ids(*prompts).hex()}.json"
        own = _read_own_answers(file)
        if own is None:
            own = own_answers(model, prepared.tokenizer, prompts, packing, context.device)
            if own is not None:
                write_json(file, asdict(own))
    return forecast_pairs(pairs, torch.cat(logps).double().numpy(), _known(labels), own)


def _read_own_answers(file: Path) -> OwnAnswers | None:
    """The figures of answers that an earlier run with the same base has given to the same prompts."""
    try:
        return OwnAnswers(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _own_prompts(model: Any, pairs: Sequence[EncodedPair]) -> list[TokenIds]:
    """The first OWN_PROMPTS different prompts that leave room for an answer in the model's context."""
    limit = context_tokens(unwrap_peft(model))
    prompts = dict.fromkeys(pair.prompt for pair in pairs)
    return [ids for ids in prompts if limit is None or len(ids) + MAX_OWN_TOKENS <= limit][:OWN_PROMPTS]


def own_answers(
    model: Any, tokenizer: Any, prompts: Sequence[TokenIds], packing: Packing, device: Device
) -> OwnAnswers | None:
    """The model's greedy answers to `prompts`, token ids; None if there are none."""
    settings = SamplingParams(temperature=0, max_new_tokens=MAX_OWN_TOKENS)
    answered, was_training = list[EncodedPair](), model.training
    model.eval()
    try:
        with device.autocast():
            for batch, completions in sample_completions(
                model, tokenizer, prompts, 1, settings, [""] * len(prompts), OWN_BATCH_TOKENS
            ):
                answered += [
                    EncodedPair(prompts[index], answer.ids, (), 0, digest_ids(prompts[index], answer.ids))
                    for index, (answer,) in zip(batch, completions, strict=True)
                    if answer.ids
                ]
        if not answered:
            return None
        logp_A = model_logps(model, answered, packing, device)[:, 0].double()
    finally:
        model.train(was_training)
    return OwnAnswers(len(answered), float(-logp_A.sum()) / sum(len(answer.chosen) for answer in answered))


def _draw(count: int) -> list[int]:
    """MAX_FORECAST_PAIRS places of `count`, in rising order; the same ones each time."""
    if count <= MAX_FORECAST_PAIRS:
        return list(range(count))
    places: list[int] = np.sort(np.random.default_rng(0).choice(count, MAX_FORECAST_PAIRS, replace=False)).tolist()
    return places


def _forecast(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[EncodedPair],
    labels: Sequence[bool | None],
    packing: Packing,
    device: Device,
    advance: Advance,
) -> PairForecast:
    """The forecast by the model as it is, which runs each pair once, as well as the prompts that it answers itself."""
    plain = replace(packing, token_weighting=None)
    training = model.training
    model.eval()
    logps, states = torch.zeros(len(pairs), 2), list[torch.Tensor]([torch.empty(0)] * len(pairs))
    with torch.no_grad():
        for group in micro_batches(pairs, plain):
            batch = collate([pairs[place] for place in group], plain).to(device.torch_device)
            hidden_TD = hidden_states(model, batch, device)
            scores = score_batch(model, batch, device, metrics=False, hidden_TD=hidden_TD)
            logps[group] = torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], 1).float().cpu()
            for place, state_2D in zip(group, mean_answer_states(hidden_TD, batch).cpu(), strict=True):
                states[place] = state_2D
            advance(len(group))
    own = own_answers(model, tokenizer, _own_prompts(model, pairs), plain, device)
    model.train(training)
    known = _known(labels)
    return forecast_pairs(pairs, logps.double().numpy(), known, own, torch.stack(states).double().numpy())


def _known(labels: Sequence[bool | None]) -> list[bool] | None:
    """The labels of answers; None for pairs."""
    return None if None in labels else [bool(label) for label in labels]
