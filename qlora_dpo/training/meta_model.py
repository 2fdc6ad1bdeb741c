"""Sizes of base and adapter, measured by running the real code on meta and fake tensors.

V vocabulary, D width.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, assert_never

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import qlora_dpo
from qlora_dpo.data.encode import PairSet
from qlora_dpo.data.encoded import EncodedPair, pair_lengths, sequence_lengths
from qlora_dpo.errors import ModelError, QloraDpoError
from qlora_dpo.files import cache_home, read_cached_record, write_cached_record
from qlora_dpo.model.activation_memory import ActivationBytes, measure_pass
from qlora_dpo.model.base import disable_dropout, store_embeddings
from qlora_dpo.model.decoder_layers import checkpointable_layers, layer_stack
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora, trainable_parameters
from qlora_dpo.model.packed.support import enable_packed_rows, packing_unsupported_reason
from qlora_dpo.model.quantized import stacked_weights
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference.logps import VOCAB_TILE, hidden_states
from qlora_dpo.preference.pack import STATES_PER_CHUNK, MicroBatch, Packing, collate
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.train import TrainTable
from qlora_dpo.training.checkpoint.rng_state import get_rng_states, set_rng_states

PROBE_LAYERS = 2
"""Where all layers are alike, this many and twice as many are traced: each further layer adds the same."""
FRAGMENTATION = {"cpu": 0.2, "cuda": 0.05}
"""Share of a step's allocations that is lost in holes between blocks of other lengths (benchmarks/README.md)."""
DUMMY_PAIRS = [
    EncodedPair(tuple(range(2, 50)), tuple(range(2, 34)), tuple(range(34, 2, -1)), row, b"") for row in range(4)
]
"""Only their lengths matter."""


@dataclass(frozen=True)
class Workload:
    """The most tokens that go through the model at once."""

    max_sequence_tokens: int
    """The longest prompt with its longer completion."""
    step_tokens: int
    """All pairs of an optimizer step."""
    max_pair_tokens: int = 0
    """The longest pair in a packed row, its prompt counted once; 0: as long as the longest sequence."""
    reference_tokens: int = 0
    """All pairs of the larger of the two sets that the reference pass scores before the first step; 0: more than a row
    holds."""

    def longest_pair_tokens(self, *, padded: bool) -> int:
        """Tokens of a row that holds the longest pair alone; padded, both its sequences have the same length."""
        # and a column of padding (preference/pack.py)
        return 2 * (self.max_sequence_tokens + 1) if padded else max(self.max_sequence_tokens, self.max_pair_tokens)


def workload_of(train: PairSet, heldout: PairSet, recipe: Recipe) -> Workload:
    """The workload of these pairs."""
    lengths = [pair_lengths(pair_set.encoded).sum(axis=1) for pair_set in (train, heldout)]
    sequence = max(int(sequence_lengths(pair_set.encoded).max()) for pair_set in (train, heldout))
    pair, tokens = max(int(length_P.max()) for length_P in lengths), [int(length_P.sum()) for length_P in lengths]
    step = recipe.train.batch_size * pair
    # in a single epoch the other pairs are scored along with their step
    steps = 1 if recipe.train.num_train_epochs == 1 else recipe.train.max_steps
    tokens[0] = min(tokens[0], steps * step) if steps else tokens[0]
    return Workload(sequence, step, pair, max(tokens))


@dataclass(frozen=True)
class ModelFootprint:
    """Sizes that follow from the shapes of base and adapter, in bytes unless stated otherwise."""

    weight_bytes: Mapping[str, int]
    num_parameters: int
    """Parameters of the base."""
    num_trainable: int
    """Parameters of the adapter."""
    optimizer_state_bytes: int
    dense_bytes: int
    """The linear layers but the head in the compute dtype."""
    largest_layer_bytes: int
    """The largest linear layer in the compute dtype."""
    num_layers: int
    activations: ActivationBytes
    vocab_size: int
    """Tokens."""
    head_copy_bytes: int
    """The output head in the compute dtype, if it is stored in another."""
    head_tile_bytes: int
    head_bytes_per_token: int
    """Hidden states that the head reads, per token."""
    fragmentation: float
    """Share of a step's allocations that is lost in holes between blocks of other lengths."""
    fragmentation_bytes_per_token: int
    """Bytes by which a CPU process grows per token and recomputed layer beside all tensors: about its widest activation
    in float32, measured for two models (benchmarks/README.md). Not measured on a GPU."""
    file_bytes: int
    """The weights on disk."""
    padding_reason: str
    """Why pairs are padded; empty if they are packed."""
    unplanned_reason: str = ""
    """Why `activations` are not known, and 0, before the weights are loaded; empty if they are."""


_footprints: dict[tuple[str, ...], ModelFootprint] = {}


def measure_footprint(source: ModelSource, recipe: Recipe, device: Device, workload: Workload) -> ModelFootprint:
    """The footprint of a recipe's base and adapter; cached, also on disk: weights and row sizes do not change it."""
    config = (source.folder / "config.json").read_text(encoding="utf-8")
    quantization = recipe.model.model_dump_json(exclude={"name", "revision", "sha256"})
    lengths = f"{workload.max_sequence_tokens} {workload.max_pair_tokens}"
    key = (config, quantization, recipe.lora.model_dump_json(), recipe.train.optim, str(device), lengths)
    if key not in _footprints:
        file = _footprint_file(key)
        kept = _footprint_from(read_cached_record(file))
        if kept is None:
            before = get_rng_states()
            kept = _measure_footprint(source, recipe, device, workload)
            set_rng_states(before)  # attaching an adapter on meta seeds the generators, as a real one does
            if processes.is_main() and not kept.unplanned_reason:
                write_cached_record(file, asdict(kept))
        _footprints[key] = kept
    return _footprints[key]


def _footprint_file(key: Sequence[str]) -> Path:
    """Where the footprint of `key` is kept by this code with these libraries."""
    libraries = [version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")]
    text = json.dumps([_code_digest(), libraries, key])
    return cache_home() / "footprints" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


@cache
def _code_digest() -> str:
    """SHA-256 of this package's source files, which decide what is measured."""
    digest = hashlib.sha256()
    for file in sorted(Path(qlora_dpo.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _footprint_from(record: dict[str, Any] | None) -> ModelFootprint | None:
    if record is None:
        return None
    return ModelFootprint(**{**record, "activations": ActivationBytes(**record["activations"])})


def _measure_footprint(source: ModelSource, recipe: Recipe, device: Device, workload: Workload) -> ModelFootprint:
    stored: torch.dtype | None = _config(source).dtype
    base = build_on_meta(source, device)
    linear, itemsize = _linear_layers(base), device.torch_dtype.itemsize
    weights, parameters = (
        base_weight_bytes(base, recipe.model, device),
        sum(parameter.numel() for parameter in base.parameters()),
    )
    elements = [layer.weight.numel() for layer in linear]
    widest = max((features for layer in linear for features in layer.weight.shape), default=0)
    padded = packing_unsupported_reason(base)
    head, width = base.get_output_embeddings().weight, base.config.get_text_config().hidden_size
    model = _with_adapter(base, recipe, device, packed=not padded)
    trained = trainable_parameters(model)
    pairs, unplanned = _longest_pair(workload), ""
    activations, failure = _try_activations(model, device, pairs, packed=not padded)
    if failure and not padded:
        # a layer that cannot read packed rows, as the loaded model will find too
        padded = f"in packed rows {device.attention} fails ({failure})"
        model = _with_adapter(build_on_meta(source, device), recipe, device, packed=False)
        activations, failure = _try_activations(model, device, pairs, packed=False)
    if failure:
        unplanned = f"its layers cannot be run without weights ({failure})"
    return ModelFootprint(
        weight_bytes=weights,
        num_parameters=parameters,
        num_trainable=sum(parameter.numel() for parameter in trained.values()),
        optimizer_state_bytes=optimizer_bytes(trained, recipe.train),
        dense_bytes=sum(elements) * itemsize,
        largest_layer_bytes=max(elements, default=0) * itemsize,
        num_layers=len(checkpointable_layers(base)),
        activations=activations,
        vocab_size=len(head),
        head_copy_bytes=head.numel() * itemsize if head.dtype != device.torch_dtype else 0,
        head_tile_bytes=logit_tile_bytes(len(head), device),
        head_bytes_per_token=width * (4 + itemsize),
        fragmentation=FRAGMENTATION[device.type],
        fragmentation_bytes_per_token=4 * widest if device.type == "cpu" else 0,
        file_bytes=parameters * (stored or torch.float32).itemsize,
        padding_reason=padded,
        unplanned_reason=unplanned,
    )


def _with_adapter(base: Any, recipe: Recipe, device: Device, *, packed: bool) -> PeftModel:
    """`base`, on meta, as a run trains it."""
    linear = _linear_layers(base)
    if packed:
        enable_packed_rows(base)
    model = attach_lora(base, recipe.lora, recipe.train.seed)
    mimic_quantized(linear, recipe.model, device)
    fuse_lora(model, device.torch_dtype)
    return model


def _try_activations(
    model: PeftModel, device: Device, pairs: Sequence[EncodedPair], *, packed: bool
) -> tuple[ActivationBytes, str]:
    """`activation_bytes_per_token`, and why it fails; any model may do what shapes alone do not allow.

    Routing to experts depends on values, and so do some masks; a kernel may have no rule for shapes.
    """
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints a traceback for each failure
    try:
        return activation_bytes_per_token(model, device, packed=packed, pairs=pairs), ""
    except QloraDpoError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0].partition(". ")[0].rstrip(".")
        return ActivationBytes(0, 0), f"{type(error).__name__}: {reason}"
    finally:
        log.setLevel(level)


def measure_loaded(
    footprint: ModelFootprint, model: Any, pair: EncodedPair, packing: Packing, device: Device
) -> ModelFootprint:
    """`footprint` with the activations that were unknown before: measured on the loaded model, by one pair.

    Takes a few passes, leaves no gradients, and changes no random state.
    """
    batch, states, training = collate([pair], packing).to(device.torch_device), get_rng_states(), model.training
    model.train()
    try:
        return replace(
            footprint,
            activations=measure_pass(model, partial(hidden_states, model, batch, device), batch.input_ids_BL.numel()),
            unplanned_reason="",
        )
    finally:
        model.train(training)
        model.zero_grad()
        set_rng_states(states)


def build_on_meta(source: ModelSource, device: Device) -> Any:
    """The base of the source's config on the meta device: shapes and dtypes, no weights."""
    config = _config(source)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=device.weight_dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unknown_config_error(source) from error
    store_embeddings(model, device)
    disable_dropout(model)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def _config(source: ModelSource) -> Any:
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unknown_config_error(source) from error


def _unknown_config_error(source: ModelSource) -> ModelError:
    return ModelError(f"{source.name}: its config is not that of a known causal language model")


def base_weight_bytes(base: Any, table: ModelTable, device: Device) -> dict[str, int]:
    """Bytes of the base's weights as they are loaded: quantized layers, and the rest."""
    everything = sum(parameter.numel() * parameter.dtype.itemsize for parameter in base.parameters())
    names = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    stored = names[device.weight_dtype]
    if device.embedding_dtype != device.weight_dtype:
        stored += f", embeddings {names[device.embedding_dtype]}"
    if table.quantization == "none":
        return {f"weights, {stored}": everything}
    linear = _linear_layers(base)
    dense = sum(layer.weight.numel() for layer in linear) * device.weight_dtype.itemsize
    biases = sum(layer.bias.numel() for layer in linear if layer.bias is not None)
    # a 4-bit layer keeps its bias in the compute dtype, an 8-bit one as it was
    saved = 0 if table.quantization == "int8" else device.weight_dtype.itemsize - device.torch_dtype.itemsize
    if table.quantization == "int8":
        bits, quantized = 8, sum(layer.weight.numel() + 4 * layer.out_features for layer in linear)
    else:
        bits, quantized = 4, sum(four_bit_bytes(layer.weight.numel(), table.double_quant) for layer in linear)
    experts = sum(weight.numel() * weight.dtype.itemsize for weight in stacked_weights(base).values())
    return {
        f"{bits}-bit weights of {len(linear):,} layers": quantized,
        **({f"weights of experts, not quantized, {names[device.weight_dtype]}": experts} if experts else {}),
        f"embeddings and what else is not quantized, {stored}": everything - dense - biases * saved - experts,
    }


def four_bit_bytes(elements: int, double_quant: bool) -> int:
    """Bytes of a weight in NF4 or FP4: half a byte per element and a scale per 64 elements (Dettmers et al. 2023).

    A scale is a float32; double-quantized, it is one byte, with a float32 per 256 scales and an offset. Each layer also
    has tables of 16 and 256 float32 values that the codes index.
    """
    scales = math.ceil(elements / 64)
    codes = math.ceil(elements / 2) + 16 * 4
    return codes + (scales + math.ceil(scales / 256) * 4 + 256 * 4 + 4 if double_quant else scales * 4)


def optimizer_bytes(parameters: Mapping[str, nn.Parameter], table: TrainTable) -> int:
    """Bytes of the optimizer's state beside `parameters`."""
    elements = sum(parameter.numel() for parameter in parameters.values())
    match table.optim:
        case "adamw_torch" | "schedule_free_adamw" | "paged_adamw_32bit":
            return elements * 8
        case "adamw_8bit" | "paged_adamw_8bit":
            return elements * 2
        case "adafactor":
            return sum(
                4 * (sum(weight.shape[:2]) if weight.dim() > 1 else weight.numel()) for weight in parameters.values()
            )
        case "sgd":
            return 0
        case never:
            assert_never(never)


def logit_tile_bytes(vocabulary: int, device: Device) -> int:
    """Bytes the head works on at once: three float32 tiles of logits and their exponentials.

    In 16 bits the next tile's product exists before it is converted, beside the tiles of the one before.
    """
    tile, narrow = VOCAB_TILE[device.type], device.torch_dtype.itemsize % 4
    return STATES_PER_CHUNK * min(tile, vocabulary) * (3 * 4 + (narrow if vocabulary > tile else 0))


def _longest_pair(workload: Workload) -> list[EncodedPair]:
    """One pair as long as the longest: a tile of attention saves all keys it sees, so long pairs keep more."""
    answer = min(
        max(workload.max_pair_tokens - workload.max_sequence_tokens, workload.max_sequence_tokens // 8, 1),
        workload.max_sequence_tokens - 1,
    )
    ids = range(2, 2 + workload.max_sequence_tokens - answer), range(2, 2 + answer), range(2 + answer, 2, -1)
    prompt, chosen, rejected = map(tuple, ids)
    return [EncodedPair(prompt, chosen, rejected, 1, b"")]


def mimic_quantized(linear: Sequence[nn.Linear], table: ModelTable, device: Device) -> None:
    """Make linear layers on meta return an output in the compute dtype, as quantized ones do.

    Each gets its weight in the compute dtype beside it; the conversion itself is another part of the plan.
    """
    for layer in linear:
        if layer.weight.dtype != device.torch_dtype or table.quantization != "none":
            layer.dense_weight = layer.weight.data.to(device.torch_dtype)
        if table.quantization != "none":
            layer.forward = partial(_quantized_forward, layer)  # type: ignore[method-assign]


def _quantized_forward(layer: Any, input_TI: torch.Tensor) -> torch.Tensor:
    weight_OI: torch.Tensor = layer.dense_weight
    bias = None if layer.bias is None else layer.bias.to(weight_OI.dtype)
    return nn.functional.linear(input_TI.to(weight_OI.dtype), weight_OI, bias)


def activation_bytes_per_token(
    model: PeftModel, device: Device, *, packed: bool = True, pairs: Sequence[EncodedPair] = DUMMY_PAIRS
) -> ActivationBytes:
    """Bytes a layer saves per token in packed rows, or in padded batches; `model` is on meta, with its adapter."""
    batch = collate(pairs, Packing(10**6, 0, device.attention if packed else None))
    if device.attention != "spans" and batch.layout is not None:
        batch.layout.index  # noqa: B018 - values decide which tokens these are, so they are computed before only shapes are left
    mode, training = FakeTensorMode(allow_non_fake_inputs=True), model.training
    where, many = replace(device, type="cpu"), len(checkpointable_layers(model))
    measure = partial(_measure_activations, model.train(), batch, where, mode)
    try:
        if not _has_uniform_layers(model) or many <= 2 * PROBE_LAYERS:
            return measure(many)
        more, few = measure(2 * PROBE_LAYERS), measure(PROBE_LAYERS)
        # the first layer, whose input needs no gradient, keeps less than the others
        total = few.layer * PROBE_LAYERS + (more.layer * 2 * PROBE_LAYERS - few.layer * PROBE_LAYERS) / PROBE_LAYERS * (
            many - PROBE_LAYERS
        )
        return replace(more, layer=total / many)
    finally:
        model.train(training)


def _has_uniform_layers(model: PeftModel) -> bool:
    """True if all layers have the same class, shapes and adapter."""
    kinds = {
        (type(layer), *((name, each.shape, each.requires_grad) for name, each in layer.named_parameters()))
        for layer in checkpointable_layers(model)
    }
    return len(kinds) == 1 and layer_stack(model) is not None


def _measure_activations(
    model: Any, batch: MicroBatch, device: Device, mode: FakeTensorMode, layers: int
) -> ActivationBytes:
    """`activation_bytes_per_token` of a model that has the first `layers` layers alone."""
    holder, cpu = layer_stack(model), torch.device("cpu")
    whole = holder.layers if holder is not None else []
    if holder is not None:
        holder.layers = nn.ModuleList(list(whole)[:layers])
    try:
        for module in model.modules():
            _fake_parameters(module, mode, cpu)
        with mode:
            return measure_pass(model, partial(hidden_states, model, batch, device), batch.input_ids_BL.numel())
    finally:
        model.zero_grad()
        if holder is not None:
            holder.layers = whole


def _fake_parameters(module: Any, mode: FakeTensorMode, cpu: torch.device) -> None:
    """Make the meta tensors of `module` fake CPU tensors: still only shapes, but attention and autocast work."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else FakeTensor(mode, tensor.to("meta"), cpu)

    for name, weight in module.named_parameters(recurse=False):
        if not isinstance(weight.data, FakeTensor):
            module.register_parameter(name, nn.Parameter(fake(weight.data), requires_grad=weight.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, fake(buffer))
    if isinstance(getattr(module, "dense_weight", None), torch.Tensor):
        module.dense_weight = fake(module.dense_weight)


def _linear_layers(base: Any) -> list[nn.Linear]:
    """The linear layers except the output head: those that are quantized."""
    head = base.get_output_embeddings()
    return [module for module in base.modules() if isinstance(module, nn.Linear) and module is not head]
