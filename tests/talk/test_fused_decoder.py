"""The fused decoder computes what the model's own forward does, and leaves alone what it does not know."""

import copy
from collections.abc import Callable
from typing import Any

import architectures
import bitsandbytes as bnb
import pytest
import saved_adapters
import tiny
import torch
import varied_model
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, Qwen2Config

from qlora_dpo.adapter import open_model
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.model.quantized import compute_with_dequantized_weights
from qlora_dpo.talk import fused_decoder
from qlora_dpo.talk.decode import decode_batch, last_logits
from qlora_dpo.talk.decoder_products import fused_product
from qlora_dpo.talk.fused_decoder import FusedDecoder
from qlora_dpo.talk.generate import KVCache, generate_stream
from qlora_dpo.talk.sampling import SamplingParams

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KNOWN = {
    **{kind: architectures.CONFIGS[kind] for kind in ("llama", "qwen2", "qwen3", "mistral")},
    "llama with biases": LlamaConfig(**architectures.SHAPE, attention_bias=True, mlp_bias=True),
    "llama with scaled positions": LlamaConfig(**architectures.SHAPE, rope_parameters=LLAMA3),
}
LENGTHS = (3, 90, 20, 21)
PROMPTS = [[(7 * token + 31 * length) % 300 + 3 for token in range(length)] for length in LENGTHS]
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, seed=0)


def varied(config: Any) -> Any:
    """A model whose norms differ from one too."""
    model = architectures.made(config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def with_lora(model: Any, **config: Any) -> Any:
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False, **config)
    return get_peft_model(model, lora).eval()


def decoder_of(model: Any, rows: int = 1) -> FusedDecoder:
    decoder = fused_decoder.fused_decoder(model, rows)
    assert decoder is not None
    return decoder


@torch.no_grad()
def own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


@torch.no_grad()
def check_against_forward(model: Any, copies: int, rows: int = 1) -> None:
    """Decode different tokens for every copy, rows ending at different steps, and compare with passes over all text."""
    decoder, chosen = decoder_of(model, rows), dict[int, list[int]]()

    def choose(logits_RV: torch.Tensor, rows: Any, count: int) -> torch.Tensor:
        for row, logits_V in zip(rows, logits_RV, strict=True):
            expected = own_logits(model, PROMPTS[row // copies] + chosen.setdefault(row, []))
            assert torch.allclose(logits_V, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)
        tokens = [2 if count == row % 5 + 1 else (13 * row + 5 * count) % 200 + 3 for row in rows]
        for row, token in zip(rows, tokens, strict=True):
            chosen[row].append(token)
        return torch.tensor(tokens)

    completions = decode_batch(model, PROMPTS, {2}, 0, 5, choose, copies, decoder)
    assert completions == [chosen[row] for row in range(len(PROMPTS) * copies)]
    assert {len(completion) for completion in completions} == {2, 3, 4, 5}


@pytest.mark.parametrize(("copies", "rows"), [(1, 1), (1, 4), (3, 12)])
@pytest.mark.parametrize("kind", KNOWN)
def test_logits_are_those_of_the_models_own_forward(kind: str, copies: int, rows: int) -> None:
    check_against_forward(varied(KNOWN[kind]), copies, rows)


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "lora_dropout": 0.5, "rank_pattern": {"q_proj": 2}}])
def test_an_adapter_is_merged_unless_it_is_disabled(config: dict[str, Any]) -> None:
    model = with_lora(varied(KNOWN["qwen2"]), **config)
    check_against_forward(model, 1)
    with adapter_disabled(model):
        check_against_forward(model, 1)


def test_a_quantized_base_with_an_adapter_is_decoded_as_it_computes(tmp_path: Any) -> None:
    model = open_model(str(saved_adapters.save_both(tmp_path) / "nf4"), "fp32").model
    check_against_forward(model, 2)


def test_weights_of_the_model_stay_as_they_were() -> None:
    model = with_lora(varied(KNOWN["qwen3"]))
    before = copy.deepcopy(model.state_dict())
    check_against_forward(model, 1)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def hooked(model: Any) -> Any:
    model.model.layers[1].register_forward_hook(lambda module, given, output: output)
    return model


def gelu(model: Any) -> Any:
    model.config.hidden_act = "gelu"
    return model


UNKNOWN: dict[str, Callable[[], Any]] = {
    "a sliding window": lambda: varied(architectures.CONFIGS["a short window"]),
    "another family": lambda: varied(architectures.CONFIGS["gemma"]),
    "DoRA": lambda: with_lora(varied(KNOWN["qwen2"]), use_dora=True),
    "a bias of the adapter": lambda: with_lora(varied(KNOWN["llama with biases"]), lora_bias=True),
    "a merged adapter": lambda: _merged(with_lora(varied(KNOWN["qwen2"]))),
    "a head that is trained": lambda: with_lora(varied(KNOWN["llama"]), modules_to_save=["lm_head"]),
    "a norm that is trained": lambda: with_lora(varied(KNOWN["qwen3"]), modules_to_save=["k_norm"]),
    "another activation": lambda: gelu(varied(KNOWN["qwen2"])),
    "bfloat16": lambda: varied(KNOWN["qwen2"]).bfloat16(),
    "a hook": lambda: hooked(varied(KNOWN["qwen2"])),
}


def _merged(model: Any) -> Any:
    model.merge_adapter()
    return model


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_it_does_not_know_is_left_to_the_model(kind: str) -> None:
    assert fused_decoder.fused_decoder(UNKNOWN[kind]()) is None


WIDE_SHAPE = {**architectures.SHAPE, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""A shape whose layers fit bitsandbytes' blocks of 64 inputs and 32 outputs."""


def in_nf4(model: Any) -> Any:
    """The model with its linear layers in 4 bits, quantized as transformers does it."""
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and "proj" in name:
            has_bias = layer.bias is not None
            quantized = bnb.nn.Linear4bit(layer.in_features, layer.out_features, has_bias, torch.float32)
            quantized.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            quantized.bias = layer.bias
            model.set_submodule(name, quantized)
    compute_with_dequantized_weights(model)
    return model


@pytest.fixture(params=["dense", "nf4, small", "nf4"])
def with_adapter(request: pytest.FixtureRequest, tmp_path: Any) -> Any:
    if request.param == "nf4, small":
        return open_model(str(saved_adapters.save_both(tmp_path) / "nf4"), "fp32").model
    model = varied(Qwen2Config(**WIDE_SHAPE))
    return with_lora(in_nf4(model) if request.param == "nf4" else model)


@torch.no_grad()
def decoded_logits(model: Any, decoder: FusedDecoder, past: DynamicCache) -> list[torch.Tensor]:
    """Logits after a prompt and each of three tokens, which are left in `past`."""
    first = last_logits(model, torch.tensor([PROMPTS[1]]), past)[0].float()
    cache = decoder.cache([(past, [len(PROMPTS[1])])], 1, 3)
    others = [decoder.next_logits(torch.tensor([token]), cache, torch.tensor([0]))[0] for token in (40, 41, 42)]
    cache.append_completion(past)
    return [first, *others]


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_under_autocast_logits_are_the_models_own_up_to_the_rounding_of_products(with_adapter: Any, rows: int) -> None:
    past, texts = DynamicCache(), [PROMPTS[1] + [40, 41, 42][:count] for count in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoded_logits(with_adapter, decoder_of(with_adapter, rows), past)
        own = [own_logits(with_adapter, text).float() for text in texts]
    exact = [own_logits(with_adapter, text) for text in texts]
    assert {each.dtype for each in logits} == {torch.float32}
    # no further from float32 than the model's own forward
    assert difference(logits[1:], exact[1:]) < 1.25 * difference(own[1:], exact[1:])
    # a longer conversation goes on from this cache, in the model's own dtypes
    assert {layer.values.dtype for layer in past.layers} == {torch.bfloat16}
    assert past.get_seq_length() == len(PROMPTS[1]) + 3


def difference(logits: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return float((torch.stack(logits) - torch.stack(expected)).norm())


@pytest.mark.parametrize("rows", [1, 3, 16])
@torch.no_grad()
def test_in_bf16_an_adapter_keeps_updates_too_small_for_the_weights(with_adapter: Any, rows: int) -> None:
    layers = with_adapter.get_base_model().model.layers[0].self_attn
    projections, inputs = [layers.q_proj, layers.k_proj, layers.v_proj], torch.randn(rows, layers.q_proj.in_features)
    for layer in projections:
        layer.lora_B["default"].weight *= 1e-4
    adapted = fused_product(projections, rows, torch.bfloat16)(inputs)
    with adapter_disabled(with_adapter):
        update = adapted - fused_product(projections, rows, torch.bfloat16)(inputs)
    expected = [layer.lora_B["default"](layer.lora_A["default"](inputs)) for layer in projections]
    exact = torch.cat([layer.scaling["default"] * each for layer, each in zip(projections, expected, strict=True)], 1)
    assert torch.allclose(update, exact, atol=1e-6, rtol=1e-3)


def test_bf16_weights_and_bitsandbytes_kernel_are_used_where_they_are_faster(with_adapter: Any) -> None:
    """A 4-bit layer's weights stay in 4 bits for a few rows, if its shape and the CPU allow it."""
    layer = with_adapter.get_base_model().model.layers[0].mlp.down_proj
    in_4bit = type(layer.get_base_layer()) is bnb.nn.Linear4bit and layer.in_features % 64 == 0 and has_avx512bf16()
    kinds = [type(fused_product([layer], rows, torch.bfloat16).product).__name__ for rows in (1, 6, 7)]  # type: ignore[attr-defined]
    assert kinds == (["_FourBit", "_FourBit", "_Packed"] if in_4bit else ["_DenseBF16", "_Packed", "_Packed"])
    kinds = [type(fused_product([layer], rows, torch.float32)).__name__ for rows in (1, 3, 4)]
    assert kinds == ["_Dense", "_Dense", "_Packed"]


def test_a_quantized_base_that_computes_in_bf16_is_decoded_under_autocast_alone(tmp_path: Any) -> None:
    model = open_model(str(saved_adapters.save_both(tmp_path) / "nf4"), "bf16").model
    assert fused_decoder.fused_decoder(model) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_decoder.fused_decoder(model) is not None


def test_it_is_not_built_in_another_dtype() -> None:
    with torch.autocast("cpu", torch.float16):
        assert fused_decoder.fused_decoder(varied(KNOWN["qwen2"])) is None


def test_it_is_not_built_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = varied(KNOWN["qwen2"])
    copied = sum(p.numel() for name, p in model.named_parameters() if "proj" in name and name.endswith("weight"))
    copied = 4 * (copied + model.lm_head.weight.numel())
    monkeypatch.setattr(fused_decoder, "free_ram_bytes", lambda: int(copied / 0.25) - 4)
    assert fused_decoder.fused_decoder(model) is None
    monkeypatch.setattr(fused_decoder, "free_ram_bytes", lambda: int(copied / 0.25) + 4)
    assert fused_decoder.fused_decoder(model) is not None
    monkeypatch.setattr(fused_decoder, "free_ram_bytes", lambda: int(copied / 0.25 / 2) + 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_decoder.fused_decoder(model) is not None


def streamed(model: Any, ids: list[int], kv_cache: KVCache, decoder: FusedDecoder | None) -> str:
    return "".join(generate_stream(model, tiny.tokenizer(), ids, GREEDY, kv_cache, get_decoder=lambda: decoder))


def test_a_streamed_conversation_is_the_one_without_it() -> None:
    """A reply, a longer history, a shorter one, and the same once more."""
    model, kv_cache = varied_model.qwen2(), KVCache()
    decoder = decoder_of(model)
    for ids in ([5, 6, 7], [5, 6, 7, 30, 31, 32, 33], [5, 6], [5, 6]):
        assert streamed(model, ids, kv_cache, decoder) == streamed(model, ids, KVCache(), None)
        assert kv_cache.past is not None
        assert kv_cache.past.get_seq_length() == len(kv_cache.ids) > len(ids)


def test_the_decoder_is_built_after_the_first_token() -> None:
    """Nobody waits for it before that, and a reply of one token does not need it."""
    model, built = varied_model.qwen2(), list[FusedDecoder]()

    def get_decoder() -> FusedDecoder:
        built.append(decoder_of(model))
        return built[-1]

    reply = generate_stream(model, tiny.tokenizer(), [5, 6, 7], GREEDY, KVCache(), get_decoder=get_decoder)
    first = next(reply)
    assert not built
    assert first + "".join(reply) == streamed(model, [5, 6, 7], KVCache(), None)
    assert len(built) == 1


def test_a_reply_that_is_stopped_or_interrupted_leaves_a_cache_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kv_cache = varied_model.qwen2(), KVCache()
    decoder = decoder_of(model)
    reply = generate_stream(model, tiny.tokenizer(), [5, 6, 7], GREEDY, kv_cache, get_decoder=lambda: decoder)
    next(reply), next(reply)
    reply.close()
    assert streamed(model, [5, 6, 7, 8], kv_cache, decoder) == streamed(model, [5, 6, 7, 8], KVCache(), None)

    steps = iter(range(100))

    def interrupted(self: FusedDecoder, *given: Any) -> torch.Tensor:
        if next(steps) == 3:
            given[1].keys[0][:, :, given[1].count] = 0  # a layer was written before the step broke off
            raise KeyboardInterrupt
        return FusedDecoder.next_logits(self, *given)

    class Interrupted(FusedDecoder):
        next_logits = interrupted

    broken = Interrupted(model)
    with pytest.raises(KeyboardInterrupt):
        streamed(model, [5, 6, 7], kv_cache, broken)
    assert kv_cache.past is not None
    assert kv_cache.past.get_seq_length() == len(kv_cache.ids) == 3 + 3
    assert streamed(model, [5, 6, 7], kv_cache, decoder) == streamed(model, [5, 6, 7], KVCache(), None)


def test_prompts_of_one_pass_have_similar_lengths() -> None:
    """Without it, all prompts would be padded to the longest; 200 tokens are too few to matter."""
    model, seen = varied(KNOWN["qwen2"]), list[tuple[int, ...]]()
    decoder = decoder_of(model)
    model.register_forward_pre_hook(lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    prompts = [[5] * length for length in (10, 12, 60, 100, 105, 300)]
    decode_batch(model, prompts, {2}, 0, 2, lambda logits, rows, count: logits.argmax(-1), 1, decoder)
    assert seen == [(3, 60), (2, 105), (1, 300)]


def test_the_prompt_of_a_decoder_is_run_by_the_model() -> None:
    """So that the first token does not depend on whether there is a decoder."""
    model, past = varied(KNOWN["qwen2"]), DynamicCache()
    logits = last_logits(model, torch.tensor([PROMPTS[2]]), past)
    seen: list[torch.Tensor] = []

    def choose(logits_RV: torch.Tensor, rows: Any, count: int) -> torch.Tensor:
        seen.append(logits_RV.clone())
        return logits_RV.argmax(-1)

    decode_batch(model, PROMPTS[2:3], {2}, 0, 2, choose, 1, decoder_of(model))
    assert torch.equal(seen[0], logits)
