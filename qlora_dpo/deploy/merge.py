"""Merges adapter and base into one full model: summed in float32, rounded once, and verified before it is kept."""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit, Linear8bitLt
from peft.tuners.lora import ParamWrapper as LoraParameter

from qlora_dpo.adapter import OpenedModel, open_adapter
from qlora_dpo.deploy.base_choice import RULE, MergeMetrics, MergeThresholds, choose_base
from qlora_dpo.deploy.merge_card import BaseWeights, merged_card, public_name
from qlora_dpo.deploy.merged_weights import adapted_layers, is_dora
from qlora_dpo.deploy.shards import is_stored_quantized, write_model
from qlora_dpo.deploy.weighted_adapters import add_weighted_adapters, weighted_name
from qlora_dpo.errors import ModelError, RecipeError, RunError
from qlora_dpo.files import atomic_folder, atomic_write, write_json
from qlora_dpo.manifest import write_manifest
from qlora_dpo.model import device
from qlora_dpo.model.quantized import quantization_of, quantized_layers
from qlora_dpo.model.saved_adapter import beyond_delta_weights
from qlora_dpo.recipe.model import Quantization
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME

Dtype = Literal["bf16", "fp16", "fp32"]
MergeCheck = Callable[[Path], MergeMetrics]
"""Loads the model that was written to a folder and measures it; `kl` is in nats per token."""

USE_ADAPTER = "use it as an adapter, which chat, serve and eval do"

MAX_KL: dict[Dtype, float] = {"fp32": 1e-5, "fp16": 1e-4, "bf16": 5e-3}
"""Largest KL of a merged model in nats per token, by what its sum was rounded to, with both models computed in float32.

Measured: 2e-8 in fp32, under 1e-5 in fp16, 1e-4 in bf16, and 8e-4 there with norms as whole copies. What a bar on the
whole model may miss, such as one small update added transposed, `merged_weights` finds layer by layer."""
MAX_COMPUTE_KL = 0.01
"""What 16-bit arithmetic on a GPU adds to it at most. The wrong ways to merge that were measured cost 0.1 and more."""


@dataclass(frozen=True)
class MergeResult:
    """The merged model, and how it compares with the trained one; `candidates` has the metrics of every base tried."""

    folder: Path
    onto: BaseWeights
    dtype: Dtype
    bytes: int
    shards: int
    quantization: Quantization
    metrics: MergeMetrics
    candidates: Mapping[BaseWeights, MergeMetrics]


def check_output_free(output: Path) -> None:
    """Raise RunError if `output` exists, unless it is an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: is there already and is not overwritten; name another folder with -o DIR")


def open_for_merge(
    folder: Path, others: Sequence[Path] = (), weights: Sequence[float] = (1.0,), base_model: str | None = None
) -> OpenedModel:
    """Open base and adapter as they were trained, with the adapters `others` added; a CPU computes in float32.

    `base_model` is where the base lies now, if that is not where the adapters say. Raises RecipeError
    if `folder` is no adapter, ModelError for an adapter that a full model cannot hold exactly.
    """
    for adapter in (folder, *others):
        _check_mergeable(adapter)
    dtype = "fp32" if device.select_device().type == "cpu" else "auto"
    opened = open_adapter(folder, dtype, base_model, cache_dense=False)
    add_weighted_adapters(opened, folder, others, list(weights), base_model)
    if list(weights) != [1.0]:
        opened.name = weighted_name((folder, *others), weights)
    for name, layer in adapted_layers(opened.model).items():
        if reason := _beyond_lora_sum(layer):
            raise ModelError(f"{folder}: cannot be merged: {name} {reason}")
    return opened


def _check_mergeable(folder: Path) -> None:
    """Raise RecipeError if `folder` is no adapter, ModelError if its config changes more than linear weights."""
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        problem = f"has no {ADAPTER_CONFIG_NAME}" if folder.is_dir() else "there is no such folder"
        raise RecipeError(f"{folder}: {problem}; name the adapter folder of a finished run")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}: its {ADAPTER_CONFIG_NAME} is damaged ({type(error).__name__})") from error
    if reason := beyond_delta_weights(vars(config)):
        raise ModelError(f"{folder}: cannot be merged: {reason}; {USE_ADAPTER}")


def candidate_bases(opened: OpenedModel, onto: BaseWeights | Literal["auto"]) -> tuple[BaseWeights, ...]:
    """The bases to measure: with "auto" both, if they differ."""
    has_original = quantized_layers(opened.model) and not is_stored_quantized(opened)
    match onto:
        case "auto":
            return ("trained", "original") if has_original else ("trained",)
        case "trained":
            return (onto,)
        case "original":
            if is_stored_quantized(opened):
                raise RecipeError(
                    f"--onto original: {opened.source.name} is stored quantized, and the weights it was made from are "
                    "not in it; leave --onto out"
                )
            return (onto,)


def merge_adapter(
    opened: OpenedModel,
    output: Path,
    onto: BaseWeights | Literal["auto"],
    dtype: Dtype,
    check: MergeCheck,
    thresholds: MergeThresholds | None = None,
) -> MergeResult:
    """Write the full model of `opened` to `output`, verify it with `check`, and keep it only if it passes.

    With "auto" both bases are tried, and the better one by `base_choice.RULE` is kept. All are written before the first
    check, so `check` may free the trained model. Raises RunError if `output` is taken, ModelError if the merged model
    is not the trained one, GateError if it misses `thresholds`.
    """
    check_output_free(output)
    quantization = quantization_of(opened.model)
    with atomic_folder(output) as temporary:
        bases = candidate_bases(opened, onto)
        folders = {base: temporary / base if len(bases) > 1 else temporary for base in bases}
        for base, folder in folders.items():
            write_model(opened, folder, base, device.TORCH_DTYPES[dtype])
        candidates = {base: dict(check(folder)) for base, folder in folders.items()}
        for base, metrics in candidates.items():
            _check_kl(metrics["kl"], base, dtype, opened.device.compute_dtype == "fp32")
            _check_chats(metrics)
        chosen = choose_base(candidates, thresholds or MergeThresholds())
        if len(bases) > 1:
            _keep_only(folders[chosen], temporary)
        weights = list(temporary.glob("*.safetensors"))
        record = {
            "adapter": _adapter_name(opened),
            "base": _base_record(opened, quantization),
            "onto": chosen,
            **({"rule": RULE, "candidates": candidates} if len(bases) > 1 else {}),
            "dtype": dtype,
            "bytes": sum(file.stat().st_size for file in weights),
            "shards": len(weights),
            **candidates[chosen],
        }
        write_json(temporary / "merge.json", record)
        atomic_write(temporary / "README.md", merged_card(record))
        write_manifest(temporary, [file for file in temporary.iterdir() if file.is_file()])
    return MergeResult(
        output, chosen, dtype, record["bytes"], record["shards"], quantization, candidates[chosen], candidates
    )


def _base_record(opened: OpenedModel, quantization: Quantization) -> dict[str, Any]:
    """The base as merge.json names it."""
    return {
        "name": public_name(opened.source.name),
        "hub_id": opened.source.hub_id,
        "revision": opened.source.revision,
        "fingerprint": opened.source.fingerprint,
        "note": opened.source.note,
        "quantization": quantization,
    }


def _keep_only(chosen: Path, parent: Path) -> None:
    """Move the files of the folder `chosen` up into `parent`, and remove all candidates' folders there."""
    for file in list(chosen.iterdir()):
        file.rename(parent / file.name)
    for folder in [path for path in parent.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)


def _beyond_lora_sum(layer: Any) -> str:
    """Why the layer's update cannot be added to the base's tensors; empty if it can."""
    if not isinstance(layer, LoraLinear | Linear4bit | Linear8bitLt | LoraEmbedding | LoraParameter):
        return f"is of the kind {type(layer.get_base_layer()).__name__}, whose update is not merged here; {USE_ADAPTER}"
    if layer.lora_variant and not is_dora(layer):
        return f"uses a variant of LoRA ({type(next(iter(layer.lora_variant.values()))).__name__}); {USE_ADAPTER}"
    if any(layer.lora_bias.values()) and layer.get_base_layer().bias is None:
        return f"has lora_bias, and this layer of the base has no bias to add it to; {USE_ADAPTER}"
    return ""


def _check_chats(metrics: MergeMetrics) -> None:
    chats = metrics.get("chats", {"different": 0})
    if chats["different"]:
        raise ModelError(
            f"in {chats['different']} of {chats['compared']} held-out chats the merged model's own tokenizer and "
            f"template give other tokens than were trained on: {chats['first_difference']}; nothing was kept"
        )


def _check_kl(kl: float, onto: BaseWeights, dtype: Dtype, computed_in_fp32: bool) -> None:
    max_kl = MAX_KL[dtype] + (0 if computed_in_fp32 else MAX_COMPUTE_KL)
    if not math.isfinite(kl):
        raise ModelError(f"the merged model gives no finite log-probabilities in {dtype}; nothing was kept")
    if onto == "trained" and kl > max_kl:
        raise ModelError(
            f"the merged model is not the trained one: KL {kl:.3g} nats per token, at most {max_kl:g} is rounding; "
            "nothing was kept"
        )


def _adapter_name(opened: OpenedModel) -> str:
    if opened.name:
        return opened.name
    folder = opened.folder.resolve().name if opened.folder else "adapter"
    return str(opened.run["name"]) if opened.run else folder
