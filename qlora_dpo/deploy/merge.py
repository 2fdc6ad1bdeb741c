"""Writes adapter and base as one full model: summed in float32, rounded once, and checked before it is kept."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit, Linear8bitLt, LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from qlora_dpo.adapter import OpenedModel, open_adapter
from qlora_dpo.deploy.base_choice import RULE, MergeMetrics, MergeThresholds, choose_base
from qlora_dpo.deploy.merge_card import BaseWeights, merged_card, public_name
from qlora_dpo.deploy.merged_weights import changed_layers, is_dora
from qlora_dpo.deploy.shards import write_model
from qlora_dpo.deploy.weighted_adapters import add_weighted_adapters
from qlora_dpo.errors import ModelError, RecipeError, RunError
from qlora_dpo.files import atomic_folder, atomic_write, write_json
from qlora_dpo.manifest import write_manifest
from qlora_dpo.model import device
from qlora_dpo.model.quantized import quantization_of, quantized_layers
from qlora_dpo.model.saved_adapter import beyond_delta_weights
from qlora_dpo.recipe.model import Quantization
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME

Dtype = Literal["bf16", "fp16", "fp32"]
Check = Callable[[Path], MergeMetrics]
"""Loads the model that was written to a folder and returns figures; `kl`, in nats per token, is among them."""

MAX_KL = 0.05
"""Nats per token. Rounding costs 1e-4 in bf16, what 16-bit arithmetic adds on a GPU stays below 0.01, and every wrong
way that was measured costs 0.1 and more: above this the files are not the model that was trained."""


@dataclass(frozen=True)
class MergeResult:
    """What was written, and how it compares with the model that was trained; `candidates` has all that was measured."""

    folder: Path
    onto: BaseWeights
    dtype: Dtype
    bytes: int
    shards: int
    quantization: Quantization
    figures: MergeMetrics
    candidates: Mapping[BaseWeights, MergeMetrics]


def check_output_free(output: Path) -> None:
    """Raise RunError if there is anything at `output` already; an empty folder may be filled."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: is there already and is not overwritten; name another folder with -o DIR")


def open_for_merge(folder: Path, others: Sequence[Path] = (), weights: Sequence[float] = (1.0,)) -> OpenedModel:
    """Open base and adapter as they were trained, with `others` added; on a CPU they compute in float32.

    Raises RecipeError if `folder` is no adapter, ModelError for an adapter that a full model cannot hold exactly.
    """
    for each in (folder, *others):
        _check_mergeable(each)
    opened = open_adapter(folder, "fp32" if device.select_device().type == "cpu" else "auto")
    add_weighted_adapters(opened, folder, others, list(weights))
    for name, layer in changed_layers(opened.model).items():
        if reason := _not_a_sum(layer):
            raise ModelError(f"{folder}: cannot be merged: {name} {reason}")
    head = opened.model.get_output_embeddings()
    if isinstance(head, LoraLayer) and opened.model.config.tie_word_embeddings:
        raise ModelError(f"{folder}: cannot be merged: it adapts the output head, which is tied to the embeddings")
    ends = (opened.model.get_input_embeddings(), head)
    if opened.model.config.tie_word_embeddings and any(isinstance(end, ModulesToSaveWrapper) for end in ends):
        raise ModelError(f"{folder}: cannot be merged: it trained embeddings or head, which are tied to each other")
    return opened


def _check_mergeable(folder: Path) -> None:
    """Raise RecipeError if `folder` is no adapter, ModelError if its config says that it is no sum of weights."""
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        found = "has no " + ADAPTER_CONFIG_NAME if folder.is_dir() else "there is no such folder"
        raise RecipeError(f"{folder}: {found}; name the adapter folder of a finished run")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: its {ADAPTER_CONFIG_NAME} is damaged ({type(error).__name__})") from error
    if reason := beyond_delta_weights(vars(config)):
        raise ModelError(f"{folder}: cannot be merged: {reason}")


def candidate_bases(opened: OpenedModel, onto: BaseWeights | Literal["auto"]) -> tuple[BaseWeights, ...]:
    """The bases to measure; "auto" is both where they differ."""
    match onto:
        case "auto":
            return ("trained", "original") if quantized_layers(opened.model) else ("trained",)
        case "trained" | "original":
            return (onto,)


def merge_adapter(
    opened: OpenedModel,
    output: Path,
    onto: BaseWeights | Literal["auto"],
    dtype: Dtype,
    check: Check,
    bars: MergeThresholds | None = None,
    name: str | None = None,
) -> MergeResult:
    """Write the full model of `opened` to `output`, let `check` load it there, and keep it only if that went well.

    With "auto" both bases are tried, and the better one by `choice.RULE` is kept. All are written before the first is
    checked, so `check` may let go of the trained model. Raises RunError if there is something at `output`, ModelError
    if the written model is not the trained one, GateError if it misses `bars`.
    """
    check_output_free(output)
    quantization = quantization_of(opened.model)
    with atomic_folder(output) as temporary:
        bases = candidate_bases(opened, onto)
        folders = {base: temporary / base if len(bases) > 1 else temporary for base in bases}
        for base, folder in folders.items():
            write_model(opened, folder, base, device.TORCH_DTYPES[dtype])
        candidates = {base: dict(check(folder)) for base, folder in folders.items()}
        for base, each in candidates.items():
            _check_kl(each["kl"], base, dtype)
        chosen = choose_base(candidates, bars or MergeThresholds())
        if len(bases) > 1:
            _keep_only(folders[chosen], temporary)
        weights = list(temporary.glob("*.safetensors"))
        figures = candidates[chosen]
        record = {
            "adapter": name or _adapter_name(opened),
            "base": {
                "name": public_name(opened.source.name),
                "hub_id": opened.source.hub_id,
                "revision": opened.source.revision,
                "fingerprint": opened.source.fingerprint,
                "note": opened.source.note,
                "quantization": quantization,
            },
            "onto": chosen,
            **({"rule": RULE, "candidates": candidates} if len(bases) > 1 else {}),
            "dtype": dtype,
            "bytes": sum(file.stat().st_size for file in weights),
            "shards": len(weights),
            **figures,
        }
        write_json(temporary / "merge.json", record)
        atomic_write(temporary / "README.md", merged_card(record))
        write_manifest(temporary, [file for file in temporary.iterdir() if file.is_file()])
    return MergeResult(output, chosen, dtype, record["bytes"], record["shards"], quantization, figures, candidates)


def _keep_only(chosen: Path, home: Path) -> None:
    """Move the files of the folder `chosen` up into `home`, and remove the other candidates there."""
    for file in list(chosen.iterdir()):
        file.rename(home / file.name)
    for folder in [each for each in home.iterdir() if each.is_dir()]:
        shutil.rmtree(folder)


def _not_a_sum(layer: nn.Module) -> str:
    """Why the layer's weight is not base + scaling * B A; empty if it is."""
    if not isinstance(layer, LoraLayer):
        return ""
    if not isinstance(layer, LoraLinear | Linear4bit | Linear8bitLt):
        return f"is no linear layer but {type(layer).__name__}"
    if layer.lora_variant and not is_dora(layer):
        return f"uses a variant of LoRA ({type(next(iter(layer.lora_variant.values()))).__name__})"
    return ""


def _check_kl(kl: float, onto: BaseWeights, dtype: Dtype) -> None:
    if not math.isfinite(kl):
        raise ModelError(f"the merged model gives no finite log-probabilities in {dtype}; nothing was kept")
    if onto == "trained" and kl > MAX_KL:
        raise ModelError(
            f"the merged model is not the trained one: KL {kl:.3g} nats per token, at most {MAX_KL} is rounding; "
            "nothing was kept"
        )


def _adapter_name(opened: OpenedModel) -> str:
    folder = opened.folder.resolve().name if opened.folder else "adapter"
    return str(opened.run["name"]) if opened.run else folder
