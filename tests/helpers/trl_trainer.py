"""A stock DPOTrainer over the tiny model, and the same pairs in our layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import tiny_run
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import Losses, compute_losses, uses_wpo_weighting
from qlora_dpo.preference.pack import collate
from qlora_dpo.preference.reference import model_logps
from qlora_dpo.preference.token_weights import make_token_weighting
from qlora_dpo.training.context import TrainContext
from qlora_dpo.training.trl_engine import create_trainer


def stirred_trainer(
    quantization: str, folder: Path, chosen_tokens: int | None = None, **tables: Any
) -> tuple[Any, TrainContext, Any]:
    """A stock trainer over the tiny model, with an adapter that already does something."""
    what = tiny_run.recipe(quantization, **tables)
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder)
    if chosen_tokens is not None:
        job.train.pairs[:] = [of_length(pair, chosen_tokens) for pair in job.train.pairs]  # type: ignore[index]
        for index, pair in enumerate(job.train.pairs):
            job.train.reference_P2[index] = model_logps(model, [pair], tiny_run.PACKED, tiny_run.CPU)[0]
    trainer = create_trainer(tiny_run.stirred(model), job, tiny.tokenizer(), str(folder / "out"))
    return model, job, trainer


def of_length(pair: EncodedPair, tokens: int) -> EncodedPair:
    chosen = (pair.chosen * tokens)[:tokens]
    return EncodedPair(pair.prompt, chosen, pair.rejected, pair.row, digest_ids(pair.prompt, chosen, pair.rejected))


def inputs(job: TrainContext, trainer: Any, indices: Any = range(4)) -> dict[str, Tensor]:
    """Some of the job's pairs as TRL's own collator lays them out."""
    pairs = [job.train.pairs[i] for i in indices]
    names = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected"}
    found: dict[str, Tensor] = trainer.data_collator(
        [{name: list(getattr(pair, own)) for name, own in names.items()} for pair in pairs]
    )
    return found


def our_losses(model: Any, job: TrainContext) -> Losses:
    table = job.recipe.objective
    batch = collate(job.train.pairs[:4], replace(tiny_run.PACKED, token_weighting=make_token_weighting(table)))
    scores = score_batch(model, batch, tiny_run.CPU, wpo_weights=uses_wpo_weighting(table))
    return compute_losses(scores.with_reference(job.train.reference_P2[:4]), table)
