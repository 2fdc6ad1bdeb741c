"""Logits that a model changes behind its head: found in every dtype, and computed as the model itself does."""

from dataclasses import replace
from typing import Any

import architectures
import pytest
import tiny_run
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qlora_dpo.errors import ModelError
from qlora_dpo.model.output_head import LogitMap, logit_map_of
from qlora_dpo.preference import logps, pack
from qlora_dpo.preference.kl import kl_to_base
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import collate

HEADS: dict[str, tuple[dict[str, Any], LogitMap]] = {
    "Llama": ({}, LogitMap()),
    "Cohere": ({"logit_scale": 0.0625}, LogitMap(scale=0.0625)),
    "Cohere2": ({"logit_scale": 0.25}, LogitMap(scale=0.25)),
    "Granite": ({"logits_scaling": 13.0}, LogitMap(scale=1 / 13)),
    "GraniteMoe": (
        {"logits_scaling": 8.0, "num_local_experts": 4, "num_experts_per_tok": 2},
        LogitMap(scale=0.125),
    ),
    "HyperCLOVAX": ({"logits_scaling": 1.5}, LogitMap(scale=1.5)),
    "Gemma2": ({"final_logit_softcapping": 30.0, "head_dim": 8}, LogitMap(cap=30.0)),
    "Gemma3Text": ({"final_logit_softcapping": 1.5, "head_dim": 8}, LogitMap(cap=1.5)),
    "NanoChat": ({}, LogitMap(cap=15.0)),
    "MiniCPM3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "dim_model_base": 8,
        },
        LogitMap(input_scale=0.25),
    ),
}
PAIRS = tiny_run.pairs(4)
ANSWERS = ("chosen", "rejected")


def model_of(kind: str) -> Any:
    return architectures.made(architectures.tiny_config(kind, **HEADS[kind][0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
def test_scale_and_cap_are_found_whatever_the_logits_are_and_in_every_dtype(kind: str, dtype: Any) -> None:
    assert logit_map_of(model_of(kind).to(dtype), tiny_run.CPU) == HEADS[kind][1]


def test_a_scale_that_the_config_does_not_name_is_measured() -> None:
    model = architectures.made(architectures.CONFIGS["llama"])

    def scale(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.logits = output.logits * 0.997
        return output

    model.register_forward_hook(scale)
    assert logit_map_of(model, tiny_run.CPU).scale == pytest.approx(0.997, rel=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_log_probabilities_and_gradients_are_those_of_the_models_own_logits(kind: str) -> None:
    base = model_of(kind)
    base.get_output_embeddings().weight.data *= 5  # so that a cap is felt
    model = tiny_run.stirred(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")))
    scores = score_batch(model, collate(PAIRS, tiny_run.PADDED), tiny_run.CPU)
    ours_P = scores.chosen_logp_P - 0.5 * scores.rejected_logp_P
    plain = {answer: torch.stack([plain_logp(model, pair, answer) for pair in PAIRS]) for answer in ANSWERS}
    plain_P = plain["chosen"] - 0.5 * plain["rejected"]
    torch.testing.assert_close(ours_P, plain_P, rtol=1e-5, atol=1e-5)
    found = []
    for total in (ours_P.sum(), plain_P.sum()):
        model.zero_grad()
        total.backward()
        found.append(tiny_run.gradients(model))
    assert tiny_run.apart(*found) < 1e-5


def plain_logp(model: Any, pair: Any, answer: str) -> Tensor:
    ids = getattr(pair, answer)
    logits_LV = model(input_ids=torch.tensor([pair.prompt + ids])).logits[0, len(pair.prompt) - 1 : -1].float()
    return logits_LV.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()


MAPS = [LogitMap(), LogitMap(scale=0.3), LogitMap(cap=2.0), LogitMap(1.7, 3.0, 0.6)]


@pytest.mark.parametrize("logit_map", MAPS)
def test_in_float64_the_heads_gradient_is_autograds(logit_map: LogitMap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "STATES_PER_CHUNK", 3)
    monkeypatch.setattr(logps, "VOCAB_TILE", {"cpu": 70})
    batch = collate(PAIRS, tiny_run.PACKED)
    generator = torch.Generator().manual_seed(0)
    weight_VD, bias_V = (torch.randn(*shape, generator=generator).double() for shape in ((310, 8), (310,)))
    hidden_TD = torch.randn(batch.input_ids_BL.numel(), 8, generator=generator).double().requires_grad_()
    arguments = (weight_VD, bias_V, logit_map, batch, True, False)
    logp_N, *_ = logps._ChunkedLogps.apply(hidden_TD, *arguments)
    states_RD = hidden_TD[batch.state_R] * logit_map.input_scale
    raw_RV = states_RD @ weight_VD.T + bias_V
    logits_RV = raw_RV * logit_map.scale
    if logit_map.cap is not None:
        logits_RV = logit_map.cap * (logits_RV / logit_map.cap).tanh()
    plain_N = logits_RV.log_softmax(-1)[batch.row_N, batch.target_N]
    torch.testing.assert_close(logp_N, plain_N, rtol=1e-12, atol=1e-12)
    gradient_N = torch.randn(len(plain_N), generator=generator).double()
    (ours_TD,) = torch.autograd.grad(logp_N, hidden_TD, gradient_N)
    (plain_TD,) = torch.autograd.grad(plain_N, hidden_TD, gradient_N)
    torch.testing.assert_close(ours_TD, plain_TD, rtol=1e-10, atol=1e-12)


def test_the_distance_to_the_base_is_that_of_the_models_own_logits() -> None:
    base = model_of("Gemma3Text")
    model = tiny_run.stirred(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")))
    total, tokens = 0.0, 0
    for pair in PAIRS:
        ids, answer = torch.tensor([pair.prompt + pair.chosen]), slice(len(pair.prompt) - 1, -1)
        with torch.no_grad():
            policy_TV = model(input_ids=ids).logits[0, answer].log_softmax(-1)
            with model.disable_adapter():
                base_TV = model(input_ids=ids).logits[0, answer].log_softmax(-1)
        total, tokens = total + float((policy_TV.exp() * (policy_TV - base_TV)).sum()), tokens + len(pair.chosen)
    assert kl_to_base(model, PAIRS, tiny_run.PADDED, tiny_run.CPU) == pytest.approx(total / tokens, rel=1e-4)


def add_to_logits(model: Any) -> None:
    offset_V = torch.linspace(-0.01, 0.01, model.config.vocab_size)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.logits = output.logits + offset_V
        return output

    model.register_forward_hook(hook)


def scale_the_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.03)


def shift_the_states(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))


REFUSED = {
    add_to_logits: "it changes its logits behind the output head by more than a scale and a soft cap",
    scale_the_head: "its output head is no plain matrix product",
    shift_the_states: "it changes its hidden states between the last layer and the output head",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", REFUSED)
def test_what_is_neither_scale_nor_cap_is_refused_in_16_bits_too(change: Any, dtype: Any) -> None:
    model = architectures.made(architectures.CONFIGS["llama"]).to(dtype)
    change(model)
    with pytest.raises(ModelError) as error:
        logit_map_of(model, tiny_run.CPU)
    assert str(error.value) == (
        f"LlamaForCausalLM cannot be trained here: {REFUSED[change]}, so its log-probabilities would be wrong; name a "
        "model of another family in model.name"
    )


def test_a_head_behind_further_layers_is_refused() -> None:
    model = architectures.made(architectures.tiny_config("ModernBertDecoder", bos_token_id=2, num_key_value_heads=None))
    with pytest.raises(ModelError, match="it changes its hidden states between the last layer and the output head"):
        logit_map_of(model, tiny_run.CPU)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = architectures.made(architectures.CONFIGS["llama"]).train()
    ids = torch.arange(3, 13)[None]
    before = model(input_ids=ids).logits
    logit_map_of(model, tiny_run.CPU)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)


def test_under_autocast_the_map_is_the_same() -> None:
    assert logit_map_of(model_of("Gemma2"), replace(tiny_run.CPU, compute_dtype="bf16")) == LogitMap(cap=30.0)
