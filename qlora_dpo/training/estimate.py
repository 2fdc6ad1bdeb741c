"""What a run needs of memory, by part, found out without its weights: shapes alone go through the real code.

V vocabulary, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, assert_never

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.errors import ModelError
from qlora_dpo.model import attention, budget
from qlora_dpo.model.budget import USABLE, Kept
from qlora_dpo.model.device import Device
from qlora_dpo.model.lean import make_lean
from qlora_dpo.model.lora import attach, trainable
from qlora_dpo.model.sources import Source
from qlora_dpo.preference.logps import STATES_AT_ONCE, WORDS_AT_ONCE, hidden_states, language_model
from qlora_dpo.preference.pack import Packing, collate
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe_model import ModelTable
from qlora_dpo.recipe_reference import AdapterReference, EmaReference
from qlora_dpo.recipe_train import TrainTable

CUDA_LIBRARIES = 512 * 2**20
"""Bytes that CUDA's context and cuBLAS take on a GPU before the first tensor."""
PROBE = [EncodedPair(tuple(range(2, 50)), tuple(range(2, 34)), tuple(range(34, 2, -1)), row, b"") for row in range(4)]
"""Pairs of which only the lengths matter; short, as what is kept grows with the tokens."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the moment most are needed, in the order in which they are told."""

    parts: Mapping[str, int]
    free: int
    """Bytes that a run can have on the device."""
    recomputed: int
    """Layers whose activations the backward pass computes again."""
    layers: int
    trained: int
    """Parameters of the adapter."""
    weights: int
    """Parameters of the base."""
    padded: str = ""
    """Why pairs would go through the model in padded batches; empty if in packed rows."""

    @property
    def needed(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """True if all parts are there at once."""
        return self.needed <= self.free


@dataclass(frozen=True)
class Load:
    """What goes through the model at most, in tokens."""

    sequence: int
    """The longest prompt with its longer answer."""
    step: int
    """All pairs of an optimizer step."""


def estimate(source: Source, recipe: Recipe, device: Device, load: Load, free: int) -> Memory:
    """What the recipe needs on `device`, of which `free` bytes are free.

    Raises ModelError for a config that transformers does not know, and RecipeError for an adapter that does not fit.
    """
    base = on_meta(source, device)
    weights, dense = base_bytes(base, recipe.model, device), dense_bytes(base, device)
    parameters = sum(each.numel() for each in base.parameters())
    padded = attention.why_not(base, load.sequence)
    if not padded:
        attention.use(base)
    model = attach(base, recipe.lora, recipe.train.seed)
    words = make_lean(model, device.torch_dtype)
    per_token, moved = kept_per_token(model, device, packed=not padded), trainable(model)
    trained = sum(each.numel() for each in moved.values())
    # a padded batch holds both sequences of a pair, as long as the longest
    row = max(2 * load.sequence if padded else load.sequence, min(recipe.train.micro_batch_tokens, load.step))
    parts = {
        **({"CUDA's context and libraries": CUDA_LIBRARIES} if device.type == "cuda" else {}),
        **weights,
        "adapter, float32": trained * 4,
        "its gradients, float32": trained * 4,
        f"optimizer state ({recipe.train.optim})": optimizer_bytes(moved, recipe.train),
        "output head, a tile of logits, and what it reads": head_bytes(base, device, row),
    }
    if isinstance(recipe.reference, AdapterReference | EmaReference):
        parts["the reference's adapter, float32"] = trained * 4
    other_form = recipe.model.quantization != "none" or device.weight_dtype != device.torch_dtype
    if device.type == "cuda" and other_form:
        parts["one layer's weights in the compute dtype"] = 2 * max(_elements(base)) * device.torch_dtype.itemsize
    elif other_form and dense <= (free - sum(parts.values())) * USABLE / 2:  # as `keep_dense_if_it_fits` decides
        parts[f"linear layers in {device.compute_dtype}, converted once"] = dense
    layers = len(budget.checkpointable(base))
    room = max(0, free - sum(parts.values()))
    # decided for a full row, also where a step has less
    count = _recomputed(recipe.train, per_token, layers, max(load.sequence, recipe.train.micro_batch_tokens), room)
    # DoRA's norms keep about two copies of a dequantized weight each for the backward pass
    copies = 2 * dense if recipe.model.quantization != "none" and "DoraLinearVariant" in words else 0
    told = f"activations of {row:,} tokens, {f'{count} of {layers} layers' if count else 'nothing'} recomputed"
    share = (layers - count + bool(count)) / max(1, layers)
    parts[told] = math.ceil(per_token.bytes(row, layers, count) + copies * share)
    return Memory(parts, free, count, layers, trained, parameters, padded)


def _recomputed(table: TrainTable, per_token: Kept, layers: int, tokens: int, room: int) -> int:
    """How many layers the run would recompute with so many free bytes."""
    match table.gradient_checkpointing:
        case "auto":
            return budget.layers_to_checkpoint(per_token, layers, tokens, room)
        case True:
            return layers
        case False:
            return 0


def on_meta(source: Source, device: Device) -> Any:
    """The base as its config describes it, with shapes and dtypes and no weights."""
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=device.weight_dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source.name}: its config is none of a causal language model that is known") from error
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def base_bytes(base: Any, table: ModelTable, device: Device) -> dict[str, int]:
    """Bytes of the base's weights as they are loaded: quantized layers, and the rest."""
    everything = sum(each.numel() * each.dtype.itemsize for each in base.parameters())
    stored = {torch.float32: "float32", torch.bfloat16: "bf16"}[device.weight_dtype]
    if table.quantization == "none":
        return {f"weights, {stored}": everything}
    linear = _linear(base)
    dense = sum(layer.weight.numel() for layer in linear) * device.weight_dtype.itemsize
    biases = sum(layer.bias.numel() for layer in linear if layer.bias is not None)
    # a 4-bit layer keeps its bias in the compute dtype, an 8-bit one as it was
    saved = 0 if table.quantization == "int8" else device.weight_dtype.itemsize - device.torch_dtype.itemsize
    if table.quantization == "int8":
        bits, quantized = 8, sum(layer.weight.numel() + 4 * layer.out_features for layer in linear)
    else:
        bits, quantized = 4, sum(four_bit_bytes(layer.weight.numel(), table.double_quant) for layer in linear)
    return {
        f"{bits}-bit weights of {len(linear):,} layers": quantized,
        f"embeddings and what else is not quantized, {stored}": everything - dense - biases * saved,
    }


def four_bit_bytes(elements: int, double_quant: bool) -> int:
    """Bytes of a weight in NF4 or FP4: half a byte an element, and a scale for each 64 of them (Dettmers et al. 2023).

    A scale is a float32, or a byte and a float32 for each 256 scales beside an offset. Each layer has tables of 16 and
    256 float32 values that the codes stand for.
    """
    scales = math.ceil(elements / 64)
    codes = math.ceil(elements / 2) + 16 * 4
    return codes + (scales + math.ceil(scales / 256) * 4 + 256 * 4 + 4 if double_quant else scales * 4)


def optimizer_bytes(parameters: Mapping[str, nn.Parameter], table: TrainTable) -> int:
    """Bytes of the optimizer's state beside `parameters`."""
    elements = sum(each.numel() for each in parameters.values())
    match table.optim:
        case "adamw_torch" | "schedule_free_adamw" | "paged_adamw_32bit":
            return elements * 8
        case "adamw_8bit" | "paged_adamw_8bit":
            return elements * 2
        case "adafactor":
            return sum(4 * (sum(each.shape[:2]) if each.dim() > 1 else each.numel()) for each in parameters.values())
        case "sgd":
            return 0
        case never:
            assert_never(never)


def kept_per_token(model: PeftModel, device: Device, *, packed: bool = True) -> Kept:
    """What a layer keeps of a token in packed rows, or in padded batches; `model` is on meta, with its adapter.

    The variable-length kernels exist on a GPU only; a layer keeps for them what it keeps for spans.
    """
    backend: attention.Backend = "batched" if device.attention == "batched" else "spans"
    batch = collate(PROBE, Packing(10**6, 0, backend if packed else None))
    if backend == "batched" and batch.layout is not None:
        batch.layout.unbucketed.numel()  # which tokens these are is decided on numbers, so before there are only shapes
    mode, cpu = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")
    for module in model.modules():
        for name, each in module.named_parameters(recurse=False):
            faked = FakeTensor(mode, each.data, cpu)
            module.register_parameter(name, nn.Parameter(faked, requires_grad=each.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, FakeTensor(mode, buffer.to("meta"), cpu))
    where = replace(device, type="cpu")
    training = model.training
    model.train()
    try:
        with mode:
            tokens = batch.input_ids_BL.numel()
            return budget.kept(language_model(model), lambda: hidden_states(model, batch, where), tokens)
    finally:
        model.train(training)


def head_bytes(base: Any, device: Device, tokens: int) -> int:
    """Bytes of the output head's copy in the compute dtype, of its tiles of logits, and of the states of a row."""
    head, width = base.get_output_embeddings().weight, base.config.get_text_config().hidden_size
    copy = head.numel() * device.torch_dtype.itemsize if head.dtype != device.torch_dtype else 0
    tiles = 3 * STATES_AT_ONCE * min(WORDS_AT_ONCE[device.type], len(head)) * 4
    states = tokens * width * (4 + device.torch_dtype.itemsize)
    return int(copy + tiles + states)


def dense_bytes(base: Any, device: Device) -> int:
    """Bytes of the linear layers but the head in the compute dtype."""
    return sum(_elements(base)) * device.torch_dtype.itemsize


def _linear(base: Any) -> list[nn.Linear]:
    """The linear layers but the output head: those that are quantized."""
    head = base.get_output_embeddings()
    return [each for each in base.modules() if isinstance(each, nn.Linear) and each is not head]


def _elements(base: Any) -> list[int]:
    return [layer.weight.numel() for layer in _linear(base)]
