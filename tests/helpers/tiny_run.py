"""Small training jobs: a saved tiny Qwen2, pairs of random token ids, and everything a run is made of."""

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import PeftModel

from qlora_dpo.data.encoded import EncodedPair, data_fingerprint, digest_ids
from qlora_dpo.model import device, sources
from qlora_dpo.model.base import load_base
from qlora_dpo.model.device import Device
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora, trainable_parameters
from qlora_dpo.model.packed import attention
from qlora_dpo.model.quantized import cache_dequantized
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.preference.reference import compute_reference_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.training.checkpoint.state import TrainState
from qlora_dpo.training.context import PreferenceDataset, TrainContext
from qlora_dpo.training.data_order import make_data_order

# PEFT 0.21 and TRL 1.16 call things in transformers 5.23 by their older names
LIBRARIES_WARN = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is:FutureWarning")

torch.set_num_threads(1)  # matrices this small only lose by being shared out

PAD = 0
CPU = device.select_device("fp32")
PADDED = Packing(512, PAD, backend=None)
PACKED = Packing(512, PAD, backend="spans")
_folder = tempfile.TemporaryDirectory(prefix="qlora-dpo-tiny-")


@functools.cache
def source() -> ModelSource:
    """The tiny Qwen2 with its tokenizer, saved as a transformers folder."""
    folder = Path(_folder.name) / "tiny"  # a name that is the same in every run: texts are compared in which it stands
    tiny.qwen2().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return sources.fetch_model(ModelTable(name=str(folder)))


def pairs(count: int, seed: int = 0, longest_prompt: int = 12, longest_answer: int = 9) -> list[EncodedPair]:
    """Pairs of random ids of various lengths; no two answers of a pair are the same."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())

    made = [(ids(2, longest_prompt), ids(1, longest_answer), ids(1, longest_answer)) for _ in range(count)]
    return [EncodedPair(p, c, r, row, digest_ids(p, c, r)) for row, (p, c, r) in enumerate(made, 1)]


def recipe(quantization: str = "none", **tables: dict[str, Any]) -> Recipe:
    """A recipe for the tiny model; `tables` are laid over it."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": source().name, "quantization": quantization, "dtype": "fp32"},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 24},
        "train": {"batch_size": 4, "learning_rate": 1e-3, "micro_batch_tokens": 128, "logging_steps": 1},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    return Recipe.model_validate(values)


def base_model(quantization: str = "none", place: Device = CPU) -> Any:
    """The tiny Qwen2 as a run loads it, ready for packed rows."""
    base = load_base(source(), ModelTable(name=source().name, quantization=quantization), place)  # type: ignore[arg-type]
    cache_dequantized(base, place.torch_dtype)
    attention.enable_packed_attention(base)
    return base


def fresh(what: Recipe, place: Device = CPU) -> PeftModel:
    """Base and untrained adapter of a recipe, as a run loads them."""
    model = attach_lora(base_model(what.model.quantization, place), what.lora, what.train.seed)
    fuse_lora(model, place.torch_dtype)
    return model


def scaling(first: float) -> Callable[..., Accelerator]:
    """Accelerate's Accelerator, that scales gradients on a CPU too, by torch's GradScaler from a `first` scale on."""

    def accelerator(**arguments: Any) -> Accelerator:
        made = Accelerator(**{**arguments, "mixed_precision": "fp16"})
        made.native_amp, made.scaler = True, torch.amp.GradScaler("cpu", init_scale=first)
        return made

    return accelerator


def stirred(model: PeftModel, seed: int = 1) -> PeftModel:
    """The model with an adapter that does something: lora_B random too, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def job(
    model: PeftModel, what: Recipe, folder: Path, train: int = 10, heldout: int = 6, place: Device = CPU
) -> TrainContext:
    """A job over random pairs, with the reference's log-probabilities of them."""
    store, sides = ReferenceLogpCache(folder / "reference"), []
    packing = Packing(what.train.micro_batch_tokens, PAD, place.attention)
    for seed, count in ((0, train), (1, heldout)):
        some = pairs(count, seed)
        sides.append(PreferenceDataset(some, compute_reference_logps(model, some, store, packing, place)))
    return TrainContext(what, place, make_data_order(train, what.train), sides[0], sides[1], packing, folder, store)


def start(of: TrainContext) -> TrainState:
    """The state before the first step."""
    return TrainState(
        0,
        of.recipe.model_dump(exclude_none=True),
        {
            "base": source().fingerprint,
            "tokenizer": "tokenizer",
            "template": "template",
            "pairs": data_fingerprint(of.train.pairs),
        },
    )


def adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights by name."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}


def logps_and_gradients(
    model: Any, given: Sequence[EncodedPair], packing: Packing
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (P, 2), and the adapter's gradient of a sum that weighs every answer differently."""
    model.zero_grad()
    found_P2, weight_P2 = torch.zeros(len(given), 2), torch.linspace(-1, 2, 2 * len(given)).view(-1, 2)
    for group in micro_batches(given, packing):
        scores = score_batch(model, collate([given[place] for place in group], packing), CPU)
        both_P2 = torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], dim=1)
        (weight_P2[group] * both_P2).sum().backward()
        found_P2[group] = both_P2.detach()
    return found_P2, gradients(model)


def gradients(model: PeftModel) -> torch.Tensor:
    """All gradients of the adapter in one vector."""
    return torch.cat([p.grad.flatten().double() for p in trainable_parameters(model).values() if p.grad is not None])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance of two vectors, by their L2 norms."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def all_apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative distance of two adapters."""
    assert one.keys() == other.keys()
    return apart(torch.cat([one[n].flatten() for n in one]), torch.cat([other[n].flatten() for n in one]))


def column(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    """One name of all records."""
    return [record[name] for record in records]


class _Sentences(logging.Handler):
    """Appends every sentence to a list."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__(logging.INFO)
        self.sentences = sentences

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(record.getMessage())


@contextmanager
def logged_sentences(sentences: list[str] | None = None) -> Iterator[list[str]]:
    """The sentences that the package logs inside, in their order."""
    found, logger = [] if sentences is None else sentences, logging.getLogger("qlora_dpo")
    handler, level = _Sentences(found), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
