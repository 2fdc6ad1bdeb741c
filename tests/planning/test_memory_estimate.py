"""What a run needs is told from shapes alone, and agrees with what the weights themselves take."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import tiny_run
import torch
from transformers import LlamaConfig, Qwen2Config

from qlora_dpo.cli.text.memory_text import memory_lines
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model.activation_memory import ActivationBytes, measure_activation_bytes
from qlora_dpo.model.base import load_base
from qlora_dpo.model.device import Device, device_for_gpu
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.gpu_specs import GPU_SPECS
from qlora_dpo.model.live_tensors import LiveTensorBytes
from qlora_dpo.model.lora import attach_lora, trainable_parameters
from qlora_dpo.model.packed import attention
from qlora_dpo.model.quantized import cache_dequantized
from qlora_dpo.model.sources import ModelSource, fetch_without_weights
from qlora_dpo.planning.memory_advice import find_memory_fixes
from qlora_dpo.planning.memory_estimate import REFERENCE_EXTRA_PART, MemoryEstimate, estimate_memory
from qlora_dpo.preference.logps import hidden_states, score_batch
from qlora_dpo.preference.pack import Packing, collate
from qlora_dpo.recipe import Recipe, load_recipe
from qlora_dpo.recipe.model import LoraTable, ModelTable
from qlora_dpo.training.memory import traced_activations
from qlora_dpo.training.memory.footprint import measure_footprint
from qlora_dpo.training.memory.meta_model import base_weight_bytes, build_on_meta, optimizer_bytes
from qlora_dpo.training.memory.traced_activations import DUMMY_PAIRS, activation_bytes_per_token
from qlora_dpo.training.memory.workload import Workload
from qlora_dpo.training.optim import create_optimizer

pytestmark = tiny_run.LIBRARIES_WARN

LOAD = Workload(max_sequence_tokens=24, step_tokens=100)
T4 = device_for_gpu(GPU_SPECS["t4"])


def folder(tmp_path: Path, config: Any) -> ModelSource:
    """A model's config without any weights."""
    config.save_pretrained(tmp_path)
    return ModelSource("org/model", tmp_path)


def half_billion(layers: int = 24) -> Qwen2Config:
    """The config of Qwen2-0.5B-Instruct, with so many of its layers."""
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of everything that a loaded base holds: parameters, and what goes with quantized ones."""
    total = 0
    for each in model.parameters():
        total += each.numel() * each.dtype.itemsize
        state = getattr(each, "quant_state", None)
        if state is not None:
            nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
            total += sum(part.numel() * part.dtype.itemsize for part in (state.absmax, state.code, *nested))
    return total + sum(each.state.SCB.numel() * 4 for each in model.modules() if hasattr(each, "init_8bit_state"))


@pytest.mark.parametrize(
    ("quantization", "double"),
    [("none", True), ("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", True)],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bases_bytes_are_those_of_the_loaded_base(quantization: Any, double: bool, dtype: Any) -> None:
    place = replace(tiny_run.CPU, compute_dtype=dtype)
    table = ModelTable(name=tiny_run.source().name, quantization=quantization, double_quant=double)
    told = base_weight_bytes(build_on_meta(tiny_run.source(), place), table, place)
    assert sum(told.values()) == bytes_of(load_base(tiny_run.source(), table, place))


@pytest.mark.parametrize(
    ("quantization", "dtype", "backend"),
    [
        *(("none", "fp32", "spans"), ("nf4", "bf16", "spans"), ("nf4", "bf16", "batched")),
        *(pytest.param("none", "bf16", backend, marks=pytest.mark.slow) for backend in ("spans", "batched")),
        pytest.param("nf4", "fp32", "spans", marks=pytest.mark.slow),
    ],
)
def test_what_a_token_keeps_is_what_it_keeps_on_real_weights(quantization: str, dtype: Any, backend: Any) -> None:
    place = replace(tiny_run.CPU, compute_dtype=dtype, attention=backend)
    what = tiny_run.recipe(quantization)
    model = tiny_run.fresh(what, place).train()
    batch = collate(DUMMY_PAIRS, Packing(10**6, 0, backend))
    found = measure_activation_bytes(
        model.get_base_model(), partial(hidden_states, model, batch, place), batch.input_ids_BL.numel()
    )
    base = build_on_meta(tiny_run.source(), place)
    attention.enable_packed_attention(base)
    alone = attach_lora(base, what.lora, 0)
    fuse_lora(alone, place.torch_dtype)
    told = activation_bytes_per_token(alone, place)
    # a 4-bit layer gives back the dtype that it is given; the dense one that stands for it here, that of its product
    assert told.layer == pytest.approx(found.layer, rel=0.1 if (quantization, dtype) == ("nf4", "bf16") else 0.001)
    assert told.layer_input == found.layer_input


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_the_optimizers_state_is_as_large_as_told(optim: Any) -> None:
    what = tiny_run.recipe(train={"optim": optim})
    moved = trainable_parameters(tiny_run.fresh(what))
    optimizer = create_optimizer(moved, what.train, tiny_run.CPU)
    for each in moved.values():
        each.grad = torch.ones_like(each)
    optimizer.step()
    held = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "step"
    ]
    assert optimizer_bytes(moved, what.train) == sum(each.numel() * 4 for each in held)


def test_the_half_billion_on_a_t4_is_a_worked_number(tmp_path: Path) -> None:
    """24 layers of 2 x 896^2 + 2 x 896 x 128 + 3 x 896 x 4864 weights in 4 bits, 151,936 x 896 embeddings."""
    elements = [896 * 896, 896 * 128, 896 * 128, 896 * 896, *3 * [896 * 4864]]
    what = tiny_run.recipe("nf4", lora={"r": 16, "lora_alpha": 32}, model={"dtype": "auto"})
    found = estimate_memory(folder(tmp_path, half_billion()), what, T4, Workload(512, 16 * 512), T4.total_bytes)
    assert (found.base_parameters, found.num_layers, found.fits) == (494_032_768, 24, True)
    assert found.trainable_parameters == 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    four_bits = 24 * sum(n // 2 + 64 + n // 64 + -(-n // 64 // 256) * 4 + 1024 + 4 for n in elements)
    assert found.bytes_by_part["4-bit weights of 168 layers"] == four_bits
    biases = 24 * (896 + 128 + 128) * 2  # in the compute dtype, which is fp16
    others = found.bytes_by_part["embeddings and what else is not quantized, float32, embeddings fp16"]
    assert others == 151_936 * 896 * 2 + (2 * 24 + 1) * 896 * 4 + biases
    assert (
        found.bytes_by_part["LoRA, float32"]
        == found.bytes_by_part["its gradients, float32"]
        == 4 * found.trainable_parameters
    )
    assert found.bytes_by_part["optimizer state (adamw_torch)"] == 8 * found.trainable_parameters
    assert sum(found.bytes_by_part.values()) == found.needed < 5 * 2**30


def test_hh_on_a_t4_stays_under_6_gib_with_16_pairs_of_up_to_1024_tokens(tmp_path: Path) -> None:
    what = load_recipe(Path(__file__).parents[2] / "recipes" / "hh.toml", ("data.max_length=1024",)).recipe
    assert what.train.batch_size == 16
    longest = Workload(1024, 16 * 1800, 1800)  # a prompt of 248 tokens, and answers of 776
    found = estimate_memory(folder(tmp_path, half_billion()), what, T4, longest, T4.total_bytes)
    assert (found.fits, found.recomputed_layers, found.process_bytes) == (True, 0, 0)
    assert found.needed < 6 * 2**30


def test_every_part_that_a_reader_looks_for_is_told() -> None:
    found = estimate_memory(tiny_run.source(), tiny_run.recipe("nf4"), tiny_run.CPU, LOAD, 2**34)
    words = ("4-bit weights", "embeddings", "LoRA", "gradients", "optimizer", "linear layers", "activations")
    more = ("backward pass", "output head", "fragmentation", "reference pass", "framework's reserve")
    assert [next(word for word in (*words, *more) if word in part) for part in found.bytes_by_part] == [*words, *more]
    assert found.peak_bytes == found.process_bytes + max(found.needed, found.loading_bytes)
    assert found.process_bytes > 100 * 2**20  # torch alone


@pytest.mark.parametrize("count", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_what_one_more_layer_keeps_is_told_from_a_few(tmp_path: Path, count: int) -> None:
    def told(few: int) -> ActivationBytes:
        traced_activations.PROBE_LAYERS = few
        base = build_on_meta(folder(tmp_path, half_billion(layers=count)), T4)
        attention.enable_packed_attention(base)
        model = attach_lora(base, what.lora, 0)
        fuse_lora(model, T4.torch_dtype)
        return activation_bytes_per_token(model, T4)

    what, before = tiny_run.recipe("nf4"), traced_activations.PROBE_LAYERS
    try:
        few, every = told(2), told(100)
    finally:
        traced_activations.PROBE_LAYERS = before
    assert few.layer == pytest.approx(every.layer, rel=1e-9)
    assert few.working == pytest.approx(every.working, rel=0.01)


def test_live_bytes_are_those_of_tensors_that_exist() -> None:
    before = torch.ones(5000)
    with LiveTensorBytes() as live:
        kept, _ = torch.ones(1000), before.view(50, 100).T
        assert (torch.ones(3000) + 1).sum() == 6000
    assert live.now == kept.nbytes == 4000
    assert live.peak >= 4000 + 2 * 12_000


def with_less_and_less(source: ModelSource, what: Recipe, load: Workload) -> list[MemoryEstimate]:
    """The plans on a T4 of which from 3 GiB to 1 GiB are free, those alone that differ from the one before."""
    found: list[MemoryEstimate] = []
    for size in range(3072, 1024, -16):
        plan = estimate_memory(source, what, T4, load, size * 2**20)
        if not found or (found[-1].bytes_by_part, found[-1].fits) != (plan.bytes_by_part, plan.fits):
            found.append(plan)
    return found


def test_less_memory_recomputes_more_layers_until_it_does_not_fit(tmp_path: Path) -> None:
    source = folder(tmp_path, half_billion(layers=6))
    what = tiny_run.recipe("nf4", train={"micro_batch_tokens": 2048}, model={"dtype": "auto"})
    found = with_less_and_less(source, what, Workload(512, 10**6))
    # with a layer recomputed there is one that is computed again beside the others, so two is the least that helps
    told = [(each.caches_dequantized, each.recomputed_layers, each.fits) for each in found]
    assert told[:2] == [(True, 0, True), (False, 0, True)] and told[-2:] == [(False, 6, True), (False, 6, False)]
    assert [each.recomputed_layers for each in found[2:-2]] == sorted(
        {each.recomputed_layers for each in found} - {0, 6}
    )
    assert min(each.recomputed_layers for each in found[2:]) == 2
    needs = [each.needed for each in found]
    assert needs == sorted(needs, reverse=True)


def test_less_memory_makes_rows_smaller_before_it_recomputes_a_layer(tmp_path: Path) -> None:
    source, load = folder(tmp_path, half_billion(layers=6)), Workload(512, 10**6)
    what = tiny_run.recipe("nf4", train={"micro_batch_tokens": "auto"}, model={"dtype": "auto"})
    found = with_less_and_less(source, what, load)
    told = [(each.row_tokens, bool(each.recomputed_layers), each.caches_dequantized, each.fits) for each in found]
    assert list(dict.fromkeys(told)) == [
        (2048, False, True, True), (2048, False, False, True), (1024, False, False, True), (512, False, False, True),
        (512, True, False, True), (512, True, False, False),
    ]  # fmt: skip
    first, *_, smaller = (each for each in found if each.row_tokens >= 1024)
    assert first.smaller_rows_reason == ""
    assert re.fullmatch(
        r"rows of 1,024 tokens, since 2,048 would need \d\.\d GiB, "
        r"and of \d\.\d GiB left for a step \d\.\d are planned with",
        smaller.smaller_rows_reason,
    )
    assert smaller.smaller_rows_reason in memory_lines(smaller)
    # where the recipe has all layers recomputed, larger rows fit
    table = {"micro_batch_tokens": "auto", "gradient_checkpointing": True}
    every = tiny_run.recipe("nf4", model={"dtype": "auto"}, train=table)
    assert estimate_memory(source, every, T4, load, smaller.free_bytes).row_tokens == 2048


def test_dense_weights_are_kept_on_a_t4_for_the_half_billion_and_not_for_7(tmp_path: Path) -> None:
    """360 million weights are 0.7 GiB in fp16; 6.5 billion would be 12.2 of 15, beside a step that needs 11."""
    what, load = (
        tiny_run.recipe("nf4", model={"dtype": "auto"}, train={"micro_batch_tokens": "auto"}),
        Workload(512, 12_800, 800),
    )
    small, large = tmp_path / "small", tmp_path / "large"
    found = estimate_memory(folder(small, half_billion()), what, T4, load, T4.total_bytes)
    elements = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    assert found.caches_dequantized and found.bytes_by_part["linear layers in fp16, converted once"] == 2 * elements
    assert (found.row_tokens, found.recomputed_layers, found.smaller_rows_reason) == (2048, 0, "")
    seven = Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    found = estimate_memory(folder(large, seven), what, T4, load, T4.total_bytes)
    assert (
        not found.caches_dequantized
        and found.fits
        and found.bytes_by_part["one layer's weights in the compute dtype"] > 0
    )


def test_the_reference_pass_counts_where_its_rows_are_larger_than_a_step(tmp_path: Path) -> None:
    source = folder(tmp_path, half_billion(layers=6))
    what = tiny_run.recipe("nf4", model={"dtype": "auto"}, train={"micro_batch_tokens": "auto"})
    few, many = (Workload(100, 200, 150, tokens) for tokens in (200, 10**6))

    def beyond(what: Recipe, load: Workload) -> int:
        return estimate_memory(source, what, T4, load, T4.total_bytes).bytes_by_part[REFERENCE_EXTRA_PART]

    assert beyond(what, few) == 0
    # rows of the pass hold as much as a step in full rows, of which this one has a tenth
    parts = estimate_memory(source, what, T4, many, T4.total_bytes).bytes_by_part
    full = estimate_memory(source, what, T4, Workload(100, 10**6, 150, 10**6), T4.total_bytes)
    assert full.bytes_by_part[REFERENCE_EXTRA_PART] == 0
    assert 0 < parts[REFERENCE_EXTRA_PART] <= full.needed - (sum(parts.values()) - parts[REFERENCE_EXTRA_PART])
    for table in ({"objective": {"loss_type": "simpo"}}, {"reference": {"kind": "ema"}}):
        assert beyond(tiny_run.recipe("nf4", model={"dtype": "auto"}, **table), many) == 0


def test_sharded_layers_are_converted_in_every_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert estimate_memory(tiny_run.source(), tiny_run.recipe("nf4"), tiny_run.CPU, LOAD, 2**34).caches_dequantized
    monkeypatch.setattr(processes, "is_sharded", lambda: True)
    assert not estimate_memory(tiny_run.source(), tiny_run.recipe("nf4"), tiny_run.CPU, LOAD, 2**34).caches_dequantized


@pytest.mark.parametrize(
    ("quantization", "card"),
    [
        *(("none", "a10"), ("nf4", "t4")),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("none", "t4"), ("nf4", "a10"))),
        *(pytest.param("int8", card, marks=pytest.mark.slow) for card in ("t4", "a10")),
    ],
)
def test_what_is_kept_dense_changes_no_row_and_recomputes_nothing(quantization: str, card: str, tmp_path: Path) -> None:
    source, load = folder(tmp_path, half_billion(layers=6)), Workload(512, 10**6)
    what = tiny_run.recipe(quantization, train={"micro_batch_tokens": "auto"}, model={"dtype": "auto"})
    place = device_for_gpu(GPU_SPECS[card])
    for size in range(4096, 1024, -64):
        plan = estimate_memory(source, what, place, load, size * 2**20)
        assert not plan.caches_dequantized or (plan.row_tokens, plan.recomputed_layers, plan.fits) == (2048, 0, True)
    assert not plan.caches_dequantized  # of the least


@pytest.mark.parametrize("quantization", ["none", "nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_large_vocabulary_adds_nothing_to_what_a_token_keeps_in_fp16(quantization: Any, tmp_path: Path) -> None:
    """As on a T4, on a CPU: the head's copy in fp16 is as large for two pairs as for a hundred."""
    place = replace(T4, type="cpu")
    base = tiny.qwen2(vocab_size=151_936)
    base.save_pretrained(tmp_path)
    source = ModelSource("org/model", tmp_path)
    what = tiny_run.recipe(quantization)
    # one pair as the plan takes it
    pair = Workload(64, 512, 96).longest_pair()
    loaded = load_base(source, what.model, place)
    cache_dequantized(loaded, place.torch_dtype)
    attention.enable_packed_attention(loaded)
    model = attach_lora(loaded, what.lora, 0)
    fuse_lora(model, place.torch_dtype)
    batch = collate([pair], Packing(10**6, 0, place.attention))
    tokens = batch.input_ids_BL.numel()
    body = measure_activation_bytes(loaded, partial(hidden_states, model.train(), batch, place), tokens)
    with_head = measure_activation_bytes(loaded, lambda: score_batch(model, batch, place).chosen_logp_P, tokens)
    found = measure_footprint(source, what, place, Workload(64, 512, 96))
    assert found.activations.layer == pytest.approx(body.layer, rel=0.1)
    # what `train` once took for it: a copy of the head, divided by the tokens of a few pairs
    assert with_head.layer > 3 * body.layer
    assert found.head_copy_bytes in (0, 151_936 * 64 * 2)


def test_what_would_make_a_plan_fit_is_tried_and_told_with_its_need(tmp_path: Path) -> None:
    source, load = folder(tmp_path, half_billion(layers=6)), Workload(512, 10**6)
    train = {"micro_batch_tokens": 8192, "gradient_checkpointing": False}
    what = tiny_run.recipe("none", train=train, model={"dtype": "auto"}, data={"max_length": 512})
    free = 7 * 2**29
    assert not estimate_memory(source, what, T4, load, free).fits
    found = {way.recipe_lines: way.needed_bytes for way in find_memory_fixes(source, what, T4, load, free)}
    assert list(found) == [('train.gradient_checkpointing = "auto"',), ("train.micro_batch_tokens = 4096",)]
    shorter = tiny_run.recipe("none", train=train | {"micro_batch_tokens": 4096}, model={"dtype": "auto"})
    fits = estimate_memory(source, shorter, T4, load, free)
    assert fits.fits and fits.needed == found["train.micro_batch_tokens = 4096",]


def test_where_one_change_is_not_enough_several_are_told_together(tmp_path: Path) -> None:
    source, load = folder(tmp_path, half_billion(layers=6)), Workload(512, 10**6)
    train = {"micro_batch_tokens": 8192, "gradient_checkpointing": False}
    what = tiny_run.recipe("none", train=train, model={"dtype": "auto"}, data={"max_length": 512})
    (way,) = find_memory_fixes(source, what, T4, load, 1300 * 2**20)
    assert way.recipe_lines == (
        'train.gradient_checkpointing = "auto"', "train.micro_batch_tokens = 512", 'model.quantization = "nf4"'
    )  # fmt: skip
    assert way.needed_bytes <= 1300 * 2**20
    assert find_memory_fixes(source, what, T4, load, 2**20) == ()


@pytest.mark.parametrize(("asked", "layers"), [(True, 2), (False, 0)])
def test_the_recipe_can_ask_for_all_layers_or_none(asked: bool, layers: int) -> None:
    what = tiny_run.recipe(train={"gradient_checkpointing": asked})
    assert estimate_memory(tiny_run.source(), what, tiny_run.CPU, LOAD, 2**34).recomputed_layers == layers


def test_a_step_of_few_tokens_keeps_few_activations() -> None:
    what = tiny_run.recipe(train={"micro_batch_tokens": 4096})
    few, many = (
        estimate_memory(tiny_run.source(), what, tiny_run.CPU, Workload(24, step), 2**34) for step in (100, 10**6)
    )
    assert [name for name in few.bytes_by_part if name.startswith("activations of 100 tokens")]
    assert [name for name in many.bytes_by_part if name.startswith("activations of 4,096 tokens")]
    assert few.needed < many.needed


def test_a_large_model_needs_no_memory_to_be_judged(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=4, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    found = estimate_memory(folder(tmp_path, config), tiny_run.recipe("nf4"), T4, LOAD, 4 * 2**30)
    assert (
        found.base_parameters
        == 4 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28_672 + 2 * 8192) + 2 * 128_256 * 8192 + 8192
    )
    assert found.needed > 4 * 2**30 and not found.fits


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@pytest.mark.parametrize("place", [pytest.param(tiny_run.CPU, marks=pytest.mark.slow), T4], ids=["cpu", "t4"])
@pytest.mark.parametrize("kind", [*architectures.CONFIGS, *architectures.NOT_SERVED])
def test_every_architecture_is_judged_in_the_layout_that_it_gets(kind: str, place: Device, tmp_path: Path) -> None:
    config = {**architectures.CONFIGS, **architectures.NOT_SERVED}[kind]
    found = estimate_memory(folder(tmp_path, config), tiny_run.recipe("nf4"), place, LOAD, 2**33)
    assert bool(found.padding_reason) == (kind in architectures.NOT_SERVED)
    assert found.fits and found.num_layers == 2


def test_dora_keeps_more() -> None:
    plain, dora = (tiny_run.recipe("nf4", lora={"use_dora": dora}) for dora in (False, True))
    small, large = (
        estimate_memory(tiny_run.source(), what, tiny_run.CPU, LOAD, 2**34).needed for what in (plain, dora)
    )
    assert small < large


def test_modules_that_are_not_there_are_refused() -> None:
    what = tiny_run.recipe(lora={"target_modules": ["query"]})
    with pytest.raises(RecipeError, match="matches no layer; this model has down_proj, gate_proj"):
        estimate_memory(tiny_run.source(), what, tiny_run.CPU, LOAD, 2**34)


def test_a_config_that_is_unknown_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}', encoding="utf-8")
    with pytest.raises(ModelError) as refused:
        build_on_meta(ModelSource("org/model", tmp_path), tiny_run.CPU)
    assert str(refused.value) == "org/model: its config is not that of a known causal language model"


def test_a_folder_without_weights_has_all_that_is_needed(tmp_path: Path) -> None:
    folder(tmp_path, half_billion())
    tiny.tokenizer().save_pretrained(tmp_path)
    found = fetch_without_weights(ModelTable(name=str(tmp_path)))
    assert (found.folder, found.fingerprint) == (tmp_path, "")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError) as refused:
        fetch_without_weights(ModelTable(name=str(tmp_path)))
    assert str(refused.value) == f"{tmp_path}: is not a model folder: it needs config.json and *.safetensors"


@pytest.mark.parametrize("name", GPU_SPECS)
def test_a_card_computes_in_bf16_from_capability_8_0_on(name: str) -> None:
    found: Device = device_for_gpu(GPU_SPECS[name])
    ampere = GPU_SPECS[name].capability >= (8, 0)
    assert (found.type, found.compute_dtype, found.triton) == ("cuda", "bf16" if ampere else "fp16", ampere)
    assert found.total_bytes == GPU_SPECS[name].total_bytes >= 8_000 * 2**20


def test_every_default_of_lora_can_be_judged() -> None:
    assert (
        estimate_memory(
            tiny_run.source(), tiny_run.recipe(lora=LoraTable().model_dump()), tiny_run.CPU, LOAD, 2**34
        ).trainable_parameters
        > 0
    )
